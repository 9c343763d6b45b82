"""Seed 000's hybrid rule over a grid of bits: tensors below the boundary are trained, the others calibrated afterwards.

One short training serves every cell with the same trained tensors: what has the boundary's bits or more is float in it,
as the seed has it (float, then QAT, then PTQ of the rest). Steps of a cell: weight ranges of what was not trained, its
biases' mean shift, then activation ranges as the quantized weights make them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from torch import Tensor, nn

from hq_lib import ptq
from hq_lib.data import ImageSet
from hq_lib.graph import BitPolicy, QuantizedNet, calibrate, quantize, set_quantization
from hq_lib.ptq.ranges import Method
from hq_lib.quantizers import FLOAT_BITS, Quantizer
from hq_lib.studies.bench import Bench
from hq_lib.training import FitResult, TrainConfig, fit

QAT, RANGES = "dsq", "mse"
BOUNDARY = 4
"""bits from which on a tensor is left to post-training quantization (seed 000)"""
FIRST_LAST_BITS = 8
CONFIG = TrainConfig(epochs=1, lr=0.01, weight_decay=1e-4)
"""the short training; notebook 03 has the long ones"""


@dataclass(frozen=True)
class Cell:
    """One point of the map."""

    w_bits: int
    """Bits of the weights between first and last layer."""
    a_bits: int
    """Bits of the activations between the image and the last layer."""
    boundary: int
    """Bits from which on a tensor is calibrated instead of trained; 0 = all are calibrated."""
    seed: int = 0
    """Of training order, augmentation, training and calibration images."""

    @property
    def shared(self) -> "Cell":
        """What a training run depends on: the bits of the trained tensors, 32 where none is trained."""
        w, a = (bits if bits < self.boundary else FLOAT_BITS for bits in (self.w_bits, self.a_bits))
        return replace(self, w_bits=w, a_bits=a)

    @property
    def is_trained(self) -> bool:
        """Whether any tensor is."""
        return min(self.w_bits, self.a_bits) < self.boundary

    @property
    def name(self) -> str:
        """E.g. ``w2a8_from4_s0``, or ``w2a8_calibrated_s0``."""
        how = f"from{self.boundary}" if self.boundary else "calibrated"
        return f"w{self.w_bits}a{self.a_bits}_{how}_s{self.seed}"

    @property
    def training(self) -> str:
        """Of the training run, e.g. ``w2a32_s0``; of a cell without one ``calibrated_s0``."""
        shared = self.shared
        return (f"w{shared.w_bits}a{shared.a_bits}" if self.is_trained else "calibrated") + f"_s{self.seed}"

    def quantized(self, stage: Bench, x: Tensor) -> QuantizedNet:
        """First and last layer 8 bits, image and sums as in the QAT papers ("academic"), batch norms kept."""
        policy = BitPolicy.hybrid(
            self.w_bits, self.a_bits, qat=QAT, ptq=("minmax", "lsq_plus"), boundary=self.boundary,
            first_last_bits=FIRST_LAST_BITS, placement="academic", bn="keep",
        )  # fmt: skip
        return quantize(stage.net, policy, x[:1])


def cells(bits: Sequence[int], *, seed: int = 0, trained_at_the_boundary: bool = False) -> list[Cell]:
    """All pairs of bits, each calibrated throughout and, where that differs, by the rule; runs that share one adjoin.

    ``trained_at_the_boundary`` adds the cell with all tensors at ``BOUNDARY`` bits, trained: does it pay up there?
    """
    pairs = list(product(bits, bits))
    hybrid = [cell for w, a in pairs if (cell := Cell(w, a, BOUNDARY, seed)).is_trained]
    extra = [Cell(BOUNDARY, BOUNDARY, BOUNDARY + 1, seed)] if trained_at_the_boundary else []
    adjoining = sorted(hybrid, key=lambda cell: (cell.shared.w_bits, cell.shared.a_bits))
    return [Cell(w, a, 0, seed) for w, a in pairs] + adjoining + extra


def train(cell: Cell, stage: Bench, folder: Path, *, n_calib: int, n_train: int) -> QuantizedNet:
    """The network after the short training of its tensors below the boundary; what is above was float in it."""
    x, few = stage.calibration(n_calib, cell.seed), stage.train.drawn(n_train, cell.seed)
    print(f"training {cell.training}: {len(few)} images of {stage.dataset}", flush=True)
    qnet = cell.shared.quantized(stage, x)
    config, kept = replace(CONFIG, seed=cell.seed, flip=few.spec.flip), stage.run_folder(folder, cell.training)
    fit_early(qnet, x, few, stage.val, config, kept)
    return qnet


def finished(cell: Cell, stage: Bench, n_calib: int, trained: QuantizedNet | None) -> QuantizedNet:
    """The cell's network: ``trained`` tensors as they are, all others calibrated, everything quantized."""
    x = stage.calibration(n_calib, cell.seed)
    qnet = cell.quantized(stage, x)
    if trained is not None:
        take_over(qnet, trained)
    fit_late(qnet, x, RANGES)
    return qnet


def fit_early(
    qnet: QuantizedNet, x: Tensor, train: ImageSet, val: ImageSet | None, config: TrainConfig, folder: Path | None
) -> FitResult | None:
    """Train what has fewer bits than the rule's boundary, in place, from grids fitted to ``x``; the rest is float.

    None where nothing has fewer bits.
    """
    late = is_late(qnet)
    if all(map(late, _quantizers(qnet).values())):
        return None
    with set_quantization(qnet, weights=False, acts=False, only=late):
        calibrate(qnet, x, only=lambda quantizer: not late(quantizer))
        return fit(qnet, train, val, config, folder)


def fit_late(qnet: QuantizedNet, x: Tensor, ranges: Method) -> None:
    """Calibrate on ``x`` what has the boundary's bits or more, in place, mean shifts of its biases too."""
    late = is_late(qnet.eval())
    ptq.fit_weights(qnet, ranges, only=late)
    ptq.correct_means(qnet, x, only=late)
    ptq.fit_acts(qnet, x, ranges, quantized_weights=True, only=late)


def is_late(qnet: QuantizedNet) -> Callable[[nn.Module], bool]:
    """Which quantizers the rule of ``qnet``, of a ``BitPolicy.hybrid``, leaves to calibration, given the module."""
    rule = qnet.policy.hybrid_rule
    assert rule is not None
    return lambda quantizer: int(quantizer.bits) >= rule.boundary  # type: ignore[arg-type]


def take_over(qnet: QuantizedNet, trained: QuantizedNet) -> None:
    """Give ``qnet`` the weights, statistics and trained quantizers of ``trained``, in place; not those that are late.

    Raises ``RuntimeError`` where other tensors were trained, or to other bits.
    """
    mine, theirs = (
        {name: f"{q.method}:{q.bits}" for name, q in _quantizers(net).items() if not is_late(net)(q)}
        for net in (qnet, trained)
    )
    if mine != theirs:
        raise RuntimeError(f"the trained net does not fit: {sorted(mine.items() ^ theirs.items())[:3]}")
    kept = tuple(f"{name}." for name in _quantizers(qnet).keys() - mine.keys())
    own = {key: value for key, value in qnet.state_dict().items() if key.startswith(kept) or "_extra_state" in key}
    theirs_too = {key: value for key, value in trained.state_dict().items() if not key.startswith(kept)}
    qnet.load_state_dict({**theirs_too, **own})


def _quantizers(qnet: QuantizedNet) -> dict[str, nn.Module]:
    return {name: module for name, module in qnet.named_modules() if isinstance(module, Quantizer)}
