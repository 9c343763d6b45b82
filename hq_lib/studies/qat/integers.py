"""The trained networks in integers: what the shipped checkpoints keep when their accumulators are int32.

``hq study qat_integers --profile full`` opens each quantized checkpoint of ``qat``, and judges it on the same images
three times: as it was trained, with the biases that its accumulators hold, and in integers. The last two must agree.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from hq_lib import data, graph, integer
from hq_lib.data import ImageSet
from hq_lib.results import paths
from hq_lib.studies.bench import quantized_as, record_of
from hq_lib.studies.study import Found, Point, Run, Study
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


def points(plan: Plan) -> list[Point]:
    """The quantized checkpoints that are there; a key names the training behind one, and the file by its hash."""
    found = []
    for stem in (file.stem for file in sorted(paths.checkpoints_dir().glob("*_w*a*_s*.safetensors"))):
        record = record_of(stem)
        if plan.methods and record["method"] not in plan.methods:
            continue
        named = {"epochs": record["config"]["epochs"], "switches.checkpoint": record["sha256"][:8]}
        key = {**quantized_as(record), "metric": "acc_pct", "seed": record["seed"], **named}
        found.append(Point(f"integers_{stem}", key, stem, after=(stem,), minutes=10.0))
    return found


def measure(run: Run[Plan], test: ImageSet, point: Point) -> Iterator[Found]:
    """Accuracy by executor, and the share of images to which network and integers give one class."""
    qnet = graph.load(paths.checkpoints_dir() / f"{point.what}.safetensors")
    trained = evaluate(qnet, test).acc_pct
    integer.round_biases(qnet, images=test.spec)
    found = integer.agreement(qnet, integer.lower(qnet, images=test.spec), test, batch_size=BATCH)
    record = record_of(point.what)
    common = {"dataset": test.spec.name, "n_train": record["n_train"], "n_test": len(test)}
    checkpoint = {"checkpoint": record["sha256"][:8]}
    for executor, value in zip(EXECUTORS, (trained, found.fake_quant_acc_pct, found.integer_acc_pct), strict=True):
        yield {**common, "value": value, "switches": {**checkpoint, "executor": executor}}
    yield {**common, "metric": "same_top1_pct", "value": found.same_top1_pct, "switches": checkpoint}


STUDY = Study(
    "qat_integers",
    {"smoke": Plan(50, ("lsq",)), "quick": Plan(200), "full": Plan()},
    points=points,
    open_bench=lambda run, _: data.load_or_embedded("cifar10", "test", n=run.plan.n_test),
    measure=measure,
)
