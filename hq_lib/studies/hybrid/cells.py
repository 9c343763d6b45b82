"""Seed 000's hybrid rule over a grid of bits: tensors below the boundary are trained, the others calibrated afterwards.

One short training serves every cell with the same trained tensors: what has the boundary's bits or more is float in it,
as the seed has it (float, then QAT, then PTQ of the rest). Steps of a cell: weight ranges of what was not trained, its
biases' mean shift, then activation ranges as the quantized weights make them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import pandas as pd
from torch import Tensor, nn

from hq_lib import data, models, ptq
from hq_lib.data import ImageSet
from hq_lib.graph import BitPolicy, QuantizedNet, act_quantizers, calibrate, quantize, set_quantization, weight_layers
from hq_lib.ptq.bits import correct_means
from hq_lib.quantizers import FLOAT_BITS, Quantizer
from hq_lib.results import paths, provenance, store
from hq_lib.studies.bench import shipped
from hq_lib.training import TrainConfig, evaluate, fit

STUDY = "hybrid_bits"
MODEL, QAT, RANGES = "resnet20", "dsq", "mse"
BOUNDARY = 4
"""bits from which on a tensor is left to post-training quantization (seed 000)"""
FIRST_LAST_BITS, N_VAL, EVAL_BATCH = 8, 500, 100
CONFIG = TrainConfig(epochs=1, lr=0.01, weight_decay=1e-4)
"""the short training; notebook 03 has the long ones"""
PLAN: dict[str, dict[str, Any]] = {
    "smoke": {"bits": (2, 8), "n_train": 128, "n_calib": 16, "n_test": 50, "trained_at_the_boundary": False},
    "quick": {"bits": (2, 4, 8), "n_train": 2_560, "n_calib": 128, "n_test": 1_000, "trained_at_the_boundary": False},
    "full": {"bits": (2, 3, 4, 6, 8), "n_train": 12_800, "n_calib": 256, "n_test": None,
             "trained_at_the_boundary": True},
}  # fmt: skip
"""Profile -> the grid's bits, and images to train, calibrate and test on (None: all)."""


@dataclass(frozen=True)
class Bench:
    """What the studies of notebook 06 measure on."""

    net: nn.Module
    """The shipped float network, evaluation mode."""
    train: ImageSet
    """Images to train and calibrate on."""
    val: ImageSet
    """Images to choose on."""
    test: ImageSet
    """Images of final accuracies."""

    @property
    def dataset(self) -> str:
        """The data set, which is the embedded digits where CIFAR-10 cannot be had."""
        return self.test.spec.name

    def calibration(self, n: int, seed: int) -> Tensor:
        """``n`` class-balanced training images, normalised: (n, 3, 32, 32)."""
        return data.normalize(self.train.balanced(min(n, len(self.train)), seed).images, self.train.spec)


def bench(*, n_val: int | None, n_test: int | None, device: str = "cpu") -> Bench:
    """The shipped ResNet-20 and its images, or the embedded digits (on which its accuracy means nothing)."""
    path = shipped(MODEL)
    if path is None:
        raise models.CheckpointError(f"{MODEL}: no float checkpoint is shipped in {paths.checkpoints_dir()}")
    net, record = models.load_checkpoint(path)
    test = data.load_or_embedded(record["dataset"], "test", n=n_test)
    train = data.load(test.spec.name, "train")
    n_val = None if test.spec.n_val and n_val and n_val > test.spec.n_val else n_val
    return Bench(net.to(device).eval(), train, data.load(test.spec.name, "val", n=n_val), test)


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
    def name(self) -> str:
        """Of the training run, e.g. ``w2a32_s0``."""
        return "w{}a{}_s{}".format(*self.trained, self.seed)

    def policy(self) -> BitPolicy:
        """First and last layer 8 bits, image and sums as in the QAT papers ("academic"), batch norms kept."""
        return BitPolicy.hybrid(
            self.w_bits, self.a_bits, qat=QAT, ptq=("minmax", "lsq_plus"), boundary=self.boundary,
            first_last_bits=FIRST_LAST_BITS, placement="academic", bn="keep",
        )  # fmt: skip

    def late(self) -> Callable[[nn.Module], bool]:
        """Which quantizers are calibrated, given the module."""
        return lambda quantizer: int(quantizer.bits) >= self.boundary  # type: ignore[arg-type]


def cells(bits: Sequence[int], *, seed: int = 0, trained_at_the_boundary: bool = False) -> list[Cell]:
    """All pairs of bits, each calibrated throughout and, where that differs, by the rule; runs that share one adjoin.

    ``trained_at_the_boundary`` adds the cell with all tensors at ``BOUNDARY`` bits, trained: does it pay up there?
    """
    pairs = list(product(bits, bits))
    hybrid = [cell for w, a in pairs if (cell := Cell(w, a, BOUNDARY, seed)).is_trained]
    extra = [Cell(BOUNDARY, BOUNDARY, BOUNDARY + 1, seed)] if trained_at_the_boundary else []
    return [Cell(w, a, 0, seed) for w, a in pairs] + sorted(hybrid, key=lambda cell: cell.trained) + extra


def run(profile: str, *, seeds: Sequence[int] = (0,), device: str = "cpu") -> pd.DataFrame:
    """Measures every cell that has no row yet; the study's rows of this profile.

    Args:
        profile: chooses ``PLAN``.
        seeds:   one map each.
        device:  "cpu" or "cuda".
    """
    plan = PLAN[paths.check_profile(profile)]
    flag = plan["trained_at_the_boundary"]
    wanted = [cell for seed in seeds for cell in cells(plan["bits"], seed=seed, trained_at_the_boundary=flag)]
    stage: Bench | None = None
    runs: dict[str, QuantizedNet] = {}
    for i, cell in enumerate(wanted):
        if store.done(STUDY, _key(cell, plan), profile=profile):
            continue
        stage = stage or bench(n_val=N_VAL, n_test=plan["n_test"], device=device)
        if cell.is_trained and cell.name not in runs:
            runs = {cell.name: train(cell, stage, profile)}
        with provenance.stopwatch(device) as watch:
            score = evaluate(
                finished(cell, stage, plan["n_calib"], runs.get(cell.name)), stage.test, batch_size=EVAL_BATCH
            )
        row = {
            **_key(cell, plan), "dataset": stage.dataset, "n_test": score.n, "metric": "acc_pct", "unit": "%",
            "value": score.acc_pct, "seconds": watch.seconds, **provenance.stamp(device),
        }  # fmt: skip
        store.append(STUDY, [row], profile=profile)
        how = f"rule from {cell.boundary} bits" if cell.boundary else "calibrated"
        print(f"[{i + 1}/{len(wanted)}] W{cell.w_bits}A{cell.a_bits}, {how}: {score.acc_pct:.2f} %", flush=True)
    rows = store.read(STUDY, profile=profile)
    return rows.loc[rows["profile"] == profile]


def _key(cell: Cell, plan: dict[str, Any]) -> dict[str, Any]:
    switches = {
        "boundary": cell.boundary, "qat": QAT, "ranges": RANGES, "bias": "means", "first_last_bits": FIRST_LAST_BITS,
        "lr": CONFIG.lr,
    }  # fmt: skip
    return {
        "experiment": "fig_hybrid_bits", "model": MODEL, "method": "hybrid" if cell.boundary else RANGES,
        "w_bits": cell.w_bits, "a_bits": cell.a_bits, "placement": "academic", "n_calib": plan["n_calib"],
        "seed": cell.seed, "epochs": CONFIG.epochs if cell.is_trained else 0,
        "n_train": plan["n_train"] if cell.is_trained else 0, "switches": switches,
    }  # fmt: skip


def train(cell: Cell, stage: Bench, profile: str) -> QuantizedNet:
    """The network after the short training of its tensors below the boundary; what is above was float in it."""
    plan, late = PLAN[profile], cell.late()
    some = Cell(*cell.trained, cell.boundary, cell.seed)
    x = stage.calibration(plan["n_calib"], cell.seed)
    qnet = quantize(stage.net, some.policy(), x[:1]).train()
    set_quantization(qnet, weights=False, acts=False, only=late)
    calibrate(qnet, x, only=lambda quantizer: not late(quantizer))
    few = stage.train.balanced(min(plan["n_train"], len(stage.train)), cell.seed)
    print(f"training {cell.name}: {len(few)} images of {stage.dataset}", flush=True)
    config = TrainConfig(**{**vars(CONFIG), "seed": cell.seed, "flip": stage.train.spec.flip})
    fit(qnet, few, stage.val, config, paths.runs_dir(profile) / STUDY / cell.name)
    return qnet


def finished(cell: Cell, stage: Bench, n_calib: int, trained: QuantizedNet | None) -> QuantizedNet:
    """The cell's network: ``trained`` tensors as they are, all others calibrated, everything quantized."""
    late, x = cell.late(), stage.calibration(n_calib, cell.seed)
    qnet = quantize(stage.net, cell.policy(), x[:1]).eval()
    if trained is not None:
        take_over(qnet, trained, late)
    ptq.fit_weights(qnet, RANGES, only=late)
    correct_means(qnet, x, only=late)
    ptq.fit_acts(qnet, x, RANGES, quantized_weights=True, only=late)
    return qnet


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


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """The map: columns w_bits, a_bits, calibrated, hybrid (test accuracy, %; means over seeds), one line per pair.

    Where no tensor is below the boundary the rule calibrates everything, so both columns agree.
    """
    boundary = rows["switches"].str.extract(r'"boundary":(\d+)')[0].astype(int)
    known = {
        name: rows.loc[boundary == at].groupby(["w_bits", "a_bits"])["value"].mean()
        for name, at in (("calibrated", 0), ("hybrid", BOUNDARY))
    }
    wide = pd.DataFrame({"calibrated": known["calibrated"]})
    wide["hybrid"] = known["hybrid"].reindex(wide.index)
    both = [w >= BOUNDARY and a >= BOUNDARY for w, a in wide.index]
    wide.loc[both, "hybrid"] = wide.loc[both, "calibrated"]
    return wide.reset_index()


def trained_at_boundary(rows: pd.DataFrame) -> float | None:
    """Test accuracy, %, of the cell with ``BOUNDARY`` bits throughout, trained; None where it was not run."""
    hits = rows.loc[rows["switches"].str.contains(f'"boundary":{BOUNDARY + 1},', regex=False), "value"]
    return None if hits.empty else float(hits.mean())
