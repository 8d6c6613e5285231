"""What an identity is made of, whose word its versions are, and when yesterday's result stands for today's code."""

from __future__ import annotations

import dataclasses
import os
import re
import signal

import pytest

from distillbench import code
from distillbench.cards import registry
from distillbench.runs import identities
from distillbench.runs.plan import plan
from distillbench.runs.record import Record
from distillbench.runs.runner import execute
from distillbench.runs.store import Store
from distillbench.training.observer import Observer
from distillbench.training.run import Run

TRACK = "image-classification/blobs"
FIND = registry.find


def spec_of(method, **options):
    [spec] = plan(TRACK, [str(method)], [0], controls=False, budget={"student_examples": 640}, **options)
    return spec


def test_an_identity_names_versions_and_no_prose():
    identity = spec_of("kd").identity
    assert identity["method"]["slug"] == "kd" and identity["method"]["distribution"] == "distillbench"
    assert identity["kind"] == {"slug": "classification", "version": 1}
    for prose in ("Knowledge distillation", "Overlapping Gaussian", "fraction of the split", "CC BY"):
        assert prose not in str(identity)
    assert identity["setting"]["metrics"] == ["top1", "nll", "ece", "agreement"]


def test_prose_on_cards_changes_no_identity_and_a_version_does(monkeypatch):
    found = FIND("method", "kd")
    base = spec_of("kd").id

    def told(**fields):
        other = dataclasses.replace(found, card=dataclasses.replace(found.card, **fields))
        monkeypatch.setattr(registry, "find", lambda kind, name, *a: other if kind == "method" else FIND(kind, name, *a))
        return spec_of("kd").id

    assert told(title="x", notes="y", claims=(), deviations=("z",)) == base
    assert told(version=2) != base


def test_where_an_asset_lies_is_no_part_of_the_identity():
    suite = registry.suite_card(FIND("suite", "speculative")).at("smollm2")
    frame = {"precision": "bfloat16", "split": "test", "distribution": "d", "kind": 1, "loose": None}
    one = identities.arena(suite, digests={"data": "a", "teacher": "b"}, **frame)
    assert not [k for k in one["setting"]["options"] if k.startswith(("data_", "teacher_"))]
    assert one["setting"]["digests"] == {"data": "a", "teacher": "b"}
    assert identities.arena(suite, digests={"data": "a", "teacher": "c"}, **frame) != one
    assert identities.arena(suite, digests={"data": "a", "teacher": "b"}, **{**frame, "precision": "float32"}) != one


def test_a_kind_of_another_package_has_no_version():
    assert identities.kind_version("classification") == 1
    assert identities.kind_version("weaving") is None and identities.kind_version("../cards") is None


def test_the_text_of_a_loose_file_is_in_its_record(tmp_path, write_method):
    path = write_method("mine")
    record = execute(spec_of(path), Store(tmp_path / "s"))
    assert record.sources["mine"] == path.read_text() and record.identity["method"]["loose"]
    assert record.identity["method"]["distribution"] is None and "mine" in record.code["loose"]
    assert Record.from_bytes(record.to_bytes()) == record


def test_the_text_of_an_installed_method_is_in_its_record_and_not_in_its_identity():
    spec = spec_of("kd")
    assert spec.code.sources()["distillbench.methods.classification.kd"] == FIND("method", "kd").path.read_text()
    assert "loose" not in spec.identity["method"] or "distillbench.methods.classification.kd" in spec.code.loose


def test_cards_must_fit_the_identity():
    spec = spec_of("kd")
    card = registry.method_card(FIND("method", "kd"))
    assert identities.fits(spec.identity, card, spec.suite_card, "blobs")
    assert not identities.fits(spec.identity, dataclasses.replace(card, slug="dkd"), spec.suite_card, "blobs")
    assert not identities.fits(spec.identity, card, spec.suite_card, "digits")


# --- imports ------------------------------------------------------------------------------------------------------


def test_a_helper_that_a_loose_file_imports_is_part_of_it(tmp_path, monkeypatch, write_method):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "helper_of_mine.py").write_text("T = 2.0\n")
    path = write_method("mine", "import helper_of_mine\nreturn run.fit(problem.student, loss, problem.batches)")
    first = spec_of(path)
    record = execute(first, Store(tmp_path / "s"))
    assert record.status == "ok" and set(record.sources) >= {"mine", "helper_of_mine"}
    (tmp_path / "helper_of_mine.py").write_text("T = 3.0\n")
    assert spec_of(path).id != first.id


@pytest.mark.parametrize(
    "how",
    [
        "import importlib\nimportlib.import_module('hidden_' + 'helper')",
        "__import__('hidden_' + 'helper')",
        "exec('import hidden_helper')",
    ],
)
def test_an_import_that_was_not_planned_fails_the_run_every_time(tmp_path, monkeypatch, write_method, how):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "hidden_helper.py").write_text("T = 2.0\n")
    monkeypatch.syspath_prepend(folder)
    path = write_method("mine", how + "\nreturn run.fit(problem.student, loss, problem.batches)")
    for _ in range(2):  # the first run's import is not forgotten by the second
        record = execute(spec_of(path), Store(tmp_path / "s"))
        assert record.status == "failed" and record.measurements == ()
        said = "calls exec" if how.startswith("exec") else "imported hidden_helper"
        assert said in record.reason and re.search("write (the import as a|an import) statement", record.reason)


def test_a_helper_that_another_method_imported_by_right_is_not_at_hand(tmp_path, monkeypatch, write_method):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "helper_of_both.py").write_text("T = 2.0\n")
    fit = "\nreturn run.fit(problem.student, loss, problem.batches)"
    open_, secret = write_method("open", "import helper_of_both" + fit), write_method("secret", "__import__('helper_' + 'of_both')" + fit)
    assert execute(spec_of(open_), Store(tmp_path / "s")).status == "ok"
    record = execute(spec_of(secret), Store(tmp_path / "s"))
    assert record.status == "failed" and "imported helper_of_both" in record.reason
    assert execute(spec_of(open_), Store(tmp_path / "t")).status == "ok"


# --- reuse --------------------------------------------------------------------------------------------------------


def with_code(spec, digest, fingerprint):
    return dataclasses.replace(spec, code=dataclasses.replace(spec.code, digest=digest, fingerprint=fingerprint))


def test_a_record_of_other_code_is_not_used_again_until_the_fingerprint_has_passed(tmp_path):
    spec, store = spec_of("kd"), Store(tmp_path / "s")
    made = dataclasses.replace(execute(spec, Store(tmp_path / "first")), code={"digest": "a", "fingerprint": "f", "loose": {}})
    store.save(made)
    assert store.find(with_code(spec, "a", "f")) == made
    assert store.find(with_code(spec, "b", "f")) is None and store.made(spec) == [made]
    store.passed(with_code(spec, "b", "f"))
    assert store.find(with_code(spec, "b", "f")) == made
    assert store.find(with_code(spec, "c", "f")) is None  # what passed was other code
    assert store.find(with_code(spec, "b", "g")) is None  # the record was held to other numbers
    store.passed(with_code(spec, "b", None))
    assert store.find(with_code(spec, "b", None)) is None


def test_a_checkpoint_of_other_code_is_refused(tmp_path, write_method, monkeypatch):
    path, store = write_method("mine"), Store(tmp_path / "s")
    init, saves = Run.__init__, []

    class Dies(Observer):
        def saved(self, written):
            saves.append(written)
            if len(saves) == 4:
                os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "__init__", lambda self, **options: init(self, **{**options, "code": "yesterday's", "observer": Dies()}))
        assert execute(spec_of(path), store, checkpoint_seconds=0.0).status == "failed"
    assert list(store.folder(spec_of(path)).glob("*.checkpoint"))
    monkeypatch.setattr("warnings.warn", lambda text, **_: (tmp_path / "said").write_text(text))  # in the worker, a fork of this process
    record = execute(spec_of(path), store, checkpoint_seconds=0.0)
    assert "written by other code than today's" in (tmp_path / "said").read_text()
    assert record.student == execute(spec_of(path), Store(tmp_path / "fresh")).student


def test_a_changed_shared_loss_is_run_again(tmp_path, monkeypatch):
    """T^2 removed from the loss that many methods share: the record of yesterday's loss is not today's result."""
    store = Store(tmp_path)
    before = execute(spec_of("kd"), store)
    assert store.find(spec_of("kd")) == before
    losses, real = code.source("distillbench.problems.classification.losses"), code.text

    def edited(path):
        text = real(path)
        assert path != losses or b"temperature**2 * F.kl_div" in text
        return text.replace(b"temperature**2 * F.kl_div", b"1 * F.kl_div") if path == losses else text

    monkeypatch.setattr(code, "text", edited)
    assert spec_of("kd").code.digest != before.code["digest"]
    assert store.find(spec_of("kd")) is None
