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
from types import NoneType
from typing import Any, Generic, TypeVar, get_args, get_type_hints

import filelock
import pandas as pd

from hq_lib.results import hints, paths, provenance, rows, store
from hq_lib.studies.bench import newest

SAY_EVERY_S = 10.0
SWITCH = "switches."
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

    @property
    def folder(self) -> Path:
        """Where the study keeps states and files of its own; git ignores it."""
        return paths.runs_dir(self.profile) / self.study

    def append(self, found: Iterable[tuple[str, Row]]) -> list[Row]:
        """Stores rows at once, each in the file of that name, provenance filled in; returns them."""
        files: dict[str, list[Row]] = {}
        for name, row in found:
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
            kinds = [kind for kind in get_args(hints_of[name]) or (hints_of[name],) if kind is not NoneType]
            plain = all(kind in (int, float, str) for kind in kinds)
            if plain and not isinstance(value, (*kinds, *([int] if float in kinds else []))):
                raise StudyError(f"{name} of {self.name} is {value!r}: a {kinds[0].__name__} is needed")
        return dataclasses.replace(plan, **{name: _as_tuple(value) for name, value in changes.items()})

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
        run = Run(self.name, profile, plan, device if self.gpu else "cpu", part)
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
        return self.rows(profile)

    def rows(self, profile: str) -> pd.DataFrame:
        """The rows of this profile that are there."""
        return profile_rows(self.name, profile)

    def todo(self, profile: str, **changes: Any) -> list[Point]:
        """The points that have no row yet."""
        plan = self.plan(profile, **changes)
        return self._todo(Run(self.name, profile, plan), self.points(plan))

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
        have = store.read(self.name, profile=run.profile).to_dict("records")
        have += [] if run.part is None else store.read_file(run.part / f"{self.name}.csv").to_dict("records")

        @cache
        def known(columns: tuple[str, ...]) -> dict[tuple[Any, ...], set[int]]:
            found: dict[tuple[Any, ...], set[int]] = {}
            for row in have:
                found.setdefault(tuple(_cell(row, column) for column in columns), set()).add(row["n_test"])
            return found

        asked, others = getattr(run.plan, "n_test", None), set()
        asked = None if asked == getattr(self.plans[run.profile], "n_test", None) else asked

        def is_new(point: Point) -> bool:
            key = {"experiment": self.name, **point.key, "profile": run.profile}
            rows.check_columns(c for c in key if not c.startswith(SWITCH))
            cells = (value if c.startswith(SWITCH) else rows.clean_cell(c, value) for c, value in key.items())
            images = known(tuple(key)).get(tuple(cells), set())
            if images and asked not in {None, *images}:
                others.update(images)
            return not images

        todo = [point for point in wanted if is_new(point)]
        if others:
            told = ", ".join(f"{n:,}" for n in sorted(others))
            print(f"{self.name}: n_test={asked:,} is asked for; points with rows on {told} images are not measured "
                  "again: delete those rows, or set HQ_OUT to another folder", flush=True)  # fmt: skip
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


def profile_rows(name: str, profile: str, *, earlier: bool = True) -> pd.DataFrame:
    """The rows of one file that belong to this very profile, of each network those on its newest checkpoint.

    What units have measured and nobody has gathered yet is among them: a unit may stand on another one's rows. Such a
    unit takes none of an ``earlier`` network, which tables show in place of missing ones.
    """
    parts = sorted(paths.runs_dir(profile).glob(f"*/parts/*/{name}.csv"))
    found = pd.concat([store.read(name, profile=profile), *(store.read_file(part) for part in parts)])
    found = found.drop_duplicates(list(rows.KEY), keep="last")
    return newest(found.loc[found["profile"] == profile], name, earlier=earlier).reset_index(drop=True)


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


def _cell(row: Mapping[Any, Any], column: str) -> Any:
    if column.startswith(SWITCH):
        return json.loads(row["switches"]).get(column.removeprefix(SWITCH))
    return row[column]


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list | tuple) else value


def _shown(measured: Sequence[Row]) -> str:
    """The first few numbers of a point, for a line of progress."""
    units = [row.get("unit") or rows.unit_of(row["metric"]) for row in measured[-3:]]
    told = zip(measured[-3:], units, strict=True)
    return ", ".join(f"{row['metric']} {row['value']:.5g} {unit}".removesuffix(" 1") for row, unit in told)
