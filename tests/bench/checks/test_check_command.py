"""What ``distillbench check`` says of cards, exemptions and odd files, and how it says it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distillbench.checks import CHECKS, check_method
from distillbench.cli import main as cli
from tests.bench.checks.planted import BODY, FIT, KD, LONG, TERM, TRAINING, Change, failures, write

# --- bugs of the card -------------------------------------------------------------------------------------------------

CARD: dict[str, tuple[list[Change], str]] = {
    "a hyper-parameter that distill does not take": (
        [('{"temperature": Real(4.0, gt=0)}', '{"temperature": Real(4.0, gt=0), "gamma": Real(1.0)}')],
        "differ: gamma",
    ),
    "an argument that is not on the card": (
        [("run: Run, *, temperature: float", "run: Run, *, temperature: float, alpha: float = 1")],
        "alpha",
    ),
    "an equation of nothing": ([('equations={"divergence":', 'equations={"divergense":')], "names divergense"),
    "an objective of nothing": ([('objective="divergence"', 'objective="kl"')], "names kl"),
    "no equation": ([('{"divergence": "L = T^2 sum_c p_t (log p_t - log p_s), p = softmax(z/T)"}', "{}")], "state the objective"),
    "no distill": ([("def distill(", "def distil(")], "no distill"),
    "something left to fill in": ([('title="its name"', 'title="TODO"')], "TODO"),
    "no paper": ([('    paper=Paper(title="the paper\'s title", year=2026, arxiv=None),\n', "")], "where the method comes from"),
}


@pytest.mark.parametrize("bug", CARD)
def test_card(tmp_path: Path, bug: str) -> None:
    changes, message = CARD[bug]
    assert message in failures(write(tmp_path, *changes), {"card"})["card"]


def exempting(**reasons: str) -> Change:
    return '    claims=[Beats("kd")],\n', f'    claims=[Beats("kd")],\n    exempt={reasons!r},\n'


def test_exemption_that_is_needed(tmp_path: Path) -> None:
    method = write(tmp_path, exempting(class_padding="it is a mean"), (TERM, TERM.replace("sum", "mean")))
    [result] = check_method(method, only=["class_padding"])[:1]
    assert (result.outcome, result.message) == ("exempt", "it is a mean")


@pytest.mark.parametrize("name", ["class_padding", "oracle_value"])  # the one passes, the other cannot apply
def test_stale_exemption(tmp_path: Path, name: str) -> None:
    assert "stale exemption" in failures(write(tmp_path, exempting(**{name: "once upon a time"})), {name})[name]


def test_exemption_of_no_check(tmp_path: Path) -> None:
    assert "do not exist: clas_padding" in failures(write(tmp_path, exempting(clas_padding="a slip")), {"card"})["exemptions"]


def test_nothing_checked(tmp_path: Path) -> None:
    control = ('    objective="divergence",\n', "    control=True,\n")
    method = write(
        tmp_path,
        control,
        exempting(
            **dict.fromkeys(sorted(TRAINING | LONG - {"teacher_matters", "arguments", "used", "held", "gains", "fresh_answers"}), "no")
        ),
        (FIT, "    raise ValueError\n"),
    )
    results = check_method(method)
    assert {r.outcome for r in results if r.name not in ("card", "imports", "something_checked")} == {"skipped", "exempt"}
    assert [r.name for r in results if r.outcome == "failed"] == ["something_checked"]


# --- the command --------------------------------------------------------------------------------------------------


def test_command_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", write(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [r["check"] for r in rows] == list(CHECKS)
    assert {r["outcome"] for r in rows} == {"passed", "skipped", "unproven"}  # it has no oracle, which is no failure
    assert all(set(r) == {"check", "outcome", "message"} for r in rows)


def test_command_says_what_is_unproven(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(CHECKS):
        if name not in ("oracle_value", "card"):
            monkeypatch.delitem(CHECKS, name)
    assert cli.main(["check", write(tmp_path)]) == 3  # nothing else could be checked
    assert capsys.readouterr().err.splitlines()[-1] == "distillbench: unproven, which is no pass: oracle_value"


def test_frozen_names_are_there(tmp_path: Path) -> None:
    for said, message in (("divergense", "not a function of the module"), ("divergence", "does not take")):
        held = ('    claims=[Beats("kd")],\n', f'    claims=[Beats("kd")],\n    frozen={{"{said}": ["teacher_logit"]}},\n')
        assert message in failures(write(tmp_path, held), {"held"})["held"]


def test_command_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method = write(tmp_path, (KD, "kd=(student - teacher) ** 2,"), (BODY, TERM))
    assert cli.main(["check", method]) == 3
    lines = {line.split("\t")[1]: line.split("\t")[0] for line in capsys.readouterr().out.splitlines()[1:]}
    assert lines["temperature_scale"] == lines["beats_scratch"] == "failed"
    assert lines["card"] == "passed"


def test_command_shows_each_check_as_it_finishes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    for name in CHECKS:
        if name != "card":
            monkeypatch.setitem(CHECKS, name, lambda subject: shown.append(capsys.readouterr().out))
    assert cli.main(["check", write(tmp_path)]) == 0
    assert [line.split("\t")[:2] for line in shown[0].splitlines()] == [["outcome", "check"], ["passed", "card"]]
    assert [text.split("\t")[1] for text in shown[1:]] == list(CHECKS)[1:-1]  # one each


def test_command_on_what_is_no_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.py").write_text("x = 1\n")
    for name in (str(tmp_path / "empty.py"), str(tmp_path / "none.py"), "kdd"):
        assert cli.main(["check", name]) == 2
        assert capsys.readouterr().err.count("\n") == 1
