"""Bits per tensor: how much each tensor's quantization hurts, and the assignment that spends a budget best.

    bank = GridBank(net, images, (2, 3, 4, 8))               # every tensor's grid at every number of bits, fitted once
    qnet = bank.assign({"weight conv1": 8, "act conv1": 4})  # the others float; no fitting, a moment each
    found = optimal(losses, size_cost(qnet), budget=100.0)   # integer program over a sensitivity table
    quantize(net, bank.policy(found.bits), images[:1])       # the same bits as a policy, for PTQ, QAT and lowering

Tensors go by the names of ``QuantizedNet.bits_record``: "weight <layer>" and "act <activation>".
"""

from hq_lib.ptq.bits.bank import GridBank, correct_means, mean_shifts, tensors_of, uniform_policy
from hq_lib.ptq.bits.search import Assignment, Cost, assigned, at_random, bop_cost, greedy, optimal, size_cost, uniform
