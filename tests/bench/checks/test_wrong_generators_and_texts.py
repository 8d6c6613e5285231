"""Kinds of subtly wrong generators and language models: see :mod:`test_kinds_of_wrong`."""

from __future__ import annotations

from pathlib import Path

import pytest

from distillbench.checks import check_method
from tests.bench.checks.planted import Change
from tests.bench.checks.test_objectives import own, plant

pytestmark = pytest.mark.slow  # a second or two each, and many

STATES = "theirs = batch.predicted.take(problem.teacher.states(batch))"
GKD = "problem.divergence(batch, divergence, beta=beta)"
PER_ROW = "values.new_zeros(len(batch)).index_add_(0, batch.predicted.rows // batch.ids.shape[1], values) / batch.ids.shape[1]"
SCORES = "*game.denoised(noisy, sigma, batch.condition)"
SWAPPED_JS = """def token_divergence(model, states, teacher, *, vocab, divergence, beta):
    return shared(model, states, teacher, vocab=vocab, divergence=divergence, beta=1 - beta)
"""
OWN_JS = (
    own(SWAPPED_JS)[0],
    f"from distillbench.problems.language_modeling.oracle import token_divergence as shared\n\n\n{SWAPPED_JS}",
)
TAID = """    with torch.enable_grad():
        q = real_logits(model, states, vocab)
        p = interpolated(q, real_logits(target, theirs, vocab).detach(), t).softmax(1)
    return (p * (p.log() - q.log_softmax(1))).sum(1)
"""
OTHERS: dict[str, tuple[str, str, list[Change], str]] = {
    "text shifted by one token, along the batch": ("language_modeling/taid", "alignment", [(STATES, f"{STATES}.roll(1, 0)")], "shifted"),
    "text shifted by one token, along the texts": (
        "language_modeling/taid",
        "alignment",
        [(STATES, STATES.replace("states(batch)", "states(batch).roll(-1, 1)"))],
        "shifted",
    ),
    "text shifted by one token, by the teacher's batch": (
        "language_modeling/minillm",
        "alignment",
        [(STATES, STATES.replace("states(batch)", "states(batch).roll(1, 1)"))],
        "shifted",
    ),
    "JS exchanged where it is called": ("language_modeling/gkd", "arguments", [(GKD, GKD.replace("beta=beta", "beta=1 - beta"))], "beta"),
    "JS exchanged in the objective": ("language_modeling/gkd", "oracle_value", [OWN_JS], "differs from its oracle"),
    "KL reversed where it is called": (
        "language_modeling/adaspec",
        "arguments",
        [("problem.divergence(batch.chosen)", "problem.divergence(batch.chosen, 'reverse_kl')")],
        "divergence='reverse_kl'",
    ),
    "mean over padding, by row": (
        "language_modeling/gkd",
        "token_padding",
        [('(values, "tokens")', PER_ROW)],
        "padding",
    ),
    "mean over padding, by token": (
        "language_modeling/gkd",
        "token_padding",
        [('(values, "tokens")', '(values * values.numel() / batch.ids.numel(), "tokens")')],
        "padding",
    ),
    "scores exchanged where dmd calls": ("image_generation/dmd", "arguments", [(SCORES, f"{SCORES}[::-1]")], "are arguments exchanged"),
    "scores exchanged where diff-instruct calls": (
        "image_generation/diff_instruct",
        "arguments",
        [(SCORES, "*reversed(game.denoised(noisy, sigma, batch.condition))")],
        "are arguments exchanged",
    ),
    "the student's score for the fake one": (
        "image_generation/dmd",
        "arguments",
        [(SCORES, "game.denoised(noisy, sigma, batch.condition)[1], game.student(noisy, sigma, batch.condition)")],
        "does not follow the teacher",
    ),
    "a gradient into the consistency target": (
        "image_generation/consistency_distillation",
        "frozen_arguments",
        [("output - target.detach()", "output - target")],
        "reaches target",
    ),
    "a gradient into ict's target": ("image_generation/ict", "frozen_arguments", [("target.detach()", "target")], "reaches target"),
    "a gradient into a target of another name": (
        "image_generation/consistency_distillation",
        "held",
        [
            ("def consistency_loss(output: Tensor, target: Tensor", "def consistency_loss(output: Tensor, anchor: Tensor"),
            ("output - target.detach()", "output - anchor"),
            ('"consistency_loss": ["target"]', '"consistency_loss": ["anchor"]'),
            ("        with torch.no_grad():\n            answer", "        with torch.enable_grad():\n            answer"),
            ("(learner.target or student)(", "student("),
        ],
        "passes through consistency_loss's anchor",
    ),
    "a gradient into the fake score": (
        "image_generation/diff_instruct",
        "frozen_arguments",
        [("(fake_denoised - real_denoised).detach()", "(fake_denoised - real_denoised)")],
        "reaches",
    ),
    "a gradient into TAID's own distribution": (
        "language_modeling/taid",
        "held",
        [("    return token_divergence(model, states, towards, vocab=vocab)\n", TAID)],
        "passes through what interpolated gives",
    ),
    "a gradient into TAID's own distribution, by its value": (
        "language_modeling/taid",
        "oracle_gradient",
        [("    return token_divergence(model, states, towards, vocab=vocab)\n", TAID)],
        "held still",
    ),
    "texts that are kept out of training": (
        "language_modeling/scratch",
        "splits",
        [
            ("problem.data)", "dataclasses.replace(problem.data, texts=problem.validation))"),
            ("from distillbench.cards", "import dataclasses\n\nfrom distillbench.cards"),
        ],
        "problem.validation",
    ),
    "texts changed in place": (
        "language_modeling/gkd",
        "data_intact",
        [("        values = ", "        batch.response[0, -1] = False\n        values = ")],
        "in place",
    ),
    "texts of the pool changed in place": (
        "language_modeling/taid",
        "data_intact",
        [("        states = ", "        problem.references.ids[0, 0] = 1\n        states = ")],
        "the training changed problem.",
    ),
    "text that the teacher did not write": (
        "language_modeling/seqkd",
        "teacher_matters",
        [("problem.teacher_text(temperature=temperature)", "problem.data")],
        "never asked",
    ),
    "pairs of the teacher that nobody reads": (
        "image_generation/ode_pairs",
        "teacher_matters",
        [("pair_loss(answer, target)", "pair_loss(answer, noise)"), ("initialise(problem, run, share=initial_share)", "pass")],
        "change nothing",
    ),
}


@pytest.mark.parametrize("bug", OTHERS)
def test_a_wrong_generator_or_language_model(tmp_path: Path, bug: str) -> None:
    method, check, changes, message = OTHERS[bug]
    [result] = [r for r in check_method(plant(tmp_path, method, *changes), only=[check]) if r.name == check]
    assert result.outcome == "failed", result
    assert message in result.message
