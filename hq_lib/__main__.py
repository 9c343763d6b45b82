"""The command line: ``hq VERB``, or ``python -m hq_lib VERB``.

Every verb takes ``--config run.yaml`` and ``--set key=value``, key by key what the file says; the keys are those of
``studies.configuration.Configuration``. Exit code 0: done; 1: refused, in one line; 2: a word of the line is wrong.
"""

import importlib
import json
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from hq_lib import studies
from hq_lib.results import paths
from hq_lib.results.hints import check_known, nearest
from hq_lib.results.settings import plain

app = typer.Typer(  # with markup on, the [pact] of an example would be taken for a colour
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, help=__doc__
)
Config = Annotated[Path | None, typer.Option("--config", help="YAML file of the run.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="A key of it, as n_calib=256 or policy.bn=fold.")]
Model = Annotated[str | None, typer.Option(help="Network by name.")]
Net = Annotated[str | None, typer.Option(help="A network of one's own, module:Class, from the current folder.")]
Method = Annotated[str | None, typer.Option(help="How it is quantized; a wrong name lists them.")]
Bits = Annotated[str | None, typer.Option(help="Weights/activations, as 4/4.")]
Data = Annotated[str | None, typer.Option(help="Data set; default: what the network was trained on.")]
Root = Annotated[str | None, typer.Option(help="Folder of pictures (train/ or sel/ and val/, or class folders).")]
Tests = Annotated[int | None, typer.Option(help="Test images; default all.")]
Output = Annotated[str | None, typer.Option(help="File to write.")]
File = Annotated[Path, typer.Argument(help="A file of hq train, quantize or export.")]


@app.callback()
def _verbs() -> None:
    """From float CNNs to low-bit, integer-only and analog-crossbar inference."""


@app.command()
def train(
    config: Config = None, set_: Set = None, model: Model = None, net: Net = None, method: Method = None,
    bits: Bits = None, data: Data = None, root: Root = None, output: Output = None,
) -> None:  # fmt: skip
    """Train a network in float (--method float), or through its quantizers (pact, lsq, dsq, ..., hybrid).

    Killed? The same command goes on where it stopped. Several GPUs: torchrun --nproc_per_node=4 -m hq_lib train ...

    Example: hq train --model resnet20 --method pact --bits 4/4 --set protocol.epochs=10
    """
    run, steps = _run(locals())
    file, acc_pct = steps.trained(run)
    following = f"hq test {_typed(file)}" if run.method != "float" else f"hq quantize --set {_typed(f'weights={file}')}"
    _wrote(file, run, acc_pct, following + _again(run, "net", "root"))


@app.command()
def select(
    config: Config = None, set_: Set = None, model: Model = None, data: Data = None, root: Root = None,
    output: Output = None,
    n_calib: Annotated[int | None, typer.Option("--n", help="Images.")] = None,
    strategy: Annotated[str | None, typer.Option(help="lowest, highest, trimmed or random.")] = None,
    metric: Annotated[str | None, typer.Option(help="Score of an image: tv, entropy, ...")] = None,
) -> None:  # fmt: skip
    """Choose calibration images, and write them as a manifest with their hashes.

    Example: hq select --data cifar10 --n 256 --strategy trimmed --metric tv --output smooth.json
    """
    run, steps = _run(locals())
    file = steps.selected(run)
    same = f" --config {_typed(config)}" if config else ""
    network = "net" if run.net else "model"
    weights = f" --set {_typed(f'weights={run.weights}')}" if run.weights else ""
    manifest = _typed(f"manifest={file}")
    _wrote(file, run, None, f"hq quantize{same} --set {manifest}{weights}{_again(run, network, 'root')}")


@app.command()
def quantize(
    config: Config = None, set_: Set = None, model: Model = None, net: Net = None, method: Method = None,
    bits: Bits = None, data: Data = None, root: Root = None, n_test: Tests = None, output: Output = None,
) -> None:  # fmt: skip
    """Quantize a trained network without training: ranges (minmax, mse, percentile, aciq), adaround, brecq, qdrop.

    Example: hq quantize --model resnet20 --method qdrop --bits 4/4 --output net.safetensors
    """
    run, steps = _run(locals())
    file, acc_pct = steps.quantized(run)
    own = _again(run, "net", "root")
    _wrote(file, run, acc_pct, f"hq test {_typed(file)} --integer{own}; hq export {_typed(file)} --to c{own}")


@app.command("test")
def accuracy(
    file: File, config: Config = None, set_: Set = None, net: Net = None, data: Data = None, root: Root = None,
    n_test: Tests = None, integer: Annotated[bool, typer.Option(help="In integers as well.")] = False,
) -> None:  # fmt: skip
    """Accuracy of a network file, float or quantized, or of an exported one (.npz, .hqm, .onnx), on test images.

    Example: hq test net.safetensors --integer
    """
    run, steps = _run(locals())
    kind = ""
    for line in steps.tested(run, file, integer=integer):
        kind = line.partition(":")[0]
        typer.echo(line)
    following = f"hq export {_typed(file)} --to c{_again(run, 'net', 'root')}"
    if kind == "float":
        following = f"hq quantize --set {_typed(f'weights={file}')}{_again(run, 'net', 'root')}"
    elif file.suffix != ".safetensors":
        following = f"hq crossbar {_typed(file)}{_again(run, 'root')}" if file.suffix == ".npz" else "hq export --help"
    typer.echo(f"nothing was written; next: {following}")


@app.command()
def export(
    file: File, to: Annotated[str, typer.Option(help="c, onnx, npz, board or fpga.")], config: Config = None,
    set_: Set = None, net: Net = None, root: Root = None, output: Output = None,
) -> None:  # fmt: skip
    """Write a network's integers for C (c: a container; board: sources), ONNX, NumPy, or an FPGA's memories.

    A float chain with ReLU1, or ReLU and training images, becomes seed 002's files with --to fpga. With
    --set requantizer=fixed there are no floats in the arithmetic.

    Example: hq export net.safetensors --to onnx
    """
    run, steps = _run(locals())
    made = steps.exported(run, file, to)
    test = f"hq test {_typed(made)}{_again(run, 'root')}"
    following = {"fpga": "its manifest.json says what each file is", "board": f"make -C {_typed(made)} run"}
    following["c"] = f"{test}; --to board: sources that build as they are"
    _wrote(made, run, None, following.get(to, test))


@app.command()
def crossbar(
    file: File, config: Config = None, set_: Set = None, net: Net = None, data: Data = None, root: Root = None,
    n_test: Annotated[int | None, typer.Option(help="Test images; default 20, of a replay those recorded.")] = None,
    engine: Annotated[str | None, typer.Option(help="sim, rehearsal, tcp (a bench) or replay.")] = None,
    device: Annotated[str | None, typer.Option(help="Kind of cell of sim: rram, pcm_drift, ..., or a .csv.")] = None,
    layers: Annotated[str | None, typer.Option(help="Layers on the arrays, by name or pattern, with commas.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where the record lies; goes on from what is there.")] = None,
    record: Annotated[bool | None, typer.Option(help="Record a simulation too, as a bench always is.")] = None,
) -> None:  # fmt: skip
    """Put layers of a network on analog arrays: simulated, rehearsed, on a bench, or replayed from the record.

    Example: hq crossbar net.safetensors --device rram --layers '*' --n-test 100
    """
    given = {"engine": engine, "device": device, "folder": folder, "record": record}
    given |= {"layers": None if layers is None else [name.strip() for name in layers.split(",")]}
    run, steps = _run({key: value for key, value in locals().items() if key not in given})
    made, lines = steps.on_crossbar(run, file, **{key: value for key, value in given.items() if value is not None})
    for line in lines:
        typer.echo(line)
    engine, folder = ("replay", made) if any(made.glob("part_*")) else ("rehearsal", Path(f"{made}_rehearsal"))
    following = f"hq crossbar {_typed(file)} --engine {engine} --folder {_typed(folder)}"
    _wrote(made, run, None, following + _again(run, "net", "root"))


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="The study; `hq study list` names them all.")],
    profile: Annotated[str, typer.Option(help="smoke, quick or full.")] = "quick",
    config: Annotated[Path | None, typer.Option("--config", help="YAML file with fields of the plan.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="A field of the plan, as bits='[[2,2]]'.")] = None,
    unit: Annotated[str | None, typer.Option(help="Only this unit; its rows go to a part file.")] = None,
    todo: Annotated[bool, typer.Option("--list", help="Print what is not measured yet, a JSON line a unit.")] = False,
    gather: Annotated[bool, typer.Option(help="Bring in the rows of all part files.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    allow_dirty: Annotated[bool, typer.Option(help="Profile full from uncommitted code; the rows say so.")] = False,
) -> None:
    """Measure what a study has no row for yet.

    Example: hq study qat --profile quick --set methods='[pact]' --set bits='[[4,4]]'
    """
    known = studies.every()
    if name == "list":
        typer.echo("\n".join(known))
        return
    if name not in known:
        raise typer.BadParameter(f"no study {name!r}: choose one of {', '.join(known)}{nearest(name, known)}")
    paths.check_profile(profile)
    check_known(device.partition(":")[0], ("cpu", "cuda"), "device")
    alone = [("--list", todo), ("--gather", gather), ("--unit", unit)]
    if len(said := [option for option, value in alone if value]) > 1:
        raise typer.BadParameter(f"{' and '.join(said)} do not go together: give one of them")
    if gather and (config or set_):
        raise typer.BadParameter("--gather brings in whatever was measured: leave --config and --set out")
    written = importlib.import_module("hq_lib.studies.configuration").mapping(config) if config else {}
    changes = {**written, **dict(_assignment(text) for text in set_ or [])}
    if own := {"profile", "device", "unit"} & set(changes):
        raise typer.BadParameter(f"{own.pop()} is no field of a plan: it has an option of its own, --help")
    if todo:
        for line in known[name].units(profile, **changes):
            typer.echo(json.dumps(line))
    elif gather:
        typer.echo(f"{known[name].gather(profile)} rows brought in")
    else:
        rows = known[name].run(profile, device=device, unit=unit, allow_dirty=allow_dirty, **changes)
        typer.echo(f"{len(rows)} rows in {paths.results_dir(profile) / name}.csv")


def _run(given: dict[str, Any]) -> tuple[Any, ModuleType]:
    """(the ``Configuration``, module ``studies.steps``): the file, then ``--set``, then the options that were given.

    Of a verb's arguments those are taken that a configuration has keys for.
    """
    configuration = importlib.import_module("hq_lib.studies.configuration")  # torch: only where a step is run
    changes = dict(_assignment(text) for text in given["set_"] or [])
    changes |= {key: value for key, value in given.items() if key in configuration.KEYS and value is not None}
    if given.get("bits") is not None:
        changes["bits"] = [plain(bits) for bits in given["bits"].split("/")]
    return configuration.read(given["config"], changes), importlib.import_module("hq_lib.studies.steps")


def _again(run: Any, *keys: str) -> str:
    """The options of a run that the next command needs as well."""
    return "".join(f" --{key} {_typed(getattr(run, key))}" for key in keys if getattr(run, key))


def _typed(word: object) -> str:
    """A word of a command as a shell takes it."""
    return shlex.quote(str(word))


def _wrote(file: Path, run: Any, acc_pct: float | None, following: str) -> None:
    images = f"{run.n_test:,} test images" if run.n_test else "the test images"
    accuracy = "" if acc_pct is None else f", {acc_pct:.2f} % of {images}"
    size = f", {file.stat().st_size / 1024:,.0f} KiB" if file.is_file() else ""
    typer.echo(f"wrote {file}{size}{accuracy}; next: {following}")


def _assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"{text!r}: write key=value, the value as YAML")
    return key, plain(value)


def main() -> None:
    """The console script; an error of the library is one line and exit code 1."""
    try:
        app()
    except (ValueError, OSError, RuntimeError, ArithmeticError, ImportError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
