"""The command line: ``hq VERB``, or ``python -m hq_lib VERB``."""

import json
import sys
from typing import Annotated, Any

import typer
import yaml

from hq_lib import studies
from hq_lib.results import paths
from hq_lib.results.hints import nearest

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.callback()
def _verbs() -> None:
    """From float CNNs to low-bit, integer-only and analog-crossbar inference."""


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="The study; `hq study list` names them all.")],
    profile: Annotated[str, typer.Option(help="smoke, quick or full.")] = "quick",
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
    if name == "all" and gather:
        typer.echo(f"{sum(one.gather(profile) for one in known.values())} rows brought in")
        return
    if name not in known:
        raise typer.BadParameter(f"no study {name!r}: choose one of {', '.join(known)}{nearest(name, known)}")
    paths.check_profile(profile)
    changes = dict(_assignment(text) for text in set_ or [])
    if todo:
        for line in known[name].units(profile, **changes):
            typer.echo(json.dumps(line))
    elif gather:
        typer.echo(f"{known[name].gather(profile)} rows brought in")
    else:
        rows = known[name].run(profile, device=device, unit=unit, allow_dirty=allow_dirty, **changes)
        typer.echo(f"{len(rows)} rows in {paths.results_dir(profile) / name}.csv")


def _assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"{text!r}: write key=value, the value as YAML")
    return key, yaml.safe_load(value)


def main() -> None:
    """The console script; an error of the library is one line and exit code 1."""
    try:
        app()
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
