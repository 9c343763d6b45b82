"""Published devices by name. Each constant names its paper or tool; conductances in microsiemens, times in seconds.

Two fits of one measurement (Wan 2022) differ mainly near G = 0, where most cells sit, and that alone costs 3 to 8
points of accuracy: compare tools only at equal sigma(G), window and weight scale, and print all three.
"""

from __future__ import annotations

from pathlib import Path

from hq_lib.crossbar.checks import check_choice
from hq_lib.crossbar.curves import Polynomial
from hq_lib.crossbar.devices import Device, Drift, FlickerRead, LogClamp
from hq_lib.crossbar.measured import measured_device

IDEAL = Device("ideal", "no errors; infinite on/off ratio", 0.0, 25.0)

PCM_JOSHI = Device(
    "pcm",
    "PCM, Joshi et al., Nat. Commun. 11 (2020), sigma(G) as fitted in CrossSim 3.2; drift not modelled",
    0.25,
    25.0,
    Polynomial((0.286, 0.0759, -0.00179)),
)

PCM_NANDAKUMAR = Device(
    "pcm_drift",
    "PCM, Nandakumar et al., ICECS 2019, programming, drift and 1/f read noise as in aihwkit",
    0.0,
    25.0,
    Polynomial((0.263, 1.965, -1.173), per_uS=25.0),
    Drift(LogClamp(-0.0155, 0.0244, 0.049, 0.1), LogClamp(-0.0125, -0.0059, 0.008, 0.045), t0_s=20.0),
    FlickerRead(q_scale=0.0088, q_power=-0.65, q_max=0.2, t_read_s=250e-9),
)

RRAM_WAN_1S = Device(
    "rram",
    "RRAM, Wan et al., Nature 608 (2022), 1 s after programming, fit of aihwkit",
    0.0,
    40.0,
    Polynomial((0.348, 16.03, -43.85, 45.39, -16.82), per_uS=40.0),
)

RRAM_WAN_1DAY = Device(
    "rram_1day",
    "RRAM, Wan et al., Nature 608 (2022), 1 day after programming, fit of aihwkit",
    0.0,
    40.0,
    Polynomial((0.701, 22.09, -50.77, 47.10, -16.46), per_uS=40.0),
)

RRAM_WAN_CROSSSIM = Device(
    "rram_crosssim",
    "RRAM, Wan et al., Nature 608 (2022), fit of CrossSim 3.2",
    0.0,
    39.26,
    Polynomial((1.053, 0.2374, -0.01167, 1.536e-4)),
)

RRAM_MILO = Device(
    "rram_lowratio",
    "RRAM, Milo et al. (2021), fit of CrossSim 3.2; on/off ratio 4.5",
    50.0,
    225.0,
    Polynomial((4.782, -0.0091)),
)

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (IDEAL, PCM_JOSHI, PCM_NANDAKUMAR, RRAM_WAN_1S, RRAM_WAN_1DAY, RRAM_WAN_CROSSSIM, RRAM_MILO)
}


def device(name: str | Path) -> Device:
    """The published device called ``name``, or the `measured_device` of a path that ends in .csv; an unknown name is
    refused with the nearest ones."""
    if Path(name).suffix == ".csv":
        return measured_device(name)
    return DEVICES[check_choice(str(name), DEVICES, "device")]
