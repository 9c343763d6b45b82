"""What notebook 01 shows where little or nothing was run."""

import numpy as np

from hq_lib.results.rows import clean, frame
from hq_lib.studies.float_training import tables


def test_a_network_trained_on_all_images_has_an_empty_validation_column():
    own = {"experiment": "float_history", "model": "resnet20", "dataset": "cifar10", "method": "float", "seed": 0,
           "profile": "smoke", "git_sha": "-", "versions": "-", "device": "-"}  # fmt: skip
    rows = [
        clean({**own, "metric": metric, "value": value, "unit": unit, "epochs": 2, "switches": {"epoch": epoch}})
        for metric, value, unit in (("train_loss", 0.5, "nat"), ("lr", 0.1, "1"))
        for epoch in (1, 2)
    ]
    curves = tables.curves(frame(rows))
    assert list(curves) == ["model", "dataset", "seed", "epoch", "lr", "train_loss", "val_acc_pct"]
    assert np.isnan(curves["val_acc_pct"]).all()
    assert tables.unjudged(curves).startswith("; ResNet-20: trained on the validation images too")
    assert tables.unjudged(curves.assign(val_acc_pct=90.0)) == ""
    assert tables.progress(curves)["train_loss"].to_numpy().tolist() == [[0.5, 0.5]]


def test_without_rows_there_is_nothing_to_show():
    none = frame([])
    assert tables.curves(none).empty
    assert tables.progress(tables.curves(none)).empty
    assert tables.main_table(none).empty
    assert tables.standard_errors(none).empty
