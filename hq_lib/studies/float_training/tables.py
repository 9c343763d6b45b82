"""What notebook 01 shows: the shipped networks beside the published ones, and learning curves; rows in, frames out."""

import pandas as pd

from hq_lib import models
from hq_lib.results import labels, published, tables
from hq_lib.studies.bench import shipped
from hq_lib.studies.float_training.study import CURVES


def main_table(rows: pd.DataFrame) -> pd.DataFrame:
    """tab_float_training, from rows of ``float_reference``: size, epochs, test accuracy beside the group's own.

    Without rows it has no lines.
    """
    if rows.empty:
        return rows
    compared = published.load().query("table == 'seed001' and method == 'float' and model in @rows.model.unique()")
    out = tables.build(rows, compared, index=["model", "dataset"])
    sizes = {labels.printed("model", name): _parameters(name) for name in set(rows["model"])}
    out.insert(2, "parameters", [sizes.get(name, tables.NOT_RUN) for name in out["model"]])
    epochs = {labels.printed("model", row["model"]): str(row["epochs"]) for row in rows.to_dict("records")}
    out.insert(3, "epochs", [epochs.get(name, tables.NOT_RUN) for name in out["model"]])
    return out


def _parameters(name: str) -> str:
    path = shipped(name)
    return tables.NOT_RUN if path is None else f"{models.count_parameters(models.load_checkpoint(path)[0]):,}"


def curves(rows: pd.DataFrame) -> pd.DataFrame:
    """The learning curves, from rows of ``float_history``: model, dataset, seed, epoch, train_loss, val_acc_pct, lr.

    Of a network and seed one run (``results.tables.longest``). A column stays empty where no run has such numbers.
    """
    cell = ("model", "dataset", "seed", "epoch")
    return tables.wide(rows, *cell).reindex(columns=[*cell, *sorted(CURVES)])


def unjudged(found: pd.DataFrame) -> str:
    """What a caption says of the networks of ``curves`` without validation accuracies; nothing where all have them."""
    judged = set(found.loc[found["val_acc_pct"].notna(), "model"])
    names = [labels.printed("model", model) for model in dict.fromkeys(found["model"]) if model not in judged]
    return f"; {' and '.join(names)}: trained on the validation images too, so none to judge by" if names else ""


def standard_errors(rows: pd.DataFrame) -> pd.DataFrame:
    """Each accuracy with the standard error of its test images, 100 sqrt(p (1 - p) / n), percent."""
    share = rows["value"] / 100
    error = 100 * (share * (1 - share) / rows["n_test"]) ** 0.5
    return rows[["model", "dataset", "epochs", "n_train", "n_test", "value"]].assign(standard_error=error.round(2))


def progress(found: pd.DataFrame) -> pd.DataFrame:
    """First and last epoch of each run of ``curves``: loss, nat, and validation accuracy, percent."""
    ends = found.groupby(["model", "dataset", "seed"])[["epoch", "train_loss", "val_acc_pct"]].agg(["first", "last"])
    return pd.DataFrame(ends).round(3)
