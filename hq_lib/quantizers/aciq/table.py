"""``tab_aciq_constants``: the published clip ratios beside the closed form and the exact optimum of each real grid."""

import pandas as pd

from hq_lib.quantizers.aciq.clip import PUBLISHED, Prior, clip_ratio, noise_mse
from hq_lib.quantizers.aciq.exact import GridKind, grid_clip_ratio, grid_mse

GRIDS: dict[bool, tuple[GridKind, ...]] = {False: ("midpoint", "endpoint", "restricted"), True: ("relu_endpoint",)}


def constants(bits: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)) -> pd.DataFrame:
    """One row per (prior, relu, bits, grid); all ratios are alpha / b (Laplace) or alpha / sigma (Gauss).

    Columns: ``published`` the official code's constant (NaN where it has none), ``ours`` the closed form, ``gap`` their
    difference, ``model_mse`` the noise model's error at ``ours`` for unit spread, ``grid_optimum`` the exact optimum of
    ``grid``, ``grid_mse`` its error, ``penalty_pct`` the excess error when ``ours`` clips that grid, per cent.
    """
    rows = [
        _row(prior, relu, m, grid)
        for prior in ("laplace", "gauss")
        for relu in (False, True)
        for m in bits
        for grid in GRIDS[relu]
        if not (grid == "restricted" and m == 1)
    ]
    return pd.DataFrame(rows)


def _row(prior: Prior, relu: bool, bits: int, grid: GridKind) -> dict[str, object]:
    ours, optimum = clip_ratio(bits, prior, relu=relu), grid_clip_ratio(bits, prior, grid)
    published, best = PUBLISHED[prior, relu].get(bits, float("nan")), grid_mse(optimum, bits, prior, grid)
    return {
        "prior": prior,
        "relu": relu,
        "bits": bits,
        "grid": grid,
        "published": published,
        "ours": ours,
        "gap": ours - published,
        "model_mse": noise_mse(ours, bits, prior, relu=relu),
        "grid_optimum": optimum,
        "grid_mse": best,
        "penalty_pct": 100 * (grid_mse(ours, bits, prior, grid) / best - 1),
    }
