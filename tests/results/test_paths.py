import pytest

from hq_lib.results import paths


def test_unknown_profile_names_the_nearest():
    with pytest.raises(ValueError, match=r"'quik'.*smoke, quick, full.*did you mean 'quick'"):
        paths.check_profile("quik")


def test_smoke_never_writes_over_results(monkeypatch):
    monkeypatch.delenv("HQ_OUT", raising=False)
    for folder in (paths.results_dir("smoke"), paths.figures_dir("smoke"), paths.runs_dir("smoke")):
        assert not folder.is_relative_to(paths.ROOT)


def test_quick_writes_beside_the_reference(monkeypatch):
    monkeypatch.delenv("HQ_OUT", raising=False)
    assert paths.results_dir("full") == paths.ROOT / "data" / "results"
    assert paths.results_dir("quick") == paths.ROOT / "data" / "results" / "quick"
    assert paths.figures_dir("quick") == paths.ROOT / "figures" / "quick"


def test_environment_moves_the_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("HQ_OUT", str(tmp_path / "out"))
    monkeypatch.setenv("HQ_DATA", str(tmp_path / "data"))
    assert paths.results_dir("full") == tmp_path / "out" / "data" / "results"
    assert paths.cache_dir() == tmp_path / "data" / "cache"
