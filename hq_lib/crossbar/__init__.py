"""Analog crossbars: engines that multiply integer inputs by integer weights, exactly, simulated, recorded or measured.

    engine = SimEngine(Circuit(device("rram"), adc=Adc(8)))
    handle = engine.load(w_int, w_scale, "layer1.conv1")          # (K, N) integers of 8 bits
    engine.calibrate_adc(handle, x_some)                          # what the converters must cover: (m, K) integers
    y = engine.mvm(handle, x_int)                                 # (B, K) -> (B, N) whole numbers in float64

`Convolution` is a convolution or linear layer of any geometry on any engine, `EngineNetwork` whole integer networks
or chosen layers of them. Symbols: K inputs, N outputs, R rows of
a tile, G conductance (microsiemens), t seconds after programming. Codes, weights and outputs are integers; one step of
an output is one accumulator step of the integer network.
"""

from hq_lib.crossbar.bench import FakeDriver
from hq_lib.crossbar.calibration import residuals
from hq_lib.crossbar.checks import BenchError, CrossbarError, TraceError
from hq_lib.crossbar.circuit import Adc, Circuit, Drive, Verify, Wires
from hq_lib.crossbar.convolution import Convolution
from hq_lib.crossbar.devices import (
    Constant,
    ConstantRead,
    Curve,
    Device,
    Drift,
    FlickerRead,
    LogClamp,
    Polynomial,
    Proportional,
)
from hq_lib.crossbar.drivers import BenchServer, Driver, Limits, TcpDriver
from hq_lib.crossbar.engine import Correction, Engine, IdealEngine
from hq_lib.crossbar.hardware import HardwareEngine, Patience
from hq_lib.crossbar.mapping import Faults, Mapping
from hq_lib.crossbar.network import EngineNetwork
from hq_lib.crossbar.profiles import device, fit_report, proportional, state_independent
from hq_lib.crossbar.recording import RecordEngine, ReplayEngine
from hq_lib.crossbar.simulator import SimEngine, count
from hq_lib.crossbar.trace import Trace
