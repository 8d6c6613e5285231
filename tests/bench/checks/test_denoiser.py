"""A generator's loss may pass through the teacher, but through its door."""

import pytest

from distillbench.checks import check_method

DENOISER = """
import torch
from distillbench.cards.card import Card, Paper
CARD = Card(slug="planted", version=1, problem="image-generation", title="planted", paper=Paper(title="none", year=2026))
def distill(problem, run):
    def loss(batch):
        made = problem.student(torch.randn_like(batch.inputs), torch.ones(len(batch)), batch.labels)
        answer = {ask}
        return run.loss(batch, pull=(answer**2).sum(1))
    return run.fit(problem.student, loss, problem.batches, recipe=problem.recipe(1))
"""


@pytest.mark.parametrize(
    ("ask", "outcome"),
    [
        ("problem.teacher.denoise(made, torch.ones(len(batch)), differentiable=True)", "passed"),
        ("problem.teacher._module(made, torch.ones(len(batch)))", "failed"),
    ],
)
def test_the_graph_through_a_denoiser_is_asked_for_at_its_door(tmp_path, ask, outcome):
    path = tmp_path / "planted.py"
    path.write_text(DENOISER.format(ask=ask))
    [result] = check_method(str(path), only=["teacher_intact"])
    assert result.outcome == outcome, result.message
    assert outcome == "passed" or "asked with gradients on" in result.message
