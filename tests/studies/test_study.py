"""The mechanism of the studies: identity, resuming, benches, parts, refusals; on a study of a few numbers."""

import dataclasses
import graphlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from typer.testing import CliRunner

from hq_lib import studies
from hq_lib.__main__ import app
from hq_lib.results import provenance, store
from hq_lib.studies.study import Point, Run, Study, StudyError, _alone, profile_rows


@dataclass(frozen=True)
class Plan:
    bits: tuple = (2, 4)
    seeds: tuple = (0, 1)
    n_test: int = 7


class Killed(BaseException):
    """What stops a process, as no library error does."""


@pytest.fixture
def toy(out_dir):
    opened, measured, kill_at = [], [], []

    def number(plan, bits, seed):
        named = {"model": "m", "method": "pact", "metric": "acc_pct", "switches": {"n": plan.n_test}}
        return Point(f"b{bits}_s{seed}", {**named, "w_bits": bits, "seed": seed}, bench=bits)

    def open_bench(run, bits):
        opened.append(bits)
        return None if bits == 3 else 10 * bits

    def measure(run, bench, point):
        if point.name in kill_at:
            raise Killed
        measured.append(point.name)
        yield "toy_more", {"experiment": "toy_more", "dataset": "d", "metric": "loss", "value": 0.5, "unit": "nat"}
        yield {"dataset": "d", "value": bench + point.key["seed"], "unit": "%"}

    plans = {"smoke": Plan(), "quick": Plan(), "full": Plan()}
    points = lambda plan: [number(plan, b, s) for b in plan.bits for s in plan.seeds]  # noqa: E731
    study = Study("toy", plans, points=points, open_bench=open_bench, measure=measure)
    return study, opened, measured, kill_at


def test_a_study_without_a_gpu_stays_on_the_cpu_and_its_rows_say_so(toy):
    rows = toy[0].run("smoke", device="cuda")
    assert set(rows["device"]) == {provenance.device("cpu")}


def test_a_bench_is_opened_once_for_its_points_and_rows_carry_key_and_provenance(toy):
    study, opened, measured, _ = toy
    rows = study.run("smoke")
    assert opened == [2, 4]
    assert measured == ["b2_s0", "b2_s1", "b4_s0", "b4_s1"]
    assert sorted(rows["value"]) == [20, 21, 40, 41]
    assert set(rows["git_sha"]) == {provenance.git_sha()}
    assert {json.loads(s)["n"] for s in rows["switches"]} == {7}
    assert len(profile_rows("toy_more", "smoke")) == 4


def test_what_has_a_row_is_not_measured_again_and_another_plan_is_another_point(toy):
    study, opened, measured, _ = toy
    study.run("smoke", bits=[2])
    study.run("smoke")
    assert measured == ["b2_s0", "b2_s1", "b4_s0", "b4_s1"]
    assert opened == [2, 4]
    study.run("smoke", bits=[2], seeds=[0], n_test=9)
    assert measured[-1] == "b2_s0"
    assert len(study.rows("smoke")) == 5


def test_rows_of_other_settings_than_asked_for_are_said_not_to_be_measured_again(toy, capsys):
    one = lambda plan: [Point("p", {"model": "m", "method": "pact", "metric": "acc_pct", "switches": {}}, bench=2)]  # noqa: E731
    measure = lambda run, bench, point: iter([{"dataset": "d", "value": 1.0, "n_test": run.plan.n_test}])  # noqa: E731
    study = dataclasses.replace(toy[0], points=one, measure=measure)

    def said(**changes):
        capsys.readouterr()
        assert len(study.run("smoke", **changes)) == 1
        return capsys.readouterr().out

    assert "n_test 3" not in said(n_test=3)
    assert json.loads(study.rows("smoke")["switches"].item())["changed"] == {"n_test": 3}
    assert "delete those rows" not in said(n_test=3)
    assert "1 points have rows of n_test=3, not of n_test=5" in said(n_test=5)
    assert "1 points have rows of n_test=3, not of the profile's own settings" in said()


WITHOUT_EFFECT = {
    "float_reference": {"n_val"}, "selection_imagenet": {"n_draws_n", "iterations"},
    "layer_sensitivity": {"n_test", "n_draws"}, "integer_export": {"n_layers"}, "crossbar": {"n_pairs"},
    "integer_layers": {"n_test", "n_untrained"}, "crossbar_layers": {"n_test", "n_norm", "n_train", "epochs"},
    "crossbar_cost": {"n_ptq", "n_draws", "n_calib", "n_norm", "n_pairs", "n_train", "epochs"},
}  # fmt: skip
"""Numbers of a plan that are another study's of the same plan, or of points that the full plan does not have."""


@pytest.mark.parametrize("name", studies.every())
def test_a_number_of_a_plan_is_in_the_key_of_its_points_or_said_to_be_in_none(name):
    study, silent = studies.every()[name], set()
    plan = study.plans["full"]
    keys = [point.key for point in study.points(plan)]
    for field in dataclasses.fields(plan):
        value = getattr(plan, field.name)
        if value is None or type(value) in (int, float):
            other = dataclasses.replace(plan, **{field.name: 7 if value is None else value + 1})
            silent |= {field.name} if [point.key for point in study.points(other)] == keys else set()
    assert silent - {*study.unkeyed} == WITHOUT_EFFECT.get(name, set())


def test_whole_numbers_are_floats_where_the_plan_has_floats(out_dir):
    plan = studies.every()["crossbar"].plan("full", stuck_pct=[2, 5])
    assert [type(value) for value in plan.stuck_pct] == [float, float]
    with pytest.raises(StudyError, match=r"bits\[0\] of qat is 4: .*tuple"):
        studies.every()["qat"].plan("smoke", bits=[4, 4])
    with pytest.raises(StudyError, match="networks of edge_cloud has 'my' twice"):
        studies.every()["edge_cloud"].plan("smoke", networks=["a/my.safetensors", "b/my.safetensors"])


def test_a_killed_run_goes_on_where_it_stopped(toy):
    study, _, measured, kill_at = toy
    kill_at.append("b4_s0")
    with pytest.raises(Killed):
        study.run("smoke")
    kill_at.clear()
    assert [p.name for p in study.todo("smoke")] == ["b4_s0", "b4_s1"]
    study.run("smoke")
    assert measured == ["b2_s0", "b2_s1", "b4_s0", "b4_s1"]


def test_a_bench_that_cannot_be_had_leaves_its_points_out(toy):
    study, _, measured, _ = toy
    assert sorted(study.run("smoke", bits=[3, 4], seeds=[0])["w_bits"]) == [4]
    assert measured == ["b4_s0"]


def test_units_write_parts_of_their_own_that_are_gathered_once(toy):
    study, _, measured, _ = toy
    assert [u["unit"] for u in study.units("smoke")] == ["b2_s0", "b2_s1", "b4_s0", "b4_s1"]
    for unit in ("b4_s1", "b2_s0"):
        study.run("smoke", unit=unit)
    study.run("smoke", unit="b2_s0")  # its part is there: nothing to do
    assert measured == ["b4_s1", "b2_s0"]
    assert [u["unit"] for u in study.units("smoke")] == ["b2_s1", "b4_s0"], "a part that waits is measured, too"
    assert store.read("toy", profile="smoke").empty
    assert study.gather("smoke") == 4
    assert study.gather("smoke") == 0
    assert sorted(study.rows("smoke")["value"]) == [20, 41]
    assert [u["unit"] for u in study.units("smoke")] == ["b2_s1", "b4_s0"]


def test_what_a_plan_does_not_have_is_named(toy):
    study, *_ = toy
    with pytest.raises(StudyError, match=r"field of .*'sedes'.*did you mean 'seeds'"):
        study.run("smoke", sedes=[0])
    with pytest.raises(StudyError, match=r"seeds is a list.*\[0\]"):
        study.run("smoke", seeds=0)
    with pytest.raises(StudyError, match=r"unit of .*'b2_s7'.*did you mean 'b2_s"):
        study.run("smoke", unit="b2_s7")


def test_a_value_of_another_kind_and_options_of_the_command_are_named(out_dir):
    with pytest.raises(StudyError, match=r"n_test of float_training is 'ten': .*integer"):
        studies.every()["float_training"].plan("smoke", n_test="ten")
    assert studies.every()["float_training"].plan("smoke", n_test=7).n_test == 7
    done = CliRunner().invoke(app, ["study", "qat", "--set", "device=cuda"])
    assert done.exit_code == 2
    assert "--help" in done.output


def test_full_rows_come_from_committed_code_or_say_so(toy, monkeypatch):
    study, _, measured, _ = toy
    monkeypatch.setattr(provenance, "git_sha", lambda: "0123456789ab-dirty")
    with pytest.raises(StudyError, match=r"4 rows of profile full.*--allow-dirty"):
        study.run("full")
    assert measured == []
    rows = study.run("full", allow_dirty=True)
    assert set(rows["git_sha"]) == {"0123456789ab-dirty"}
    study.run("full")  # nothing is left to measure, so nothing to refuse


def test_every_study_lists_points_of_its_own_name_in_all_profiles(out_dir):
    for name, study in studies.every().items():
        assert study.name == name
        for profile in ("smoke", "quick", "full"):
            points = study.points(study.plan(profile))
            assert len({p.name for p in points}) == len(points), name
        assert all(u["minutes"] > 0 for u in study.units("smoke"))


def test_units_of_profile_full_wait_for_one_another_in_no_circle(out_dir):
    """From nothing, as on a cluster: a unit waits for every unit, of whatever study, that its ``after`` names."""
    units = [unit for study in studies.every().values() for unit in study.units("full")]
    waits = {
        (unit["study"], unit["unit"]): [(o["study"], o["unit"]) for o in units if o["unit"] in unit["after"]]
        for unit in units
    }
    graphlib.TopologicalSorter(waits).prepare()
    trained = ("qat", "resnet20_pact_w4a4_s0")
    assert trained in waits["integer_export", "exported_resnet20_pact_w4a4_s0"]
    assert trained in waits["edge_cloud", "resnet20_pact_w4a4_s0_integer"]
    assert ("float_training", "resnet20_float_s0") in waits[trained]


def test_the_command_lists_units_as_json_and_names_an_unknown_study(out_dir):
    found = CliRunner().invoke(app, ["study", "qat", "--profile", "smoke", "--list"])
    assert [json.loads(line)["study"] for line in found.output.splitlines()] == ["qat"] * 3
    wrong = CliRunner().invoke(app, ["study", "qta"])
    assert wrong.exit_code == 2
    assert "qat" in wrong.output


def test_a_row_in_a_part_keeps_the_text_that_the_shared_file_will_hold(toy, tmp_path):
    study, *_ = toy
    study.run("smoke", unit="b2_s0")
    part = next((tmp_path / "out").rglob("parts/b2_s0/toy.csv"))
    before = store.read_file(part)
    study.gather("smoke")
    assert study.rows("smoke").equals(before)


def test_what_is_not_gathered_yet_can_be_read_and_a_unit_at_work_keeps_its_part(toy):
    """As when the searches over bits stand on sensitivities that other jobs have measured."""
    study, *_ = toy
    study.run("smoke", unit="b2_s0")
    assert list(profile_rows("toy", "smoke")["value"]) == [20]
    part = study._part("smoke", "b2_s0")
    with _alone(part):
        assert study.gather("smoke") == 0
    assert study.gather("smoke") == 2
    assert not part.exists()
    assert list(profile_rows("toy", "smoke")["value"]) == [20]


def test_a_unit_begun_twice_is_measured_once(toy, capsys):
    """The second process waits for the first, and then finds its rows."""
    study, _, measured, _ = toy
    with ThreadPoolExecutor(1) as other:
        with _alone(study._part("smoke", "b2_s0")):
            second = other.submit(study.run, "smoke", unit="b2_s0")
            while "waiting" not in capsys.readouterr().out:
                assert not second.done()
            study._measure(Run("toy", "smoke", Plan(), part=study._part("smoke", "b2_s0")), study.points(Plan())[:1])
        second.result(timeout=60)
    assert measured == ["b2_s0"]
