"""Quantizers: pure functions on the affine grid (``affine``), and one small module per published method.

``weight_quantizer(method, bits)`` and ``act_quantizer(method, bits, signed=...)`` build them by name. Each module
trains on a grid that it can name exactly: ``q(x) == grid.scale * (q.to_int(x) - grid.zero_point)``, bit for bit.
"""

from hq_lib.quantizers.affine import Grid, dequantize, quantize_to_int
from hq_lib.quantizers.base import Quantizer, Tag, parameter_tags
from hq_lib.quantizers.build import FLOAT_BITS, METHODS, act_quantizer, weight_quantizer
from hq_lib.quantizers.dorefa import DoReFaAct, DoReFaHardwareWeight, DoReFaWeight
from hq_lib.quantizers.dsq import DSQ, dsq_quantize, dsq_slope, dsq_soft
from hq_lib.quantizers.fixed import AdaRound, FixedGrid, FrozenWeight
from hq_lib.quantizers.fusion import enable_fusion_, fusion_status
from hq_lib.quantizers.lsq import LSQ, LSQPlusAct, LSQPlusWeight
from hq_lib.quantizers.minmax import MinMaxAct, MinMaxWeight
from hq_lib.quantizers.pact import MPACT, PACT, FixedMPACT
from hq_lib.quantizers.straight_through import Slope, staircase
