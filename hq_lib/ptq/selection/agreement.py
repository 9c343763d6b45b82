"""Whether a metric predicts anything: rank correlations and paired differences, with their uncertainty."""

import numpy as np
import pandas as pd
from scipy import stats


def spearman(table: pd.DataFrame, target: str) -> pd.DataFrame:
    """Spearman's rho of every other numeric column with ``target``: columns metric, rho, p_value, n.

    Rows with a missing value drop out pair by pair. A constant column or fewer than 3 pairs gives NaN, not a warning.
    """
    if target not in table.columns:
        raise ValueError(f"no column {target!r}: the table has {', '.join(map(str, table.columns))}")
    others = [c for c in table.select_dtypes("number").columns if c != target]
    return pd.DataFrame([{"metric": c, **_rho(pd.DataFrame(table, columns=[c, target]).dropna())} for c in others])


def _rho(pairs: pd.DataFrame) -> dict[str, float]:
    if len(pairs) < 3 or (pairs.nunique() < 2).any():
        return {"rho": np.nan, "p_value": np.nan, "n": len(pairs)}
    rho, p_value = np.asarray(stats.spearmanr(pairs.iloc[:, 0], pairs.iloc[:, 1]), dtype=float)
    return {"rho": float(rho), "p_value": float(p_value), "n": len(pairs)}


def paired_difference(a: list[float], b: list[float], *, confidence: float = 0.95) -> dict[str, float]:
    """Mean of a - b over pairs (the same seed each) with its Student interval: mean, low, high, sd, p_value, n.

    Raises:
        ValueError: unequal lengths or fewer than 2 pairs. Equal differences throughout give an interval of no width.
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"{len(a)} and {len(b)} values: a paired difference needs the same seeds, at least 2")
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    mean, sd = float(difference.mean()), float(difference.std(ddof=1))
    if sd == 0:
        return {"mean": mean, "low": mean, "high": mean, "sd": 0.0, "p_value": float(mean == 0), "n": len(a)}
    test = stats.ttest_1samp(difference, 0.0)
    interval, p_value = test.confidence_interval(confidence), np.asarray(test, dtype=float)[1]
    return {
        "mean": mean, "low": float(interval.low), "high": float(interval.high), "sd": sd,
        "p_value": float(p_value), "n": len(a),
    }  # fmt: skip
