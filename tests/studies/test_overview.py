"""The main table: what the rows say, and nothing else."""

import pytest

from hq_lib.results import store, tables
from hq_lib.studies import overview

ROW = {"experiment": "e", "model": "resnet20", "dataset": "d", "method": "m", "metric": "acc_pct", "unit": "%"}


def number(switches=None, **where):
    return overview.Number("", "some", {**where, **(switches or {})})


@pytest.fixture
def rows(out_dir):
    def write(*changes):
        store.append("some", [{**ROW, "n_test": 10_000, **change} for change in changes], profile="quick")

    return write


def test_a_number_is_mean_and_sd_over_seeds(rows):
    rows({"seed": 0, "value": 90.0}, {"seed": 1, "value": 91.0}, {"seed": 2, "value": 92.0, "w_bits": 4})
    assert number(w_bits=32).text("quick") == "90.50 ± 0.71"
    assert number(w_bits=4).text("quick") == "92.00"
    assert number(w_bits=2).text("quick") == "n/r"


def test_few_images_have_one_decimal_and_units_are_said(rows):
    rows({"value": 90.04, "n_test": 1000}, {"metric": "packed_KiB", "unit": "KiB", "value": 1.514})
    assert number().text("quick") == "90.0"
    assert overview.Number("", "some", {}, metric="packed_KiB").text("quick") == "1.51 KiB"


def test_the_longest_protocol_counts(rows):
    rows({"seed": 0, "value": 90.0, "epochs": 10}, {"seed": 1, "value": 80.0, "epochs": 3})
    assert number().text("quick") == "90.00"


def test_two_rows_of_one_seed_are_no_number(rows):
    rows({"value": 90.0, "switches": {"x": 1}}, {"value": 80.0, "switches": {}})
    with pytest.raises(tables.TableError, match="several numbers"):
        number().text("quick")
    assert number({"x": None}).text("quick") == "80.00"


def test_every_line_and_what_it_is_compared_with_has_rows():
    table, behind = overview.table("full")
    assert tables.NOT_RUN not in " ".join(table.astype(str).to_numpy().ravel())
    assert len(table) == len(overview.LINES)
    assert sum(map(int, table["n"])) == len(behind)
    for line in overview.LINES:
        for other in line.beside:
            assert other.file != "published" or len(other.rows("full")) == 1, other
