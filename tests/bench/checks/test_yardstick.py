"""A short training shows what a method does better than scratch, and is not taken in by methods that learn the wrong thing, or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from distillbench.checks import check_method, yardstick
from distillbench.checks.core import Subject

PROBLEMS = Path(__file__).parents[3] / "bench" / "problems"
Change = tuple[str, str]

pytestmark = pytest.mark.slow

METHODS = {  # clean ones, which a short training shows to be ahead
    "classification": PROBLEMS / "classification" / "method.txt",
    "image-generation": PROBLEMS.parents[1] / "methods" / "image_generation" / "dmd.py",
    "language-modeling": PROBLEMS / "language_modeling" / "method.txt",
}
KD = "divergence(student, teacher, temperature=temperature)"
CE = "ce=cross_entropy(student, batch.labels),"
MATCH = "gradient = matching_gradient(generated, *game.denoised(noisy, sigma, batch.condition))"
ALONE = ("if references is not None:", "if False:")
TEXT = 'problem.divergence(batch, "forward_kl")'
BUGS: dict[str, tuple[str, list[Change]]] = {
    "nothing is learnt": ("classification", [(CE, ""), (f"kd={KD}", f"kd=0 * {KD}")]),
    "away from the teacher": ("classification", [(CE, ""), (f"kd={KD}", f"kd=-{KD}")]),
    "the teacher's answers to other examples": ("classification", [("teacher.logits(batch)", "teacher.logits(batch).roll(1, 0)")]),
    "labels of other examples": (
        "classification",
        [(CE, CE.replace("batch.labels", "batch.labels.roll(1)")), (f"kd={KD}", f"kd=0 * {KD}")],
    ),
    "a generator that stays where it starts": ("image-generation", [(MATCH, f"{MATCH} * 0"), ALONE]),
    "a generator that flees from the teacher": ("image-generation", [(MATCH, MATCH.replace("= ", "= -", 1)), ALONE]),
    "a generator that learns others' samples": (
        "image-generation",
        [(MATCH, f"{MATCH} * 0"), ("answer - target", "answer - target.roll(1, 0)")],
    ),
    "no word is learnt": ("language-modeling", [(TEXT, f"0 * {TEXT}")]),
    "away from the teacher's words": ("language-modeling", [(TEXT, f"-{TEXT} / 10")]),
    "the student's own words": ("language-modeling", [(TEXT, "problem.nll(batch)"), ("fraction=on_policy", "fraction=1.0")]),
}


def planted(folder: Path, problem: str, *changes: Change) -> str:
    """The clean method for ``problem`` with ``changes`` (old text -> new text); its path."""
    text = METHODS[problem].read_text().replace("{slug}", "planted").replace('slug="dmd"', 'slug="planted"')
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "planted.py").write_text(text)
    return str(folder / "planted.py")


@pytest.mark.parametrize("problem", METHODS)
def test_a_clean_method_is_ahead_at_once(tmp_path, problem):
    assert METHODS.keys() == yardstick.SHORT.keys()
    assert "better than scratch" in (yardstick.shown_early(Subject(planted(tmp_path, problem))) or "")


@pytest.mark.parametrize("bug", BUGS)
def test_a_short_training_is_not_taken_in(tmp_path, bug):
    problem, changes = BUGS[bug]
    assert yardstick.shown_early(Subject(planted(tmp_path, problem, *changes))) is None


def test_where_it_does_not_show_the_whole_budget_decides(tmp_path, monkeypatch):
    method = planted(tmp_path, "classification", *BUGS["nothing is learnt"][1])
    [result] = [r for r in check_method(method, only=["beats_scratch"]) if r.name == "beats_scratch"]
    assert (result.outcome, "32,000 examples" in result.message) == ("failed", True)
    monkeypatch.setattr(yardstick, "LONG", 64 * 120)
    monkeypatch.setitem(yardstick.SHORT, "classification", yardstick.Short(128))  # too short for anything
    [result] = [r for r in check_method(planted(tmp_path, "classification"), only=["beats_scratch"]) if r.name == "beats_scratch"]
    assert (result.outcome, "7,680 examples" in result.message) == ("passed", True)


def test_a_card_that_denies_it_is_judged_by_the_whole_budget(tmp_path, monkeypatch):
    monkeypatch.setattr(yardstick, "shown_early", lambda subject: pytest.fail("a short training says nothing against the card"))
    claims = '    claims=[Beats("kd")],\n'
    method = planted(tmp_path, "classification", (claims, f'{claims}    exempt={{"beats_scratch": "it is ahead"}},\n'))
    [result] = [r for r in check_method(method, only=["beats_scratch"]) if r.name == "beats_scratch"]
    assert (result.outcome, "stale exemption" in result.message) == ("failed", True)
