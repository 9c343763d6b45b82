"""Figures of notebook 01, float training."""

import pandas as pd
from matplotlib.figure import Figure

from hq_lib.results import labels
from hq_lib.results.figures import band_lines, looks, need, new_figure, plain_log, styled


@styled("model", "seed", "epoch", "train_loss", "lr")
def fig_float_training(history: pd.DataFrame) -> Figure:
    """Accuracy, loss and learning rate over the epochs, one line per model: mean over seeds, band = ± sd.

    Args:
        history: one row per model, seed and epoch: ``model`` (one's own gets a spare colour), ``seed``, ``epoch``,
            ``train_loss`` (nat), ``val_acc_pct`` (percent, validation split; missing throughout for a model that was
            trained on all images, which then has no line), ``lr``.

    Raises:
        ValueError: a column is missing or has other missing values, or there are no rows.
    """
    need(history.fillna({"val_acc_pct": 0.0}), ("val_acc_pct",), "fig_float_training")  # the column itself
    judged = history.loc[history["model"].isin(list(history.dropna(subset=["val_acc_pct"])["model"]))]
    if len(judged):
        need(judged, ("val_acc_pct",), "fig_float_training")
    figure, axes = new_figure(3, height=6.0, sharex=True, height_ratios=[3, 2, 1])
    accuracy, loss, rate = axes[:, 0]
    styles = looks(sorted(set(history["model"])))
    names = {model: labels.printed("model", model) for model in styles}
    for ax, column, runs in ((accuracy, "val_acc_pct", judged), (loss, "train_loss", history), (rate, "lr", history)):
        band_lines(ax, runs, x="epoch", y=column, by="model", names=names, looks=styles, marks=False)
    plain_log(loss)
    accuracy.set_ylabel("validation accuracy, %")
    loss.set_ylabel("training loss, nat")
    rate.set(ylabel="learning rate", xlabel="epoch")
    figure.align_ylabels()
    handles, words = loss.get_legend_handles_labels()
    figure.legend(handles, words, loc="outside upper center", ncols=3, handlelength=3.5)
    return figure
