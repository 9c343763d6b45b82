"""Published numbers: spot values against the tables they were copied from, and the soundness of every row."""

import pytest

from hq_lib.results import published
from hq_lib.results.published import PublishedError


def values(**wanted):
    return sorted(published.lookup(metric="acc_pct", **wanted)["value"].tolist())


@pytest.mark.parametrize(
    ("table", "model", "method", "w_bits", "a_bits", "expected"),
    [
        # ResNet-20, CIFAR-10
        ("resnet20_cifar10", "resnet20", "dorefa", 2, 2, [88.2]),
        ("resnet20_cifar10", "resnet20", "dorefa", 5, 5, [90.4]),
        ("resnet20_cifar10", "resnet20", "dorefa", 1, 1, [79.3]),
        ("resnet20_cifar10", "resnet20", "dorefa", 1, 32, [90.0, 90.54]),
        ("resnet20_cifar10", "resnet20", "dorefa", 4, 32, [91.46]),
        ("resnet20_cifar10", "resnet20", "pact", 2, 2, [87.07, 88.9, 89.7]),
        ("resnet20_cifar10", "resnet20", "pact", 4, 4, [90.8, 90.89, 91.7]),
        ("resnet20_cifar10", "resnet20", "lq_nets", 3, 3, [91.6]),
        ("resnet20_cifar10", "resnet20", "apot", 4, 4, [92.3]),
        ("resnet20_cifar10", "resnet20", "dsq", 1, 1, [84.11]),
        ("resnet20_cifar10", "resnet20", "dsq", 1, 32, [90.24]),
        ("resnet20_cifar10", "resnet20", "distributed_int8", 8, 8, [92.76]),
        ("resnet20_cifar10", "resnet20", "lsq", 2, 2, [90.5, 91.8]),
        # VGG-Small and MobileNetV2
        ("vgg_small_cifar10", "vgg_small", "dsq", 1, 1, [91.72]),
        ("vgg_small_cifar10", "vgg_small", "lsq", 4, 4, [94.26]),
        ("mobilenetv2_cifar10", "mobilenetv2", "cpt", 8, 8, [93.76]),
        ("mobilenetv2_cifar10", "mobilenetv2_x1_4", "float", 32, 32, [94.22]),
        # ImageNet, post-training
        ("imagenet_ptq", "resnet18", "float", 32, 32, [71.01, 71.06, 71.06, 71.08]),
        ("imagenet_ptq", "resnet50", "aciq", 4, 4, [73.33, 73.8, 74.2]),
        ("imagenet_ptq", "resnet50", "aciq", 8, 4, [71.40]),
        ("imagenet_ptq", "mobilenetv2_imagenet", "lapq", 4, 4, [49.7]),
        ("imagenet_ptq", "mobilenetv2_imagenet", "adaround", 3, 3, [33.61]),
        ("imagenet_ptq", "mnasnet2_0", "brecq", 2, 4, [63.01]),
        ("imagenet_ptq", "resnet18", "qdrop", 2, 2, [50.73, 51.14, 51.42, 51.69]),
        ("imagenet_ptq", "resnet101", "qdrop", 4, 4, [72.98]),
        ("imagenet_ptq", "resnet101", "captq_qdrop", 4, 4, [76.33]),
        ("imagenet_ptq", "regnetx_600m", "mrecg_qdrop", 2, 2, [43.67]),
        ("imagenet_ptq", "mnasnet2_0", "captq_qdrop", 2, 2, [29.74]),
        ("imagenet_ptq", "resnet101", "captq_brecq", 2, 2, [10.86]),
        ("imagenet_ptq", "resnet50", "minmax", 4, 8, [70.34]),
        # quantization-aware training on ImageNet
        ("imagenet_qat", "resnet18", "lsq", 2, 2, [66.31]),
        ("imagenet_qat", "resnet50", "dorefa", 4, 4, [75.42]),
        ("imagenet_qat", "resnet18", "dsq", 4, 4, [69.54, 69.56]),
        ("imagenet_qat", "mobilenetv2_imagenet", "dsq", 4, 4, [64.80]),
        # the repositories behind the workbook
        ("seed001", "resnet20", "dorefa_hw", 8, 8, [90.05, 90.477, 92.021, 92.344]),
        ("seed001", "resnet20", "pact", 4, 4, [91.05]),
        ("seed001", "mobilenetv2_seed", "mpact", 8, 8, [93.084, 93.86]),
        ("seed001", "toynet", "mpact", 8, 8, [68.93, 71.97, 91.05, 91.366, 91.41, 91.416]),
        ("captq", "resnet101", "captq_qdrop", 2, 4, [71.18, 73.276, 74.264]),
        # measured by the project on official code
        ("official_ptq", "resnet20", "qdrop", 2, 2, [59.97, 64.9, 79.21, 80.45, 82.51]),
        ("official_ptq", "resnet20", "minmax", 3, 3, [37.67]),
        ("official_ptq", "resnet20", "brecq", 2, 32, [82.75]),
    ],
)
def test_spot_values(table, model, method, w_bits, a_bits, expected):
    assert values(table=table, model=model, method=method, w_bits=w_bits, a_bits=a_bits) == expected


def test_a_whole_line_of_the_imagenet_table():
    models = ["resnet18", "resnet50", "resnet101", "mobilenetv2_imagenet", "regnetx_600m", "mnasnet2_0"]
    line = published.lookup(table="imagenet_ptq", method="captq_qdrop", w_bits=2, a_bits=2).set_index("model")["value"]
    assert line[models].tolist() == [55.26, 59.84, 64.32, 14.47, 42.55, 29.74]


def test_models_are_those_that_the_library_builds():
    from hq_lib import models

    other_widths = {"mobilenetv2_x0_5", "mobilenetv2_x1_4"}
    assert set(published.load()["model"]) <= {*models.names(), *other_widths}


def test_ambiguous_cells_are_two_rows_that_say_so():
    ambiguous = published.load().query("variant.str.contains('of p')", engine="python")
    pairs = ambiguous.groupby(["model", "w_bits", "a_bits"])["value"].apply(lambda v: tuple(sorted(v)))
    assert set(pairs) == {(89.482, 89.814), (89.458, 91.317), (81.665, 88.983), (92.021, 92.344)}
    assert ambiguous["note"].str.contains("p\\q", regex=False).all()


def test_the_final_loss_ranks_the_sets_of_the_five_logs_almost_as_accuracy_does():
    logs = published.lookup(table="captq", w_bits=4, a_bits=4).pivot_table(
        index="variant", columns="metric", values="value"
    )
    assert len(logs) == 5
    assert logs["acc_pct"].corr(logs["fc_rec_loss"], method="spearman") == pytest.approx(-0.9)


def test_every_row_is_whole():
    table = published.load()
    assert tuple(table.columns) == published.COLUMNS
    assert len(table) > 350
    assert not table.isna().any(axis=None)
    assert not table.duplicated(list(published.KEY)).any()
    assert table["source"].str.len().min() > 10
    assert set(table["tag"]) <= set(published.TAGS)
    assert table.query("metric == 'acc_pct'")["value"].between(0.2, 100).all()
    assert (
        table.query("dataset == 'cifar10' and method == 'float' and metric == 'acc_pct'")["value"].between(90, 95).all()
    )
    assert table.query("method == 'float'")[["w_bits", "a_bits"]].eq(32).all(axis=None)


def test_numbers_given_as_percent_are_no_fractions_and_no_gain_is_absurd():
    table = published.load().query("metric == 'acc_pct' and w_bits >= 4 and a_bits >= 4 and dataset == 'cifar10'")
    assert table["value"].min() > 60


def test_a_misspelt_word_is_answered_with_the_nearest_one():
    with pytest.raises(PublishedError, match=r"method of published numbers 'dorfa'.*did you mean 'dorefa'"):
        published.lookup(method="dorfa")
    with pytest.raises(PublishedError, match=r"column of published numbers 'wbits'.*did you mean 'w_bits'"):
        published.lookup(wbits=4)
    assert len(published.lookup(model="resnet20", method="pact", w_bits=7)) == 0
    assert set(published.lookup(method=["pact", "lsq"])["method"]) == {"pact", "lsq"}


def test_callers_cannot_change_what_the_next_one_reads():
    mine = published.load()
    mine["value"] = 0.0
    assert published.load()["value"].max() > 90


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (",R,", ",Q,", "the tag must be"),
        ("%", "percent", "the unit must be"),
        (",4,4,", ",40,4,", "bits lie in"),
        (",91.5,", ",191.5,", "a percentage lies"),
        (",91.5,", ",nan,", "cannot be read"),
        (",91.5,", ",,", "cannot be read"),
        (",somebody's README,", ",-,", "needs a source"),
        (",somebody's README,", ",,", "a cell is empty"),
        (",91.5,", ",many,", "cannot be read"),
        ("w_bits", "bits", "the columns must be"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path, old, new, message):
    good = "t,m,d,pact,-,4,4,acc_pct,91.5,%,somebody's README,R,-"
    path = tmp_path / "published.csv"
    path.write_text(",".join(published.COLUMNS) + "\n" + good + "\n")
    assert len(published.load(path)) == 1
    broken = tmp_path / "broken.csv"
    broken.write_text(path.read_text().replace(old, new))
    with pytest.raises(PublishedError, match=message):
        published.load(broken)


def test_a_repeated_number_and_a_missing_file_are_refused(tmp_path):
    line = "t,m,d,pact,-,4,4,acc_pct,{},%,somebody's README,R,-\n"
    path = tmp_path / "published.csv"
    path.write_text(",".join(published.COLUMNS) + "\n" + line.format(91.5) + line.format(91.6))
    with pytest.raises(PublishedError, match="line 3: the number is there already"):
        published.load(path)
    with pytest.raises(PublishedError, match="is missing"):
        published.load(tmp_path / "absent.csv")
