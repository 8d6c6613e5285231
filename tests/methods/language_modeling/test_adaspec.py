"""Proof of adaspec: numpy oracle, the identities of Hu et al. 2025, numbers of the authors' trainer, and the whole method."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from distillbench.cards import registry
from distillbench.methods.language_modeling.adaspec import Selected, SelectedBatch, distill, selection
from distillbench.problems.language_modeling.problem import LanguageModeling
from distillbench.problems.language_modeling.texts import TokenBatch
from tests.methods.language_modeling.short import distilled, score, track
from tests.oracles.differences import gradient
from tests.oracles.language_modeling import adaspec as oracle

GOLDEN = json.loads((Path(__file__).parents[2] / "goldens" / "adaspec.json").read_text())


def excesses(seed: int, n: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.exponential(1, n)), torch.tensor(rng.exponential(1, n))


@pytest.mark.parametrize("keep", [0.05, 0.4, 0.7, 1.0])
@pytest.mark.parametrize("n", [1, 2, 11, 40])
def test_the_selection_equals_the_oracle(keep: float, n: int) -> None:
    for seed in range(5):
        draft, reference = excesses(seed, n)
        assert (selection(draft, reference, keep=keep).numpy() == oracle.selection(draft.numpy(), reference.numpy(), keep)).all()


@pytest.mark.parametrize("case", ["all", "kept", "everything"])
def test_numbers_of_the_authors_code(case: str) -> None:
    """With our selection and the oracle's losses; their gradient is that of the loss with the selection held still."""
    arrays = {k: np.array(v) for k, v in GOLDEN["inputs"].items()}
    counts = arrays["labels"][:, 1:] != -100
    draft, target, reference = (arrays[k][:, :-1][counts] for k in ("draft", "target", "reference"))
    keep = 1.0 if case == "everything" else 0.4
    kept = selection(*(torch.tensor(oracle.kl(z, target)) for z in (draft, reference)), keep=keep).numpy()
    assert len(kept) == 10 and kept.sum() == (10 if case == "everything" else 4)
    denominator = "all" if case == "all" else "kept"
    assert oracle.loss(draft, target, kept, denominator) == pytest.approx(GOLDEN["values"][case], rel=1e-5)
    slope = gradient(lambda z: np.array(oracle.loss(z, target, kept, denominator)), draft)
    theirs = np.array(GOLDEN["gradients"][case])[:, :-1][counts]
    np.testing.assert_allclose(slope, theirs, rtol=1e-4, atol=1e-6)


# --- the identities of the sheet ---


def test_2_where_draft_and_reference_agree_all_tokens_are_kept() -> None:
    draft, _ = excesses(0)
    assert selection(draft, draft.clone(), keep=0.1).all()


def test_3_a_constant_in_the_reference_and_the_order_of_tokens_change_nothing() -> None:
    draft, reference = excesses(1)
    kept = selection(draft, reference, keep=0.4)
    assert (selection(draft, reference + 2.0, keep=0.4) == kept).all()
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    assert (selection(draft[order], reference[order], keep=0.4) == kept[order]).all()


def test_4_of_11_tokens_04_keeps_5() -> None:
    draft, reference = excesses(2)
    assert selection(draft, reference, keep=0.4).sum() == 5


def test_trap_the_selection_is_by_difference_and_not_by_loss() -> None:
    draft, reference = torch.tensor([5.0, 1.0]), torch.tensor([5.0, 0.1])  # hard for both, learnable
    assert selection(draft, reference, keep=0.5).tolist() == [False, True]


def selected(keep: float) -> tuple[LanguageModeling, TokenBatch, SelectedBatch]:
    """Problem, the first batch of the text, and the same with its selection."""
    problem, _ = track()
    texts = problem.teacher_text()
    reference = problem.teacher.module  # a perfect reference: every excess is the draft's own loss
    return problem, next(texts.stream(0)), next(Selected(problem, reference, texts, keep).stream(0))


def loss_of(problem: LanguageModeling, denominator: str) -> Callable[[SelectedBatch], torch.Tensor]:
    """The loss that ``distill`` hands to its last loop, which trains nothing here."""
    run, found = track()[1], []
    run.loop = lambda learners, *_, **__: found.append(learners[0].loss)  # type: ignore[method-assign]
    distill(problem, run, keep=0.4, reference=0.1, denominator=denominator)
    return lambda batch: found[-1](batch)["kl"]


def test_the_batch_counts_the_kept_tokens_of_the_whole_batch_alone() -> None:
    problem, whole, batch = selected(0.4)
    loss = problem.divergence(whole).detach()
    kept = torch.tensor(oracle.selection(loss.double().numpy(), np.zeros(len(loss)), 0.4))
    assert torch.equal(batch.chosen.predicted.rows, whole.predicted.rows[kept])
    torch.testing.assert_close(problem.divergence(batch.chosen).detach(), loss[kept])
    assert batch.units() == {**whole.units(), "kept": int(kept.sum())}
    for name in ("ids", "attention", "response"):
        assert torch.equal(getattr(batch, name), getattr(whole, name))


@pytest.mark.parametrize("denominator", ["all", "kept"])
def test_5_the_two_denominators(denominator: str) -> None:
    problem, whole, batch = selected(0.4)
    loss = loss_of(problem, denominator)
    n = whole.predicted.count if denominator == "all" else batch.chosen.predicted.count
    values = problem.divergence(batch.chosen).detach()
    assert loss(batch).item() == pytest.approx(float(values.sum()) / n, rel=1e-5)
    parts = [batch.part(start, stop) for start, stop in ((0, 1), (1, 20), (20, len(batch)))]
    assert sum(loss(part).item() for part in parts) == pytest.approx(loss(batch).item(), rel=1e-5)


def test_6_at_match_there_is_no_gradient() -> None:
    problem, _ = track()
    net = problem.teacher.trainable_copy()
    batches = Selected(dataclasses.replace(problem, student=net), problem.student, problem.teacher_text(), 0.4)  # type: ignore[arg-type]
    values = problem.divergence(next(batches.stream(0)).chosen, student=net)  # type: ignore[arg-type]
    values.sum().backward()
    assert values.abs().max() < 1e-5 and all(p.grad is None or p.grad.abs().max() < 1e-4 for p in net.parameters())


@pytest.mark.parametrize("denominator", ["all", "kept"])
def test_a_part_without_a_kept_token_adds_nothing(denominator: str) -> None:
    problem, _, batch = selected(0.05)
    row = int((batch.kept.sum(1) == 0).nonzero()[0])
    loss = loss_of(problem, denominator)(batch.part(row, row + 1))
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in problem.student.parameters())


# --- the whole method ---


def test_1_with_every_token_it_is_forward_kl_on_the_same_budget() -> None:
    ours, _, run = distilled("adaspec", examples=640, keep=1.0, reference=0.5)
    assert run.phases["reference"]["student_examples"] == 320
    kl, *_ = distilled("gkd", examples=320, divergence="forward_kl", on_policy=0.0)
    assert all(torch.equal(ours.weights[k], v) for k, v in kl.weights.items())


def test_reference_and_draft_share_the_budget_and_begin_as_the_same_network() -> None:
    problem, run = track(examples=640)
    module = registry.find("method", "adaspec", "language-modeling").load()
    starts: list[dict[str, torch.Tensor]] = []
    loop = run.loop

    def noted(learners: list[object], *args: object, **options: object) -> None:
        starts.append({k: v.clone() for k, v in learners[0].module.state_dict().items()})  # type: ignore[attr-defined]
        loop(learners, *args, **options)  # type: ignore[arg-type]

    run.loop = noted  # type: ignore[assignment,method-assign]
    module.distill(problem, run, keep=0.4, reference=0.25, denominator="all")
    assert run.meter.counts["student_examples"] == 640
    assert len(starts) == 2 and all(torch.equal(starts[0][k], v) for k, v in starts[1].items())


def test_it_comes_closer_to_the_teacher_than_the_references_alone() -> None:
    ours, *_ = distilled("adaspec", examples=3200, keep=0.9)
    scratch, *_ = distilled("scratch", examples=3200)
    assert score(ours) < score(scratch)
