"""The trained networks in integers: what the shipped checkpoints keep when their accumulators are int32.

``hq study qat_integers --profile full`` opens each quantized checkpoint of ``qat``, and judges it on the same images
three times: as it was trained, with the biases that its accumulators hold, and in integers. The last two must agree.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from hq_lib import data, graph, integer, models
from hq_lib.data import ImageSet
from hq_lib.results import paths
from hq_lib.studies.study import Found, Point, Row, Run, Study
from hq_lib.training import evaluate

EXECUTORS = ("fake_quant", "fake_quant, integer biases", "integers")
BATCH = 250


@dataclass(frozen=True)
class Plan:
    """How much of the study a profile runs."""

    n_test: int | None = None
    """Test images; None = all."""
    methods: tuple[str, ...] = ()
    """Methods of training; () = of every checkpoint there is."""


@dataclass(frozen=True)
class Trained(Point):
    """One checkpoint."""

    file: str
    """Its name, ``resnet20_pact_w4a4_s0.safetensors``."""

    @property
    def name(self) -> str:
        """E.g. ``integers_resnet20_pact_w4a4_s0``."""
        return f"integers_{self.file.removesuffix('.safetensors')}"

    @property
    def after(self) -> tuple[str, ...]:
        """The training that ships it."""
        return (self.file.removesuffix(".safetensors"),)

    @property
    def minutes(self) -> float:
        """Rough cost."""
        return 10.0


@cache
def _record(file: str) -> Row:
    return models.read_checkpoint(paths.checkpoints_dir() / file)[1]


def points(plan: Plan) -> list[Trained]:
    """The quantized checkpoints that are there."""
    files = sorted(file.name for file in paths.checkpoints_dir().glob("*_w*a*_s*.safetensors"))
    return [Trained(file) for file in files if not plan.methods or _record(file)["method"] in plan.methods]


def key(run: Run[Plan], point: Trained) -> Row:
    """What names a checkpoint in the rows: the training behind it, and the file with its hash."""
    record = _record(point.file)
    policy = graph.BitPolicy.from_dict(record["policy"])
    return {
        "experiment": run.study, "model": record["model"], "method": record["method"], "metric": "acc_pct",
        "w_bits": policy.weight.bits, "a_bits": policy.act.bits, "seed": record["seed"], "placement": policy.placement,
        "epochs": record["config"]["epochs"], "switches.checkpoint": record["sha256"][:8],
    }  # fmt: skip


def measure(run: Run[Plan], test: ImageSet, point: Trained) -> Iterator[Found]:
    """Accuracy by executor, and the share of images to which network and integers give one class."""
    qnet = graph.load(paths.checkpoints_dir() / point.file)
    trained = evaluate(qnet, test).acc_pct
    integer.round_biases(qnet, images=test.spec)
    found = integer.agreement(qnet, integer.lower(qnet, images=test.spec), test, batch_size=BATCH)
    record = _record(point.file)
    common = {"dataset": test.spec.name, "n_train": record["n_train"], "n_test": len(test), "unit": "%"}
    checkpoint = {"checkpoint": record["sha256"][:8]}
    for executor, value in zip(EXECUTORS, (trained, found.fake_quant_acc_pct, found.integer_acc_pct), strict=True):
        yield {**common, "value": value, "switches": {**checkpoint, "executor": executor}}
    yield {**common, "metric": "same_top1_pct", "value": found.same_top1_pct, "switches": checkpoint}


STUDY = Study(
    "qat_integers",
    {"smoke": Plan(100, ("lsq",)), "quick": Plan(300), "full": Plan()},
    points=points,
    key=key,
    open_bench=lambda run, _: data.load_or_embedded("cifar10", "test", n=run.plan.n_test),
    measure=measure,
)
