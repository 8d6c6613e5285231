"""A grid of runs: what is done before is found, what other code made is used where both codes pass the same fingerprints."""

from __future__ import annotations

import dataclasses

import pytest

from distillbench.api import vouch
from distillbench.cards import registry
from distillbench.checks import fingerprints
from distillbench.runs.grid import complete
from distillbench.runs.plan import plan
from distillbench.runs.runner import execute
from distillbench.runs.store import Store

TRACK = "image-classification/blobs"


@pytest.fixture
def grid(tmp_path):
    """The spec of a short run of kd, and a store that has it as other code made it under today's fingerprints."""
    [spec] = plan(TRACK, ["kd"], [0], controls=False, budget={"student_examples": 640})
    made = dataclasses.replace(execute(spec, Store(tmp_path / "first")), code={"digest": "other", "fingerprint": "f", "loose": {}})
    spec = dataclasses.replace(spec, code=dataclasses.replace(spec.code, fingerprint="f"))
    store = Store(tmp_path / "store")
    store.save(made)
    return spec, store, made


def test_a_record_of_other_code_stands_where_todays_code_passes_the_fingerprints(grid, capsys):
    spec, store, made = grid
    asked = []
    for _ in range(2):
        done = complete([spec], store, "t", workers=1, vouch=lambda s: asked.append(s.slug))
        assert done == {spec.id: made}
    assert asked == ["kd"]  # once: what has passed is noted in the store
    assert "0 to do" not in capsys.readouterr().err


def test_where_the_fingerprint_has_moved_it_is_run_again_and_said(grid, capsys):
    spec, store, made = grid
    line = "results of kd moved (first at update 1), raise its version and name it in the changelog"
    [again] = complete([spec], store, "t", workers=1, vouch=lambda s: line).values()
    assert again.code["digest"] == spec.code.digest and again.student == made.student
    assert f"kd seed 0 is run again: its code has changed, and {line}" in capsys.readouterr().err
    assert len(store.made(spec)) == 2 and store.find(spec) == again


def test_records_held_to_other_numbers_or_to_none_are_not_even_asked_about(grid):
    spec, store, made = grid

    def never(_):
        raise AssertionError

    for fingerprint in ("g", None):
        fresh = Store(store.root.with_name(f"store of {fingerprint}"))
        fresh.save(made)
        other = dataclasses.replace(spec, code=dataclasses.replace(spec.code, fingerprint=fingerprint))
        assert complete([other], fresh, "t", workers=1, vouch=never)[spec.id].code["digest"] == spec.code.digest


def test_the_real_fingerprints_vouch_for_todays_code(monkeypatch):
    [spec] = plan(TRACK, ["kd"], [0], controls=False)
    assert vouch(spec) is None
    monkeypatch.setattr(fingerprints, "verify_method", lambda entry: f"results of {entry.slug} moved")
    fingerprints._vouched.cache_clear()
    assert vouch(spec) == "results of kd moved"
    fingerprints._vouched.cache_clear()


def test_every_method_and_setting_that_runs_offline_is_held_to_fingerprints():
    for track in ("image-classification/digits", "image-generation/gaussians", "language-modeling/markov", "speculative/markov"):
        for spec in plan(track, ["all"], [0]):
            assert spec.code.fingerprint is not None, (track, spec.slug)
            assert registry.find("method", spec.method, *spec.suite_card.kinds).distribution == "distillbench"
