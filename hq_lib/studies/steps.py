"""What the command line's verbs do, each from a ``Configuration`` to a file; notebooks call the same."""

import dataclasses
import json
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from hq_lib import graph, models, ptq
from hq_lib.crossbar import bench, profiles
from hq_lib.data import DataSpec, ImageSet, batches, normalize
from hq_lib.deploy import ENDINGS, export, fpga
from hq_lib.deploy.c.runtime import meta_of
from hq_lib.deploy.fpga import exporter
from hq_lib.graph import QUANTIZER_SUFFIX
from hq_lib.graph.folding import fold_bn
from hq_lib.integer import IntegerModel, LowerError, RecordError, lower, round_biases
from hq_lib.integer import load as load_integers
from hq_lib.integer import run as run_integers
from hq_lib.ptq import selection
from hq_lib.results import provenance
from hq_lib.results.hints import check_known
from hq_lib.studies import inputs, kept, methods
from hq_lib.studies.configuration import EQUALIZE, FLOAT, HYBRID, NORMS, Configuration
from hq_lib.studies.hybrid.cells import fit_early, fit_late
from hq_lib.studies.integer_export.executors import BATCH
from hq_lib.studies.integer_export.executors import ENDINGS as FILES
from hq_lib.studies.integer_export.executors import opened as executor
from hq_lib.studies.ptq.recipes import RANGE_IMAGES, fit_recipe
from hq_lib.studies.qat.study import quantized as calibrated
from hq_lib.training import evaluate, fit, machine
from hq_lib.training.evaluation import evaluation_of, warn_of_fewer_classes
from hq_lib.training.recipes import RECIPES as FLOAT_RECIPES

QUANTIZING = ("bits", "lists", "policy", "corrections", "leaf_modules", "on_refusal")
CALIBRATING = ("hybrid", "manifest", "strategy", "metric")
"""Keys of how a network is quantized, and of what is calibrated on which images."""


def trained(run: Configuration) -> tuple[Path, float]:
    """(file, test accuracy in percent) after float training or quantization-aware training; resumes a killed run."""
    with machine.joined():
        return _trained_float(run) if run.method == FLOAT else _trained_quantized(run)


def _trained_float(run: Configuration) -> tuple[Path, float]:
    run.refuse("hq train", *QUANTIZING, *CALIBRATING)
    _no_teacher(run)
    target, (dataset, config, n) = run.network_file(), methods.float_training(run)
    net, source = inputs.network(run) if run.weights else (None, {})
    source = {**source, "dataset": dataset}
    train, val = inputs.images(run, "train", source, n or 0), inputs.validation(run, source)
    if net is None:
        options = FLOAT_RECIPES[run.model].options if run.model in FLOAT_RECIPES else {}
        net, built = inputs.built(run, **options, n_classes=train.spec.n_classes, in_channels=train.spec.in_shape[0])
        source |= built
    done = fit(net.to(run.device), train, val, config, kept.folder(run, net, source, train))
    machine.end_unless_first()
    test = inputs.images(run, "test", {**source, "images": dataclasses.asdict(train.spec)}, run.n_test)
    score = evaluate(net.eval(), test)
    facts = {"config": dataclasses.asdict(done.config), "n_train": len(train), "n_test": score.n}
    record = kept.record(run, source, test, acc_pct={"test": score.acc_pct}, **facts, **provenance.stamp(run.device))
    models.write_checkpoint(target, net.state_dict(), record)
    return target, score.acc_pct


def _trained_quantized(run: Configuration) -> tuple[Path, float]:
    run.network_file()
    run.refuse("hq train", "corrections", *(() if run.method == HYBRID else CALIBRATING))
    net, source = inputs.network(run)
    recipe = methods.qat(run, net)
    train, val = inputs.images(run, "train", source, recipe.n_train or 0), inputs.validation(run, source)
    folder = kept.folder(run, net, source, train)
    if run.method == HYBRID:
        _no_teacher(run)
        few = inputs.calibration(run, source)
        x = normalize(few.images, few.spec).to(run.device)
        qnet = graph.quantize(net.to(run.device), recipe.policy, x[:1], **run.tracing)
        done = fit_early(qnet, x, train, val, recipe.config, folder)
        fit_late(qnet, x, run.hybrid.get("ranges", "mse"))
    else:
        qnet = calibrated(net, recipe, train, seed=run.seed, n_calib=run.n_calib, **run.tracing).to(run.device)
        teacher = net.to(run.device) if recipe.config.distill else None
        done = fit(qnet, train, val, recipe.config, folder, teacher=teacher)
    machine.end_unless_first()
    more = {"config": dataclasses.asdict(done.config if done else recipe.config), "n_train": len(train)}
    return _saved(run, qnet, source, form="trainable" if run.method != HYBRID else "frozen", **more)


def _no_teacher(run: Configuration) -> None:
    if run.protocol.get("distill"):
        raise ValueError(f"protocol.distill: with method {run.method!r} no float network teaches; leave it out")


def selected(run: Configuration) -> Path:
    """The manifest of the chosen calibration images."""
    target = run.manifest_file()
    selection.write(inputs.selected(run), target)
    return target


def quantized(run: Configuration) -> tuple[Path, float]:
    """(network file, test accuracy in percent) after post-training quantization; a killed reconstruction goes on.

    The file's record keeps a line of each unit that was reconstructed (``log``).
    """
    run.network_file()
    run.refuse("hq quantize", "hybrid")
    net, source = inputs.network(run)
    recipe, policy = methods.ptq(run, net)
    few = inputs.calibration(run, source)
    folder = kept.folder(run, net, source, few) / "reconstruction"
    x = normalize(few.images, few.spec).to(run.device)
    net = net.to(run.device)
    if EQUALIZE in run.corrections:
        net = ptq.equalize(fold_bn(net, x[:1], **run.tracing), x[:1])
    qnet = graph.quantize(net, policy, x[:1], **run.tracing)
    settings = {"seed": run.seed, "folder": folder, **run.protocol}
    log = [str(unit) for unit in fit_recipe(qnet, x, recipe, progress=partial(print, flush=True), **settings)]
    if NORMS in run.corrections:
        ptq.reestimate_norms(qnet, x.split(RANGE_IMAGES))
    manifest = {"manifest": run.manifest} if run.manifest else {}
    made = _saved(run, qnet, source, form="frozen", n_calib=len(few), log=log, **manifest)
    shutil.rmtree(folder.parent, ignore_errors=True)  # of finished units: what they learned is in the file
    return made


def _saved(
    run: Configuration, qnet: nn.Module, source: dict[str, Any], *, form: Any, **more: Any
) -> tuple[Path, float]:
    test = inputs.images(run, "test", source, run.n_test)
    if form == "frozen":
        try:
            round_biases(qnet, images=test.spec)  # type: ignore[arg-type]
        except (LowerError, RecordError) as error:
            print(f"biases stay real numbers, as the network has no integer form: {error}", flush=True)
    score = evaluate(qnet, test)
    record = kept.record(run, source, test, acc_pct={"test": score.acc_pct}, n_test=score.n, **more)
    return graph.save(qnet, run.target(), form=form, record=record), score.acc_pct


def tested(run: Configuration, file: Path, *, integer: bool) -> Iterator[str]:
    """Lines of accuracy of a network file, or of an exported one (.npz, .hqm, .onnx), on test images.

    With ``integer`` also of its integers, and of the fake-quantized network with their biases: the two that must agree.
    """
    if file.suffix != ".safetensors":
        kinds = {f".{ending}": kind for kind, ending in FILES.items()}
        check_known(file.suffix, [".safetensors", *kinds], f"ending of {file.name}")
        test = inputs.images(run, "test", _image_record(_meta(file)), run.n_test)
        yield _line(kinds[file.suffix], _accuracy(executor(kinds[file.suffix], file), test), test)
        return
    net, record = inputs.opened(run, file)
    test = inputs.images(run, "test", record, run.n_test)
    yield _line("fake_quant" if "policy" in record else "float", evaluate(net.to(run.device), test).acc_pct, test)
    if integer:
        imodel = _lowered(run, file, net.cpu(), record, test.spec)
        round_biases(net, images=test.spec)  # type: ignore[arg-type]
        yield _line("fake_quant, integer biases", evaluate(net, test).acc_pct, test)
        yield _line("integers", _accuracy(lambda x: run_integers(imodel, x), test), test)


def exported(run: Configuration, file: Path, to: str) -> Path:
    """The file (fpga: folder) with the integers of a network file, in format ``to``; without ``output`` in this folder.

    A float network becomes seed 002's files and memory images, with "fpga" alone.
    """
    check_known(to, ENDINGS, "format of hq export")
    target = Path(run.output or file.stem + ENDINGS[to])
    net, record = inputs.opened(run, file)
    spec = inputs.normalization(run, record)
    if to == "fpga" and "policy" not in record:
        example = torch.zeros(1, *spec.in_shape)
        if any(isinstance(module, nn.ReLU) for module in net.modules()):  # whose ranges come from images
            example = normalize(inputs.images(run, "train", record, RANGE_IMAGES).images, spec)
        made = exporter.export(net, example, mean=spec.mean, std=spec.std)
        if wide := fpga.int32_overflows(made):
            print(f"{', '.join(wide)}: accumulator times multiplier may leave int32, which wraps in seed 002's C")
        fpga.write_net(made, target, file.stem)
        return fpga.write_images(fpga.record_of(made, spec.in_shape), target).parent
    if to in ("board", "fpga") and run.requantizer == "float32":
        print(f"{to}: multipliers are float32 numbers; for integers alone export with --set requantizer=fixed")
    image = inputs.images(run, "test", record, 1).images[0].contiguous().numpy() if to == "board" else None
    return export(_lowered(run, file, net, record, spec), target, to, image=image)


def on_crossbar(run: Configuration, file: Path, **given: Any) -> tuple[Path, list[str]]:
    """(folder of what came out, lines that say it) of a network's layers on arrays; see ``crossbar.bench``.

    A replay takes layers and numbers of images from the folder, unless they are given.
    """
    counted = {"n_test": run.n_test} if run.n_test else {}
    if counted and run.crossbar.get("n_test", run.n_test) != run.n_test:
        raise ValueError(f"n_test is {run.n_test}, and {run.crossbar['n_test']} in crossbar: give one of them")
    device = given.get("device")
    given = {"engine": "sim", "folder": f"{file.stem}_crossbar", "seed": run.seed, **counted, **run.crossbar, **given}
    past = Path(given["folder"]) / "summary.json"
    known = json.loads(past.read_text()) if given["engine"] == "replay" and past.is_file() else {"layers": ["*"]}
    entries: dict[str, Any] = {key: known[key] for key in ("layers", "n_test", "n_calib") if key in known} | given
    layers = entries["layers"] if isinstance(entries["layers"], list | tuple) else [str(entries["layers"])]
    plan = bench.Plan(**{**entries, "folder": Path(entries["folder"]), "layers": tuple(layers)})
    if device and plan.engine != "sim":
        raise ValueError(f"device is {device!r}: engine {plan.engine!r} has cells of its own; leave device out")
    if file.suffix == ".npz":
        imodel = load_integers(file)
        record = _image_record(imodel.meta)
    else:
        net, record = inputs.opened(run, file)
        imodel = _lowered(run, file, net, record, inputs.normalization(run, record))
    test = inputs.images(run, "test", record, plan.n_test)
    train = inputs.images(run, "train", record, max(plan.n_calib, 1))
    outcome = bench.run(plan, imodel, test, train)
    warn_of_fewer_classes(test, outcome.logits.shape[1])
    found = outcome.summary
    clipped = "{n_saturated:,} counts at the end of the bench's range: its converters clip, drive fewer rows or bits"
    again = "written again after their gains and offsets were fitted, which fit where writing is exact alone: "
    layers_again = list(found.get("written_again", ()))
    more = f" and {len(layers_again) - 3} more" if len(layers_again) > 3 else ""
    rows = "{n_measured:,} rows measured now, {n_recorded:,} answered from the record"
    written = "{tiles_needed} tiles on a bench of {n_tiles}: {n_writes} writes in {write_s:.1f} s"
    fitted = plan.engine == "sim" and profiles.holds_cells(plan.device)
    return plan.folder, [
        *([profiles.fit_report(plan.device)[1].round(3).to_string(index=False)] if fitted else []),
        outcome.layers.to_string(index=False),
        *([rows.format(**found)] if "n_measured" in found else []),
        *([written.format(**found)] if "n_writes" in found else []),
        *([clipped.format(**found)] if found.get("n_saturated") else []),
        *([again + ", ".join(layers_again[:3]) + more] if layers_again else []),
        _line("integers, exact", found["exact_acc_pct"], test),
        f"{_line('on the arrays', found['acc_pct'], test)}; logits off by {100 * found['logit_error']:.2f} %",
    ]


def _lowered(run: Configuration, file: Path, net: nn.Module, record: dict[str, Any], spec: DataSpec) -> IntegerModel:
    if "policy" not in record:
        raise ValueError(f"{file.name} holds a float network: quantize it first, hq quantize --set "
                         f"{shlex.quote(f'weights={file}')}")  # fmt: skip
    assert isinstance(net, fx.GraphModule)
    image = next(node for node in net.graph.nodes if node.op == "placeholder")
    if not any(str(reader.target).endswith(QUANTIZER_SUFFIX) for reader in image.users):
        print("this network takes its image in float, integers round it to 8 bits: the two may differ", flush=True)
    return lower(net, requantizer=run.requantizer, images=spec)  # type: ignore[arg-type]


def _meta(file: Path) -> Mapping[str, Any]:
    """What an exported file says of the record that it was made from."""
    if file.suffix == ".npz":
        return load_integers(file).meta
    if file.suffix == ".hqm":
        return meta_of(file)
    from hq_lib.deploy import onnx  # of the extra "export"

    return onnx.meta_of(file)


def _image_record(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Data set, size, mean and standard deviation as a network's record has them."""
    image = meta.get("image")
    return {"dataset": image.get("name"), "images": image} if isinstance(image, Mapping) else {}


def _accuracy(logits: Callable[[np.ndarray], np.ndarray], test: ImageSet) -> float:
    found = [logits(x.contiguous().numpy()) for x, _ in batches(test, BATCH)]
    warn_of_fewer_classes(test, found[0].shape[1])
    return evaluation_of(torch.from_numpy(np.concatenate(found)), test.labels).acc_pct


def _line(what: str, acc_pct: float, test: ImageSet) -> str:
    return f"{what}: {acc_pct:.2f} % of {len(test):,} test images of {test.spec.name}"
