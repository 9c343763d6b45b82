"""The one mechanism of the studies: a plan gives points, points that share a bench are measured on it, rows are kept.

    STUDY = Study("qat", PLANS, points=points, open_bench=open_bench, measure=measure)
    STUDY.run("quick", methods=["lsq"], bits=[[2, 2]])                  # a notebook: the profile's plan, changed
    hq study qat --profile full --unit resnet20_lsq_w2a2_s0             # a batch engine: one unit, rows to a part file

A *plan* is a frozen dataclass, one a profile. A *point* is one measurement; its *key*, the columns that name it in the
rows, is its identity: what has a row is not measured again, so a killed run goes on where it stopped. A *bench* is the
network with its images, opened once for all points that share it. A *unit* is what a batch engine runs in one process.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any, Generic, TypeVar, get_type_hints

import filelock
import pandas as pd
import pydantic

from hq_lib.results import hints, paths, provenance, rows, store
from hq_lib.studies.bench import newest

SAY_EVERY_S = 10.0
SWITCH, CHANGED = "switches.", "changed"
Plan = TypeVar("Plan")
Bench = TypeVar("Bench")
Row = dict[str, Any]
Found = Row | tuple[str, Row]
"""What ``measure`` yields: a row of the study's own file, or (name of another file, its row)."""


class StudyError(ValueError):
    """A plan, unit or state of the code that a study cannot be run with; the message names it and the mend."""


def metric_rows(values: Mapping[str, float], **columns: Any) -> Iterator[Row]:
    """A row for each metric and its value, the other columns being equal; units are those of the metrics' names."""
    yield from ({**columns, "metric": metric, "value": value} for metric, value in values.items())


check_choice = partial(hints.check, error=StudyError)
"""Nothing, or ``StudyError`` for the first name that is not known: (study, kind, names, known)."""


@dataclass(frozen=True)
class Point:
    """One measurement, as data."""

    name: str
    """In words, unique within the study; what progress lines call it."""
    key: Row
    """The columns that identify its rows, protocol included; ``"switches.NAME"`` is one switch among others. Without
    "experiment" it is the study's."""
    what: Any = None
    """What ``measure`` has to know of it besides."""
    bench: Any = None
    """What has to be open to measure it; hashable."""
    unit: str = ""
    """The process it is measured in by a batch engine, a file name; "" = one of its own, called by its name."""
    after: tuple[str, ...] = ()
    """Units, of whatever study, whose result it stands on: a batch engine runs them first."""
    minutes: float = 1.0
    """Rough cost on one thread in profile full."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "unit", self.unit or self.name)

    def __getitem__(self, name: str) -> Any:
        """A column of its key or one of its switches; None where it has neither."""
        return {**self.key.get("switches", {}), **self.key}.get(name, self.key.get(SWITCH + name))


@dataclass(frozen=True)
class Run(Generic[Plan]):
    """One call of a study: what its functions go by."""

    study: str
    """Name of the study."""
    profile: str
    """smoke, quick or full."""
    plan: Plan
    """The profile's plan, with the caller's changes."""
    device: str = "cpu"
    """"cpu" or "cuda"."""
    part: Path | None = None
    """Folder that rows go to in place of the shared files; None = the shared files."""
    changed: tuple[tuple[str, Any], ...] = ()
    """Fields in ``Study.unkeyed`` that differ from the profile's: switch "changed" of every row, no part of a key."""

    @property
    def folder(self) -> Path:
        """Where the study keeps states and files of its own; git ignores it."""
        return paths.runs_dir(self.profile) / self.study

    def append(self, found: Iterable[tuple[str, Row]]) -> list[Row]:
        """Stores rows at once, each in the file of that name, provenance filled in; returns them."""
        files: dict[str, list[Row]] = {}
        for name, row in found:
            if self.changed:
                row = {**row, "switches": {**row.get("switches", {}), CHANGED: dict(self.changed)}}
            files.setdefault(name, []).append({**provenance.stamp(self.device), **row})
        for name, own in files.items():
            store.append(name, own, profile=self.profile, folder=self.part)
        return [row for own in files.values() for row in own]


@dataclass(frozen=True)
class Study(Generic[Plan, Bench]):
    """A study as data and three functions."""

    name: str
    """Its command and the CSV that it appends to."""
    plans: Mapping[str, Plan]
    """Profile -> plan."""
    points: Callable[[Plan], Sequence[Point]]
    """All points of a plan, those of one bench and unit adjoining; raises ``StudyError`` for what does not exist."""
    open_bench: Callable[[Run[Plan], Any], Bench | None]
    """The bench; None, after a line that says why, where this machine cannot have it: its points are n/r."""
    measure: Callable[[Run[Plan], Bench, Point], Iterator[Found]]
    """Metric, value (and whatever else differs from the key) of each row of a point."""
    gpu: bool = False
    """Whether it computes on the device it is given; another one stays on the CPU, and its rows say so."""
    unkeyed: tuple[str, ...] = ("n_test",)
    """Fields of the plan that change numbers and are in no key: a point is measured once, with what it was asked for
    first, and asked for otherwise it is said to be of other settings."""

    @property
    def folder(self) -> str:
        """The folder of ``studies`` that it lies in."""
        return self.points.__module__.split(".")[-2]

    def plan(self, profile: str, **changes: Any) -> Plan:
        """The profile's plan with some fields changed, lists as tuples; a change that is None leaves the profile's.

        Raises:
            StudyError: no such field (the nearest is named), one value where the plan has a list, or another kind.
        """
        plan: Any = self.plans[paths.check_profile(profile)]
        changes = {name: value for name, value in changes.items() if value is not None}
        hints_of = get_type_hints(type(plan))
        check_choice(self.name, "field", changes, [f.name for f in dataclasses.fields(plan)])
        for name, value in changes.items():
            if isinstance(getattr(plan, name), tuple) and not isinstance(value, list | tuple):
                raise StudyError(
                    f"{name} is a list, not {value!r}: write [{value}] (papermill: -y '{name}: [{value}]')"
                )
            changes[name] = self._typed(name, value, hints_of[name])
        stems = [Path(name).stem for name in changes.get("networks", ())]
        if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
            raise StudyError(
                f"networks of {self.name} has {twice[0]!r} twice, and rows know a file by its name: rename one"
            )
        return dataclasses.replace(plan, **changes)

    def _typed(self, name: str, value: Any, hint: Any) -> Any:
        """The value as the plan has it: lists as tuples, 2 as 2.0 where it has floats (they are one key)."""
        try:
            return pydantic.TypeAdapter(hint).validate_python(value)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = "".join(f"[{place}]" for place in first["loc"] if isinstance(place, int))
            raise StudyError(f"{name}{where} of {self.name} is {first['input']!r}: {first['msg']}") from None

    def run(
        self, profile: str, *, device: str = "cpu", unit: str | None = None, allow_dirty: bool = False, **changes: Any
    ) -> pd.DataFrame:
        """Measures every point that has no row yet; all rows of the study in this profile.

        Args:
            profile:     smoke, quick or full.
            device:      "cpu" or "cuda"; for a study without ``gpu`` the CPU, whatever is given.
            unit:        only this unit, and its rows into a part file of its own, which ``gather`` brings in.
            allow_dirty: in profile full, measure although tracked code differs from its commit; the rows say "-dirty".
            changes:     fields of the plan, see ``plan``.

        Raises:
            StudyError: see ``plan``; an unknown unit; uncommitted code in profile full.
        """
        plan = self.plan(profile, **changes)
        part = None if unit is None else self._part(profile, unit)
        run = self._run(profile, plan, device if self.gpu else "cpu", part)
        every = self.points(plan)
        if unit is not None:
            check_choice(f"profile {profile} of {self.name}", "unit", [unit], dict.fromkeys(p.unit for p in every))
        wanted = [point for point in every if unit in (None, point.unit)]
        with nullcontext() if run.part is None else _alone(run.part):
            todo = self._todo(run, wanted)
            if todo and profile == "full" and provenance.git_sha().endswith("-dirty") and not allow_dirty:
                raise StudyError(
                    f"{self.name}: tracked files differ from the commit, so {len(todo)} rows of profile full would "
                    "come from code that nobody can find: commit, or say --allow-dirty"
                )
            self._measure(run, todo)
        return self.rows(profile, getattr(plan, "networks", ()))

    def rows(self, profile: str, networks: Sequence[str] = ()) -> pd.DataFrame:
        """The rows of this profile that are there, of each of ``networks`` that is a path those of the file there."""
        return profile_rows(self.name, profile, networks=networks)

    def todo(self, profile: str, **changes: Any) -> list[Point]:
        """The points that have no row yet."""
        plan = self.plan(profile, **changes)
        return self._todo(self._run(profile, plan), self.points(plan))

    def _run(self, profile: str, plan: Plan, device: str = "cpu", part: Path | None = None) -> Run[Plan]:
        asked = {name: getattr(plan, name) for name in self.unkeyed if hasattr(plan, name)}
        changed = (each for each in asked.items() if each[1] != getattr(self.plans[profile], each[0]))
        return Run(self.name, profile, plan, device, part, tuple(changed))

    def units(self, profile: str, **changes: Any) -> list[Row]:
        """The units with something to measure, as plain data: study, unit, n_points, minutes, after, gpu."""
        todo = self.todo(profile, **changes)
        found = []
        for unit in dict.fromkeys(point.unit for point in todo):
            own = [point for point in todo if point.unit == unit]
            told = {"study": self.name, "unit": unit, "n_points": len(own), "gpu": self.gpu}
            after = sorted({earlier for point in own for earlier in point.after})
            found.append({**told, "minutes": round(sum(point.minutes for point in own), 1), "after": after})
        return found

    def gather(self, profile: str) -> int:
        """Brings the rows of all part files into the shared ones, then removes the parts; the number of rows.

        A unit that is being measured keeps its part until it has ended and rows are gathered again.
        """
        n = 0
        for part in sorted(p for p in self._part(profile, "").glob("*") if p.is_dir()):
            with _alone(part, wait=False) as mine:
                for file in sorted(part.glob("*.csv")) if mine else []:
                    found = store.read_file(file).to_dict("records")
                    store.append(file.stem, found, profile=profile)
                    n += len(found)
                if mine:
                    shutil.rmtree(part)
        return n

    def _part(self, profile: str, unit: str) -> Path:
        return paths.runs_dir(profile) / self.name / "parts" / unit

    def _todo(self, run: Run[Plan], wanted: Sequence[Point]) -> list[Point]:
        parts = sorted(self._part(run.profile, "").glob(f"*/{self.name}.csv"))
        have = [store.read(self.name, profile=run.profile), *(store.read_file(part) for part in parts)]
        lines = [_unmarked(row) for frame in have for row in frame.to_dict("records")]
        asked, others = json.dumps(dict(run.changed), sort_keys=True), dict[str, int]()

        @cache
        def known(columns: tuple[str, ...]) -> dict[tuple[Any, ...], str]:
            return {tuple(_cell(row, column) for column in columns): changed for row, changed in lines}

        def is_new(point: Point) -> bool:
            key = {"experiment": self.name, **point.key, "profile": run.profile}
            rows.check_columns(c for c in key if not c.startswith(SWITCH))
            cells = (value if c.startswith(SWITCH) else rows.clean_cell(c, value) for c, value in key.items())
            changed = known(tuple(key)).get(tuple(cells))
            if changed is not None and changed != asked:
                others[changed] = others.get(changed, 0) + 1
            return changed is None

        todo = [point for point in wanted if is_new(point)]
        for changed, n in others.items():
            print(f"{self.name}: {n:,} points have rows of {_told(changed)}, not of {_told(asked)}, and are not "
                  "measured again: delete those rows, or set HQ_OUT to another folder", flush=True)  # fmt: skip
        return todo

    def _measure(self, run: Run[Plan], todo: Sequence[Point]) -> None:
        started = said = time.perf_counter()
        n = 0
        for needed, group in groupby(todo, key=lambda point: point.bench):
            bench = self.open_bench(run, needed)
            for point in group:
                n += 1
                if bench is None:
                    continue
                measured = self._measure_point(run, bench, point)
                if n in (1, len(todo)) or time.perf_counter() - said > SAY_EVERY_S:
                    said = time.perf_counter()
                    print(f"[{n}/{len(todo)}, {said - started:.0f} s] {point.name}: {_shown(measured)}", flush=True)

    def _measure_point(self, run: Run[Plan], bench: Bench, point: Point) -> list[Row]:
        columns = {column: value for column, value in point.key.items() if not column.startswith(SWITCH)}
        started = time.perf_counter()
        found = [(self.name, item) if isinstance(item, dict) else item for item in self.measure(run, bench, point)]
        columns = {"experiment": self.name, **columns, "seconds": round(time.perf_counter() - started, 3)}
        # the point's own rows last: they say that it is done
        ordered = sorted(found, key=lambda item: item[0] == self.name)
        return run.append((name, {**columns, **row}) for name, row in ordered)


def profile_rows(name: str, profile: str, *, earlier: bool = True, networks: Sequence[str] = ()) -> pd.DataFrame:
    """The rows of one file that belong to this very profile, of each network those on its newest checkpoint.

    That is the file committed under its name, or the one at its path in ``networks``.

    What units have measured and nobody has gathered yet is among them: a unit may stand on another one's rows. Such a
    unit takes none of an ``earlier`` network, which tables show in place of missing ones.
    """
    parts = sorted(paths.runs_dir(profile).glob(f"*/parts/*/{name}.csv"))
    found = pd.concat([store.read(name, profile=profile), *(store.read_file(part) for part in parts)])
    found = found.drop_duplicates(list(rows.KEY), keep="last")
    mine = found.loc[found["profile"] == profile]
    return newest(mine, name, earlier=earlier, networks=networks).reset_index(drop=True)


@contextmanager
def _alone(part: Path, *, wait: bool = True) -> Iterator[bool]:
    """The unit of this part is this process's while the block lasts, however that ends; without ``wait``, whether.

    A batch engine that was killed and started again may begin a unit whose first job still runs: the second one waits,
    and then finds its rows there.
    """
    part.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(part.with_name(f".{part.name}.lock"))
    try:
        held = lock.acquire(timeout=0)
    except filelock.Timeout:
        if not wait:
            yield False
            return
        print(f"{part.name}: another process measures it, waiting for it to end", flush=True)
        held = lock.acquire()
    with held:
        yield True


def _unmarked(row: dict[Any, Any]) -> tuple[dict[Any, Any], str]:
    """The row without the mark of ``Run.changed``, and the mark."""
    switches = json.loads(row["switches"])
    changed = json.dumps(switches.pop(CHANGED, {}), sort_keys=True)
    return {**row, "switches": rows.clean_cell("switches", switches)} if changed != "{}" else row, changed


def _told(changed: str) -> str:
    return ", ".join(f"{name}={value}" for name, value in json.loads(changed).items()) or "the profile's own settings"


def _cell(row: Mapping[Any, Any], column: str) -> Any:
    if column.startswith(SWITCH):
        return json.loads(row["switches"]).get(column.removeprefix(SWITCH))
    return row[column]


def _shown(measured: Sequence[Row]) -> str:
    """The first few numbers of a point, for a line of progress."""
    units = [row.get("unit") or rows.unit_of(row["metric"]) for row in measured[-3:]]
    told = zip(measured[-3:], units, strict=True)
    return ", ".join(f"{row['metric']} {row['value']:.5g} {unit}".removesuffix(" 1") for row, unit in told)
