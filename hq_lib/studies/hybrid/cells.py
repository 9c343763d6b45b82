"""Seed 000's hybrid rule over a grid of bits: tensors below the boundary are trained, the others calibrated afterwards.

One short training serves every cell with the same trained tensors: what has the boundary's bits or more is float in it,
as the seed has it (float, then QAT, then PTQ of the rest). Steps of a cell: weight ranges of what was not trained, its
biases' mean shift, then activation ranges as the quantized weights make them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from torch import Tensor, nn

from hq_lib import ptq
from hq_lib.data import ImageSet
from hq_lib.graph import BitPolicy, QuantizedNet, act_quantizers, calibrate, quantize, set_quantization, weight_layers
from hq_lib.ptq.bits import correct_means
from hq_lib.ptq.ranges import Method
from hq_lib.quantizers import FLOAT_BITS, Quantizer
from hq_lib.studies.bench import Bench
from hq_lib.training import TrainConfig, fit

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
    def trained(self) -> tuple[int, int]:
        """Bits of the trained weights and activations, 32 where none is trained: what a training run depends on."""
        w, a = (bits if bits < self.boundary else FLOAT_BITS for bits in (self.w_bits, self.a_bits))
        return w, a

    @property
    def is_trained(self) -> bool:
        """Whether any tensor is."""
        return self.trained != (FLOAT_BITS, FLOAT_BITS)

    @property
    def training(self) -> str:
        """Of the training run, e.g. ``w2a32_s0``; of a cell without one ``calibrated_s0``."""
        return ("w{}a{}_s{}".format(*self.trained, self.seed)) if self.is_trained else f"calibrated_s{self.seed}"

    @property
    def name(self) -> str:
        """E.g. ``w2a8_from4_s0``, or ``w2a8_calibrated_s0``."""
        how = f"from{self.boundary}" if self.boundary else "calibrated"
        return f"w{self.w_bits}a{self.a_bits}_{how}_s{self.seed}"

    @property
    def shared(self) -> "Cell":
        """A cell that stands for all that share its training."""
        return Cell(*self.trained, self.boundary, self.seed)

    def policy(self) -> BitPolicy:
        """First and last layer 8 bits, image and sums as in the QAT papers ("academic"), batch norms kept."""
        return BitPolicy.hybrid(
            self.w_bits, self.a_bits, qat=QAT, ptq=("minmax", "lsq_plus"), boundary=self.boundary,
            first_last_bits=FIRST_LAST_BITS, placement="academic", bn="keep",
        )  # fmt: skip

    def late(self) -> Callable[[nn.Module], bool]:
        """Which quantizers are calibrated, given the module."""
        return _late(self.boundary)


def cells(bits: Sequence[int], *, seed: int = 0, trained_at_the_boundary: bool = False) -> list[Cell]:
    """All pairs of bits, each calibrated throughout and, where that differs, by the rule; runs that share one adjoin.

    ``trained_at_the_boundary`` adds the cell with all tensors at ``BOUNDARY`` bits, trained: does it pay up there?
    """
    pairs = list(product(bits, bits))
    hybrid = [cell for w, a in pairs if (cell := Cell(w, a, BOUNDARY, seed)).is_trained]
    extra = [Cell(BOUNDARY, BOUNDARY, BOUNDARY + 1, seed)] if trained_at_the_boundary else []
    return [Cell(w, a, 0, seed) for w, a in pairs] + sorted(hybrid, key=lambda cell: cell.trained) + extra


def train(cell: Cell, stage: Bench, folder: Path, *, n_calib: int, n_train: int) -> QuantizedNet:
    """The network after the short training of its tensors below the boundary; what is above was float in it."""
    late, x = cell.late(), stage.calibration(n_calib, cell.seed)
    qnet = quantize(stage.net, cell.shared.policy(), x[:1]).train()
    set_quantization(qnet, weights=False, acts=False, only=late)
    calibrate(qnet, x, only=lambda quantizer: not late(quantizer))
    few = stage.train.balanced(min(n_train, len(stage.train)), cell.seed)
    print(f"training {cell.training}: {len(few)} images of {stage.dataset}", flush=True)
    config = TrainConfig(**{**vars(CONFIG), "seed": cell.seed, "flip": stage.train.spec.flip})
    fit(qnet, few, stage.val, config, folder / cell.training)
    return qnet


def finished(cell: Cell, stage: Bench, n_calib: int, trained: QuantizedNet | None) -> QuantizedNet:
    """The cell's network: ``trained`` tensors as they are, all others calibrated, everything quantized."""
    late, x = cell.late(), stage.calibration(n_calib, cell.seed)
    qnet = quantize(stage.net, cell.policy(), x[:1]).eval()
    if trained is not None:
        take_over(qnet, trained, late)
    _calibrate_late(qnet, x, RANGES, late)
    return qnet


def fit_hybrid(
    qnet: QuantizedNet, x: Tensor, train: ImageSet, val: ImageSet | None, config: TrainConfig, *,
    ranges: Method = RANGES, folder: Path | None = None,
) -> None:  # fmt: skip
    """Fit ``qnet``, of a ``BitPolicy.hybrid``, in place: train below the rule's boundary, then calibrate on ``x``.

    What has the boundary's bits or more is float during the training. Nothing below it: no training.
    """
    assert qnet.policy.hybrid_rule is not None
    late = _late(qnet.policy.hybrid_rule.boundary)
    if not all(late(quantizer) for quantizer in _quantizers(qnet).values()):
        with set_quantization(qnet, weights=False, acts=False, only=late):
            calibrate(qnet, x, only=lambda quantizer: not late(quantizer))
            fit(qnet, train, val, config, folder)
    _calibrate_late(qnet.eval(), x, ranges, late)


def _late(boundary: int) -> Callable[[nn.Module], bool]:
    return lambda quantizer: int(quantizer.bits) >= boundary  # type: ignore[arg-type]


def _calibrate_late(qnet: QuantizedNet, x: Tensor, ranges: Method, late: Callable[[nn.Module], bool]) -> None:
    ptq.fit_weights(qnet, ranges, only=late)
    correct_means(qnet, x, only=late)
    ptq.fit_acts(qnet, x, ranges, quantized_weights=True, only=late)


def take_over(qnet: QuantizedNet, trained: QuantizedNet, late: Callable[[nn.Module], bool]) -> None:
    """Give ``qnet`` the weights, statistics and trained quantizers of ``trained``, in place; not those that are late.

    Raises ``RuntimeError`` where the two do not fit.
    """
    mine = {name for name, module in _quantizers(qnet).items() if late(module)}
    theirs = {name for name, module in _quantizers(trained).items() if late(module)}
    apart = tuple(f"{name}." for name in mine | theirs)
    state = {
        k: v for k, v in trained.state_dict().items() if not k.startswith(apart) and not k.endswith("_extra_state")
    }
    result = qnet.load_state_dict(state, strict=False)
    missing = [k for k in result.missing_keys if not k.startswith(apart) and not k.endswith("_extra_state")]
    if missing or result.unexpected_keys:
        raise RuntimeError(f"the trained net does not fit: missing {missing}, unexpected {result.unexpected_keys}")


def _quantizers(qnet: QuantizedNet) -> dict[str, nn.Module]:
    found = {f"{name}.weight_quantizer": layer.weight_quantizer for name, layer in weight_layers(qnet).items()}
    return {name: q for name, q in {**found, **act_quantizers(qnet)}.items() if isinstance(q, Quantizer)}
