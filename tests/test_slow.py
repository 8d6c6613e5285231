"""A slow test is left out where it is known to pass with exactly what it rests on, and for no other reason."""

from __future__ import annotations

import os
import shutil
from types import SimpleNamespace

import pytest

from distillbench.cards import registry
from tests import conftest, slow

HELPER = '"""A helper."""\n\n\ndef one():\n    return 1  # one\n'
TEST = "from slow_helper import one\n\n\ndef test_it():\n    assert one() == 1\n"
CONTRACT = slow.ROOT / "tests" / "methods" / "test_contract.py"
CACHED = (slow._closure, slow._named, slow._bytes, slow._beside)


def fresh(test, *parameters):
    """The digest as a new process would find it."""
    for function in CACHED:
        function.cache_clear()
    return slow.digest(test, parameters)


@pytest.fixture(autouse=True)
def forget():
    yield
    for function in CACHED:
        function.cache_clear()


@pytest.fixture
def test_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "slow_helper.py").write_text(HELPER)
    (tmp_path / "test_it.py").write_text(TEST)
    return tmp_path / "test_it.py"


def test_code_counts_and_time_and_prose_do_not(test_file):
    helper = test_file.with_name("slow_helper.py")
    first = fresh(test_file)
    os.utime(test_file, (0, 0))
    helper.write_text(HELPER.replace("A helper", "It helps").replace("# one", "# still one"))
    assert fresh(test_file) == first
    helper.write_text(HELPER.replace("return 1", "return 2"))
    assert fresh(test_file) != first
    helper.write_text(HELPER)
    assert fresh(test_file) == first
    test_file.write_text(TEST.replace("== 1", ">= 1"))
    assert fresh(test_file) != first


@pytest.mark.parametrize(
    ("said", "module"),
    [
        ('"from distillbench.runs.guard import guard"', "distillbench.runs.guard"),
        ('sys.executable, "-m", "distillbench"', "distillbench.cli.commands"),
    ],
)
def test_what_stands_in_a_string_counts(test_file, monkeypatch, said, module):
    test_file.write_text(f"{TEST}\n\nWORDS = ({said},)\n")
    seen = {}
    monkeypatch.setattr(slow.code, "syntax_digest", lambda modules: seen.update(modules) or "")
    fresh(test_file)
    assert module in seen


def test_what_is_named_counts(test_file, monkeypatch):
    test_file.write_text(f'{TEST}\n\nTRACK, METHOD, GOLDEN = "speculative/markov", "kd.temperature=2", "goldens/kd.json"\n')
    modules, named, goldens = slow._named(test_file)
    assert (modules, named, {g.name for g in goldens}) == (set(), {"speculative", "classification/kd"}, {"kd.json"})
    seen = {}
    monkeypatch.setattr(slow.code, "syntax_digest", lambda modules: seen.update(modules) or "")
    fresh(test_file)
    assert seen.keys() >= {"distillbench.suites.speculative.markov", "distillbench.suites.image_classification.blobs",
                           "distillbench.methods.classification.kd", "distillbench.methods.classification.shuffled_teacher",
                           "tests.oracles.classification.kd"}  # fmt: skip
    assert "distillbench.methods.classification.dkd" not in seen


def rests_on(monkeypatch, key):
    seen = {}
    with monkeypatch.context() as patch:
        patch.setattr(slow.code, "syntax_digest", lambda modules: seen.update(modules) or "")
        slow.digest(CONTRACT, [registry.methods()[key]])
    return seen


def test_a_methods_contract_rests_on_the_method_the_checks_and_what_it_is_trained_on(monkeypatch):
    seen = rests_on(monkeypatch, "image-generation/dmd")
    for name in ("methods.image_generation.dmd", "methods.image_generation.scratch", "problems.image_generation.matching",
                 "checks.training", "checks.yardstick", "training.run", "runs.runner", "suites.image_generation.gaussians",
                 "suites.metrics.mmd"):  # fmt: skip
        assert f"distillbench.{name}" in seen
    for name in ("methods.image_generation.dmd2", "methods.classification.kd", "leaderboard.table", "cli.commands"):
        assert f"distillbench.{name}" not in seen
    assert "tests.oracles.image_generation.dmd" in seen


def test_a_methods_card_counts(monkeypatch):
    entry = registry.methods()["classification/kd"]
    first = slow.digest(CONTRACT, [entry])
    assert slow.digest(CONTRACT, [registry.methods()["classification/dkd"]]) != first
    monkeypatch.setattr(slow, "_card", lambda key: "another" if key == entry.key else "the same")
    assert slow.digest(CONTRACT, [entry]) != first


# --- which are run ---


def item(name, marks=("slow",)):
    return SimpleNamespace(nodeid=name, path=CONTRACT, user_properties=[], get_closest_marker=lambda m: m in marks or None)


def chosen(monkeypatch, mode, items):
    monkeypatch.setattr(slow, "digest", lambda path, parameters: "now")
    gone = []
    config = SimpleNamespace(
        option=SimpleNamespace(slow=mode),
        stash=pytest.Stash(),
        hook=SimpleNamespace(pytest_deselected=lambda items: gone.extend(items)),
    )
    conftest.pytest_configure(config)
    conftest.pytest_collection_modifyitems(config, items)
    assert config.stash[conftest.LEFT_OUT] == len(gone)
    return [i.nodeid for i in items]


def test_known_to_pass_and_changed(monkeypatch, tmp_path):
    monkeypatch.setattr(slow, "PASSED", tmp_path / "passed.txt")
    names = ["fast", "passed as it is", "passed before", "never passed", "passed on two branches"]

    def items():
        return [item(n, () if n == "fast" else ("slow",)) for n in names]

    assert chosen(monkeypatch, "changed", items()) == names
    slow.remember({"passed as it is": "now", "passed before": "then", "fast": "now", "passed on two branches": "then"})
    with slow.PASSED.open("a") as stream:
        stream.write("now passed on two branches\n")  # what a merge leaves
    assert chosen(monkeypatch, "changed", items()) == ["fast", "passed before", "never passed"]
    assert chosen(monkeypatch, "whole", items()) == chosen(monkeypatch, "all", items()) == names
    slow.remember({"a test[with words]": "1" * 16})
    assert slow.passed() == {("1" * 16, "a test[with words]")}


def test_a_whole_run_is_remembered_if_everything_passes(monkeypatch, tmp_path):
    monkeypatch.setattr(slow, "PASSED", tmp_path / "passed.txt")
    monkeypatch.setattr(conftest, "PASSED", {})
    for name, when, outcome in (("a", "call", "passed"), ("b", "setup", "passed"), ("c", "call", "skipped"), ("d", "call", "failed")):
        report = SimpleNamespace(nodeid=name, when=when, outcome=outcome, user_properties=[(conftest.PROPERTY, "now"), ("other", 1)])
        conftest.pytest_runtest_logreport(report)
    for mode, status in (("whole", 1), ("changed", 0), ("all", 0)):
        conftest.pytest_sessionfinish(SimpleNamespace(config=SimpleNamespace(option=SimpleNamespace(slow=mode))), status)
        assert not slow.PASSED.exists()
    conftest.pytest_sessionfinish(SimpleNamespace(config=SimpleNamespace(option=SimpleNamespace(slow="whole"))), 0)
    assert slow.passed() == {("now", "a")}


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_merged_branches_keep_both_lines():
    assert "tests/passed.txt merge=union" in (slow.ROOT / ".gitattributes").read_text()
