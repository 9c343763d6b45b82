"""``tab_aciq_constants``: the published clip ratios beside the closed form and the exact optimum of each real grid."""

from itertools import product

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
    priors: tuple[Prior, ...] = ("laplace", "gauss")
    rows = []
    for prior, relu, m in product(priors, (False, True), bits):
        ours, published = clip_ratio(m, prior, relu=relu), PUBLISHED[prior, relu].get(m, float("nan"))
        for grid in GRIDS[relu]:
            if grid == "restricted" and m == 1:
                continue
            optimum = grid_clip_ratio(m, prior, grid)
            best = grid_mse(optimum, m, prior, grid)
            rows.append({
                "prior": prior, "relu": relu, "bits": m, "grid": grid,
                "published": published, "ours": ours, "gap": ours - published,
                "model_mse": noise_mse(ours, m, prior, relu=relu), "grid_optimum": optimum, "grid_mse": best,
                "penalty_pct": 100 * (grid_mse(ours, m, prior, grid) / best - 1),
            })  # fmt: skip
    return pd.DataFrame(rows)
