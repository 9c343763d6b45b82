"""Tables: numbers against pandas and hand, honesty about what was not run, and the same bytes for the same rows."""

import io

import numpy as np
import pandas as pd
import pytest

from hq_lib.results import labels, rows, tables
from hq_lib.results.tables import TableError


def frame(*specs):
    """Result rows from (method, bits, seed, value, changes)."""
    made = []
    for method, bits, seed, value, *changes in specs:
        row = {
            "experiment": "tab_toynet", "model": "toynet", "dataset": "cifar10", "method": method, "w_bits": bits,
            "a_bits": bits, "seed": seed, "metric": "acc_pct", "value": value, "unit": "%", "profile": "quick",
            "epochs": 3, "git_sha": "x", "versions": "x", "device": "x",
        }  # fmt: skip
        made.append(rows.clean({**row, **(changes[0] if changes else {})}))
    return rows.frame(made)


def published(*specs):
    return pd.DataFrame(
        [("toynet", "cifar10", m, float(b), float(b), "acc_pct", v) for m, b, v in specs],
        columns=["model", "dataset", "method", "w_bits", "a_bits", "metric", "value"],
    )


OURS = frame(("pact", 4, 0, 91.0), ("pact", 4, 1, 91.2), ("pact", 4, 2, 91.7), ("lsq", 2, 0, 89.0))


def test_mean_sd_and_n_by_hand():
    cell = tables.cells(OURS, by=["method", "w_bits"]).set_index("method").loc["pact"]
    assert cell["mean"] == pytest.approx(91.3)
    assert cell["sd"] == pytest.approx(np.sqrt((0.3**2 + 0.1**2 + 0.4**2) / 2))
    assert (cell["n"], cell["unit"], cell["profile"]) == (3, "%", "quick")
    assert np.isnan(tables.cells(OURS, by=["method"]).set_index("method")["sd"]["lsq"])


def test_what_is_known_from_memory_alone_is_marked(out_dir):
    numbers = published(("pact", 4, 91.7), ("pact", 4, 90.89), ("lsq", 2, 88.0), ("lsq", 2, 88.0))
    numbers = numbers.assign(tag=["M", "R", "M", "R"])  # 88.0 is read somewhere too
    table = tables.build(OURS, numbers, index=["method"], columns=["bits"])
    assert table["W4A4 published"].tolist() == ["91.7† / 90.89", "–"]
    assert table["W2A2 published"].tolist() == ["–", "88.0"]
    assert table["W4A4 gap"][0] == "-0.40"
    files = tables.write(table, "tab_toynet", profile="quick", caption="c", switches={})
    assert [file.read_text().count("from memory") for file in files] == [0, 1, 1]


def test_many_cells_agree_with_a_pandas_groupby():
    random = np.random.default_rng(0)
    many = frame(*((m, b, s, random.uniform(80, 95)) for m in ("pact", "lsq", "dsq") for b in (2, 4) for s in range(4)))
    ours = tables.cells(many, by=["method", "w_bits"]).set_index(["method", "w_bits"])
    theirs = many.groupby(["method", "w_bits"])["value"].agg(["mean", "std", "count"])
    assert np.allclose(ours[["mean", "sd", "n"]].astype(float), theirs)


def test_a_table_by_hand():
    table = tables.build(
        OURS, published(("pact", 4, 91.7), ("pact", 4, 90.89), ("dsq", 4, 90.0)), index=["method"], columns=["bits"]
    )
    assert table.to_dict("list") == {
        "method": ["PACT", "LSQ", "DSQ"],
        "W2A2": ["n/r", "89.00 (n=1)", "n/r"],
        "W4A4": ["91.30 ± 0.36 (n=3)", "n/r", "n/r"],
        "W4A4 published": ["91.7 / 90.89", "–", "90.0"],
        "W4A4 gap": ["-0.40", "–", "n/r"],
    }


def test_no_columns_gives_one_group():
    table = tables.build(OURS, published(("lsq", 2, 88.5)), index=["method", "w_bits"], decimals=1)
    assert table.columns.tolist() == ["method", "w_bits", "ours", "published", "gap"]
    assert table.iloc[1].tolist() == ["LSQ", "2", "89.0 (n=1)", "88.5", "+0.5"]
    assert tables.build(OURS, index=["method"]).columns.tolist() == ["method", "ours"]


def test_an_order_spans_the_grid_and_what_was_not_run_says_so():
    order = {"method": ["dorefa", "lsq", "pact"], "bits": ["W8A8", "W4A4", "W2A2"]}
    table = tables.build(OURS, index=["method"], columns=["bits"], order=order)
    assert table.columns.tolist() == ["method", "W8A8", "W4A4", "W2A2"]
    assert table["method"].tolist() == ["DoReFa", "LSQ", "PACT"]
    assert (table["W8A8"] == "n/r").all()
    assert not (table == "").any(axis=None)


def test_nothing_run_at_all_still_shows_what_is_published():
    table = tables.build(rows.frame([]), published(("pact", 4, 91.7)), index=["method"], columns=["bits"])
    assert table.iloc[0].tolist() == ["PACT", "n/r", "91.7", "n/r"]
    with pytest.raises(TableError, match="run the study first"):
        tables.build(rows.frame([]), index=["method"])


def test_other_metrics_stay_out():
    loss = frame(("pact", 4, 0, 0.3, {"metric": "loss", "unit": "nat"}))
    both = pd.concat([OURS, loss], ignore_index=True)
    assert tables.build(both, index=["method"], columns=["bits"]).equals(
        tables.build(OURS, index=["method"], columns=["bits"])
    )


def test_profiles_never_share_a_column():
    mixed = pd.concat([OURS, frame(("dsq", 4, 0, 90.0, {"profile": "full"}))], ignore_index=True)
    with pytest.raises(TableError, match="'W4A4' would mix the profiles full and quick: keep one"):
        tables.build(mixed, index=["method"], columns=["bits"])
    parted = tables.build(mixed, published(("dsq", 4, 90.5)), index=["method"], columns=["profile", "bits"])
    assert parted.set_index("method").loc["DSQ", "full W4A4 gap"] == "-0.50"
    assert parted.set_index("method").loc["PACT", "full W4A4"] == "n/r"
    apart = pd.concat([OURS, frame(("dsq", 8, 0, 90.0, {"profile": "full"}))], ignore_index=True)
    assert "W8A8" in tables.build(apart, index=["method"], columns=["bits"])


@pytest.mark.parametrize(
    ("change", "named"),
    [({"epochs": 9}, "epochs"), ({"switches": {"first_last_bits": 8}}, "switches"), ({"n_calib": 5}, "n_calib")],
)
def test_protocols_are_never_averaged(change, named):
    mixed = pd.concat([OURS, frame(("pact", 4, 7, 90.0, change))], ignore_index=True)
    with pytest.raises(TableError, match=f"method=pact, bits=W4A4 holds rows that differ in {named}"):
        tables.build(mixed, index=["method"], columns=["bits"])


def test_bits_are_spelt_as_in_the_papers():
    frac = frame(("pact", 3.5, 0, 90.0), ("float", 32, 0, 92.0), ("pact", 1, 0, 80.0, {"a_bits": 32}))
    assert set(tables.with_bits(frac)["bits"]) == {"W3.5A3.5", "float", "W1A32"}
    assert labels.printed("method", "captq_qdrop") == "CaPTQ + QDrop"
    assert labels.printed("method", "mine") == "mine"
    assert labels.printed("w_bits", 4.0) == "4"


def test_every_method_and_model_that_is_published_has_a_printed_name():
    from hq_lib.results import published as numbers

    assert set(numbers.load()["method"]) <= set(labels.METHOD_LABELS)
    assert len(set(labels.METHOD_LABELS.values())) == len(labels.METHOD_LABELS)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setenv("HQ_OUT", str(tmp_path))
    return tmp_path


def write(table, **changes):
    options = {"profile": "quick", "caption": "PACT wins by 50 %.", "switches": {"first_last_bits": 8}, **changes}
    return tables.write(table, "tab_toynet", **options)


def test_three_files_with_the_same_numbers(out):
    table = tables.build(OURS, published(("pact", 4, 91.7)), index=["method"], columns=["bits"])
    made = write(table)
    assert [p.relative_to(out).as_posix() for p in made] == [
        f"figures/quick/tab_toynet.{e}" for e in ("csv", "md", "tex")
    ]
    csv, md, tex = (p.read_text(encoding="utf-8") for p in made)
    pd.testing.assert_frame_equal(
        pd.read_csv(io.StringIO(csv), dtype=str, keep_default_na=False), table, check_dtype=False
    )
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in md.splitlines() if line.startswith("|")]
    assert cells[0] == table.columns.tolist()
    assert cells[2:] == table.to_numpy().tolist()
    assert md.startswith("PACT wins by 50 %.\n\n|")
    for text in (md, tex):
        assert "Profile: quick." in text
        assert "n/r = not run; – = nothing published." in text.replace("--", "–")
    assert "first_last_bits = 8" in md
    assert r"first\_last\_bits = 8" in tex
    assert r"\caption{PACT wins by 50 \%.}" in tex
    assert r"91.30 $\pm$ 0.36 (n=3)" in tex
    assert tex.count(r"\\") == len(table) + 1
    assert tex.count("{") == tex.count("}")


def test_the_same_rows_in_any_order_give_the_same_bytes(out):
    shuffled = OURS.sample(frac=1, random_state=3)
    once = [p.read_bytes() for p in write(tables.build(OURS, index=["method"], columns=["bits"]))]
    again = [p.read_bytes() for p in write(tables.build(shuffled, index=["method"], columns=["bits"]))]
    assert once == again
    assert all(b"\r" not in content and content.endswith(b"\n") for content in once)


def test_bars_and_braces_do_not_break_the_markup(out):
    _, md, tex = (p.read_text() for p in write(pd.DataFrame({"a|b": ["x|y"], "c": ["{^~\\}"]}), switches={}))
    assert r"| a\|b | c |" in md
    assert r"\{\textasciicircum{}\textasciitilde{}\textbackslash{}\}" in tex
    assert "Switches: none." in md


@pytest.mark.parametrize("table", [pd.DataFrame({"a": []}), pd.DataFrame({"a": [""]}), pd.DataFrame({"a": [None]})])
def test_blank_tables_are_refused(out, table):
    with pytest.raises(TableError, match="no rows or an empty cell"):
        write(table)


def test_ids_are_those_of_outputs(out):
    for name in ("tab1_w2a2", "tab_bn_fold"):
        assert labels.check_id(name, "tab") == name
    assert labels.check_id("fig2a_w4a4", "fig") == "fig2a_w4a4"
    for name in ("fig_bn", "tab_../x", "Tab_x", "tab"):
        with pytest.raises(ValueError, match="no id of a tab"):
            labels.check_id(name, "tab")
