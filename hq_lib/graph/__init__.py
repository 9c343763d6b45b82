"""Quantized graphs: ``quantize(net, policy, example)`` for any traceable CNN, and what PTQ and lowering stand on.

policy = BitPolicy(weight="lsq:4", act="lsq:4", first_last_bits=8)
qnet = quantize(net, policy, images[:1])     # a torch.fx graph: QuantConv2d, QuantLinear, <node>_act_quantizer
calibrate(qnet, images)                      # fit all grids; or train: the first batch fits those of one tensor
policy.report(qnet)                          # layer, method, bits, scale, MACs, parameters, average bits
save(qnet, "net.safetensors")                # and load: frozen integers, or trainable
"""

from hq_lib.graph.blocks import Block, blocks, extract_block
from hq_lib.graph.layers import QUANTIZER_SUFFIX, QuantConv2d, QuantizedWeight, QuantLinear
from hq_lib.graph.network_file import load, save
from hq_lib.graph.operations import kinds, op_name
from hq_lib.graph.placement import Site, find_sites
from hq_lib.graph.policy import BitPolicy
from hq_lib.graph.rewrite import QuantizedNet, quantize
from hq_lib.graph.spec import PolicyError, QuantizeError, Spec
from hq_lib.graph.state import act_quantizers, calibrate, layer_macs, set_quantization, weight_layers
