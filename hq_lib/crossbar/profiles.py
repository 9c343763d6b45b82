"""Devices by name: published ones, each constant with its paper or tool, and what a lab measured on cells of its own.

    target_uS, mean_uS, sigma_uS [, time_s] [, read_sigma_uS]        one line per target (and time); # starts a comment

A measured cell is G(t) = max(mean(G_T, t) + sigma(G_T, t) xi, 0) with one xi ~ N(0, 1) per cell for all times: the
table gives the spread at each time, not how cells change places in it. Near 0 that is not what was measured: draws
below 0 become 0, so cells of mean 0 and spread sigma are drawn with mean 0.40 sigma and spread 0.58 sigma (`clipped`).
Between targets everything is linear in G_T, between times in ln t; outside what was measured nothing is guessed.

Two fits of one measurement (Wan 2022) differ mainly near G = 0, where most cells sit, and that alone costs 3 to 8
points of accuracy: compare tools only at equal sigma(G), window and weight scale, and print all three.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from hq_lib.crossbar.checks import FRACTION, Bound, CrossbarError
from hq_lib.crossbar.devices import (
    Constant,
    Curve,
    Device,
    Drift,
    FlickerRead,
    LogClamp,
    Polynomial,
    Proportional,
    ReadNoise,
)
from hq_lib.results.hints import check_known

NEEDED, OPTIONAL = ("target_uS", "mean_uS", "sigma_uS"), ("time_s", "read_sigma_uS")
CELLS = ("target_uS", "g_uS")
_LEAST_CELLS = 8  # per target and time, to speak of a mean and a spread


@dataclass(frozen=True)
class Measured(Curve):
    """Mean and spread of programmed cells against target and time. Rows are times, columns targets."""

    target_uS: tuple[float, ...]
    """(P,) targets, uS, ascending, >= 0."""
    mean_uS: tuple[tuple[float, ...], ...]
    """(T, P) mean conductances, uS."""
    sigma_uS: tuple[tuple[float, ...], ...]
    """(T, P) standard deviations between cells, uS, >= 0."""
    times_s: tuple[float, ...] = (1.0,)
    """(T,) seconds after programming, ascending, > 0."""
    read_uS: tuple[tuple[float, ...], ...] | None = None
    """(T, P) standard deviations of one read of one cell, uS, >= 0; None: not measured."""

    def sigma(self, g_uS: Tensor) -> Tensor:
        return self._at(self.sigma_uS, g_uS, self.times_s[0])

    def state(self, target_uS: Tensor, xi: Tensor, t_s: float) -> Tensor:
        """Conductance in uS, shape of ``target_uS``, at ``t_s``, of cells with the standard normals ``xi``."""
        return self._at(self.mean_uS, target_uS, t_s) + self._at(self.sigma_uS, target_uS, t_s) * xi

    def _at(self, rows: tuple[tuple[float, ...], ...], target_uS: Tensor, t_s: float) -> Tensor:
        return torch.from_numpy(np.interp(target_uS.numpy(), self.target_uS, self.row(rows, t_s))).to(target_uS.dtype)

    def row(self, rows: tuple[tuple[float, ...], ...], t_s: float) -> np.ndarray:
        """(P,) values at ``t_s``, linear in ln t."""
        if not self.times_s[0] <= t_s <= self.times_s[-1]:
            raise CrossbarError(f"t_s = {t_s}: measured were {self.times_s[0]:g} to {self.times_s[-1]:g} s only")
        where = np.interp(math.log(t_s), np.log(self.times_s), np.arange(len(self.times_s)))
        low, share = int(where), where - int(where)
        return (1 - share) * np.array(rows[low]) + share * np.array(rows[min(low + 1, len(rows) - 1)])


@dataclass(frozen=True)
class MeasuredRead(ReadNoise):
    """Measured read noise, fresh at every product: that of the targets whose mean a cell now has."""

    per: ClassVar[str] = "product"
    table: Measured
    """A table with read noise."""

    def std(self, g_uS: Tensor, *, g_max_uS: float, t_s: float, g0_uS: Tensor | None = None) -> Tensor:
        assert self.table.read_uS is not None
        now, noise = (self.table.row(rows, t_s) for rows in (self.table.mean_uS, self.table.read_uS))
        return torch.from_numpy(np.interp(g_uS.numpy(), now, noise)).to(g_uS.dtype)


def fit_report(path: str | Path, *, held_out: float = 0.25, seed: int = 0) -> tuple[Device, pd.DataFrame]:
    """(device, report): a device from a CSV of single cells, judged on cells that it has not seen.

    Args:
        path: CSV with a line per cell and time: ``target_uS, g_uS [, time_s] [, read_sigma_uS]``. Where there is read
            noise, g_uS must be a mean of many reads: of single ones the spread between cells holds that noise already,
            and it would enter twice.
        held_out: share of the cells of every target and time, in (0, 1), that only the report sees; drawn by ``seed``.

    Report, a row per target and time: n_fit and n_held_out cells; mean_uS and sigma_uS of what the model draws, clipped
    at 0, the same of the held-out cells; mean_z, their difference in standard errors; sigma_ratio; p_normal, of a
    Kolmogorov-Smirnov test of the held-out cells against the model's normal distribution before it is clipped.
    """
    Bound("> 0 and < 1").check(held_out, "held_out")
    cells, random, fits, found = _read(path, CELLS), np.random.default_rng(seed), [], []
    for (time_s, target_uS), group in cells.groupby(["time_s", "target_uS"]):  # type: ignore[misc]
        n_held_out = round(held_out * len(group))
        if n_held_out < 2 or len(group) - n_held_out < _LEAST_CELLS:
            raise CrossbarError(
                f"{path}: {len(group)} cells of {target_uS:g} uS at {time_s:g} s: too few for held_out = {held_out}; "
                f"{_LEAST_CELLS} to fit and 2 to judge are needed"
            )
        order = random.permutation(len(group))
        seen, unseen = (group.iloc[part] for part in (order[n_held_out:], order[:n_held_out]))
        of_fit = {"time_s": time_s, "target_uS": target_uS}
        of_fit |= {"mean_uS": seen["g_uS"].mean(), "sigma_uS": seen["g_uS"].std()}
        if "read_sigma_uS" in seen:
            of_fit["read_sigma_uS"] = float(np.sqrt(np.square(seen["read_sigma_uS"]).mean()))
        fits.append(of_fit)
        mean, sigma = clipped(of_fit["mean_uS"], of_fit["sigma_uS"])
        held_out_mean, held_out_sigma, least = unseen["g_uS"].mean(), unseen["g_uS"].std(), max(sigma, 1e-30)
        normal = (of_fit["mean_uS"], max(of_fit["sigma_uS"], 1e-30))
        found.append({
            **of_fit, "mean_uS": mean, "sigma_uS": sigma,
            "n_fit": len(seen), "n_held_out": len(unseen), "held_out_mean_uS": held_out_mean,
            "held_out_sigma_uS": held_out_sigma,
            "mean_z": (held_out_mean - mean) / (least * math.sqrt(1 / len(unseen) + 1 / len(seen))),
            "sigma_ratio": held_out_sigma / least,
            "p_normal": float(stats.kstest(unseen["g_uS"], "norm", normal).pvalue),
        })  # fmt: skip
    return _device(pd.DataFrame(fits), path), pd.DataFrame(found)


def clipped(mean_uS: float, sigma_uS: float) -> tuple[float, float]:
    """(mean, standard deviation) in uS of max(g, 0), g ~ N(mean, sigma): what cells of a table hold when drawn.

    m = mu Phi(mu / sigma) + sigma phi(mu / sigma),    s^2 = mu m + sigma^2 Phi(mu / sigma) - m^2
    """
    if not sigma_uS > 0:
        return mean_uS, sigma_uS
    above, density = stats.norm.cdf(mean_uS / sigma_uS), stats.norm.pdf(mean_uS / sigma_uS)
    mean = mean_uS * above + sigma_uS * density
    return float(mean), math.sqrt(max(mean_uS * mean + sigma_uS**2 * above - mean**2, 0.0))


def _device(rows: pd.DataFrame, path: str | Path) -> Device:
    rows = rows.sort_values(["time_s", "target_uS"])
    if bool((twice := rows.duplicated(["time_s", "target_uS"])).any()):
        raise CrossbarError(f"{path}: target {rows.loc[twice, 'target_uS'].max():g} uS stands there twice at one time")
    columns = [name for name in rows.columns if name not in ("time_s", "target_uS")]
    tables = {name: rows.pivot(index="time_s", columns="target_uS", values=name) for name in columns}
    mean = tables["mean_uS"]
    if bool(mean.isna().any(axis=None)):
        raise CrossbarError(f"{path}: every time needs every target; one is missing: {mean.isna().stack().idxmax()}")
    if mean.shape[1] < 2 or bool((mean.diff(axis=1).iloc[:, 1:] <= 0).any(axis=None)) or mean.index[0] <= 0:
        raise CrossbarError(f"{path}: needs two targets or more, times > 0 s, and means that ascend with the target")
    found = {name: tuple(map(tuple, table.to_numpy().tolist())) for name, table in tables.items()}
    times, targets = tuple(mean.index), tuple(mean.columns)
    table = Measured(targets, found["mean_uS"], found["sigma_uS"], times, found.get("read_sigma_uS"))
    read = MeasuredRead(table) if table.read_uS else None
    name, source = Path(path).stem, f"measured, {Path(path).name}"
    return Device(name, source, table.target_uS[0], table.target_uS[-1], table, read=read)


def _table(path: str | Path) -> pd.DataFrame:
    """The entries of a CSV file as text."""
    try:
        rows = pd.read_csv(path, comment="#", skipinitialspace=True, dtype=str)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise CrossbarError(f"{path}: no CSV table ({error})") from error
    return rows.rename(columns=lambda name: str(name).strip())


def _read(path: str | Path, needed: tuple[str, ...]) -> pd.DataFrame:
    """The numbers of a CSV file with these columns and ``OPTIONAL`` ones, 1 s where no time is told."""
    rows = _table(path)
    if not set(needed) <= set(rows.columns) <= set(needed + OPTIONAL) or rows.empty:
        raise CrossbarError(f"{path}: needs lines with columns {', '.join(needed)} and at most {', '.join(OPTIONAL)}")
    numbers = pd.DataFrame({name: pd.to_numeric(rows[name], errors="coerce") for name in rows}).astype(float)
    bad = np.argwhere(~np.isfinite(numbers.to_numpy()) | (numbers.to_numpy() < 0))
    if len(bad):
        line, column = (int(i) for i in bad[0])
        raise CrossbarError(f"{path}: {rows.columns[column]} of data line {line + 1} is {rows.iloc[line, column]!r}, "
                            "not a number >= 0")  # fmt: skip
    return numbers if "time_s" in numbers else numbers.assign(time_s=1.0)


def state_independent(fraction: float) -> Device:
    """A generic cell whose error is ``fraction`` (2 % is 0.02) of the window at every target."""
    error = Constant(FRACTION.check(fraction, "fraction") * 25.0)
    return Device(f"state_independent_{fraction:g}", "generic, no device", 0.0, 25.0, error, clip_at_zero=False)


def proportional(fraction: float) -> Device:
    """A generic cell whose error is ``fraction`` (10 % is 0.1) of its own target."""
    error = Proportional(fraction)
    return Device(f"proportional_{fraction:g}", "generic, no device", 0.0, 25.0, error, clip_at_zero=False)


IDEAL = Device("ideal", "no errors; infinite on/off ratio", 0.0, 25.0)

PCM_NANDAKUMAR = Device(
    "pcm_drift",
    "PCM, Nandakumar et al., ICECS 2019, programming, drift and 1/f read noise as in aihwkit",
    0.0,
    25.0,
    Polynomial((0.263, 1.965, -1.173), per_uS=25.0),
    Drift(LogClamp(-0.0155, 0.0244, 0.049, 0.1), LogClamp(-0.0125, -0.0059, 0.008, 0.045), t0_s=20.0),
    FlickerRead(q_scale=0.0088, q_power=-0.65, q_max=0.2, t_read_s=250e-9),
)

_FITS = {
    "pcm": ("PCM, Joshi et al., Nat. Commun. 11 (2020), sigma(G) as fitted in CrossSim 3.2; drift not modelled",
            0.25, 25.0, (0.286, 0.0759, -0.00179), 1.0),
    "rram": ("RRAM, Wan et al., Nature 608 (2022), 1 s after programming, fit of aihwkit",
             0.0, 40.0, (0.348, 16.03, -43.85, 45.39, -16.82), 40.0),
    "rram_1day": ("RRAM, Wan et al., Nature 608 (2022), 1 day after programming, fit of aihwkit",
                  0.0, 40.0, (0.701, 22.09, -50.77, 47.10, -16.46), 40.0),
    "rram_crosssim": ("RRAM, Wan et al., Nature 608 (2022), fit of CrossSim 3.2",
                      0.0, 39.26, (1.053, 0.2374, -0.01167, 1.536e-4), 1.0),
    "rram_lowratio": ("RRAM, Milo et al. (2021), fit of CrossSim 3.2; on/off ratio 4.5",
                      50.0, 225.0, (4.782, -0.0091), 1.0),
}  # fmt: skip
"""Name -> source, lowest and highest target (uS), and `Polynomial`: coefficients and what divides G (uS)."""

_FITTED = {
    name: Device(name, source, low, high, Polynomial(fit, per)) for name, (source, low, high, fit, per) in _FITS.items()
}
PCM_JOSHI, RRAM_WAN_1S = _FITTED["pcm"], _FITTED["rram"]
DEVICES = {"ideal": IDEAL, "pcm": PCM_JOSHI, "pcm_drift": PCM_NANDAKUMAR} | _FITTED


def device(name: str | Path) -> Device:
    """The published device called ``name``, or that of a path that ends in .csv: of single cells (`fit_report`), or a
    table's (see the module, also on what is drawn near 0), its window from the lowest to the highest target.

    Errors: an unknown name, with the nearest ones; each naming the file: a column that is missing or unknown, an entry
    that is no number or below 0, a target that some time lacks, means that do not ascend with the target.
    """
    if Path(name).suffix == ".csv":
        return fit_report(name)[0] if holds_cells(name) else _device(_read(name, NEEDED), name)
    check_known(name, DEVICES, "device", error=CrossbarError)
    return DEVICES[str(name)]


def holds_cells(name: str | Path) -> bool:
    """Whether ``name`` is a CSV file with a line per cell, as `fit_report` takes it, and not one per target."""
    return Path(name).suffix == ".csv" and set(CELLS) <= set(_table(name).columns)
