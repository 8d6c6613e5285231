"""AdaSPEC (Hu et al. 2025): a draft model learns the tokens that a reference of its own size could learn, and leaves out the others."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from distillbench.cards.card import Beats, Card, Choice, Paper, Real
from distillbench.problems.language_modeling.models import LanguageModel
from distillbench.problems.language_modeling.oracle import token_divergence as token_divergence
from distillbench.problems.language_modeling.problem import LanguageModeling
from distillbench.problems.language_modeling.texts import TextBatches, TokenBatch
from distillbench.training.data import Batches, Request
from distillbench.training.run import Learner, Losses, Run
from distillbench.training.student import Student

CARD = Card(
    slug="adaspec",
    version=1,
    problem="language-modeling",
    title="Selective distillation for speculative decoders",
    paper=Paper(
        title="AdaSPEC: Selective Knowledge Distillation for Efficient Speculative Decoders",
        year=2025,
        arxiv="2510.19779",
        code="https://github.com/yuezhouhu/adaspec/blob/381904cf3d362265e6bde7490fa5539a56265a73/README.md",
        catalogue="adaspec",
        row=164,
    ),
    objective="token_divergence",
    equations={
        "selection": "S = tokens whose KL(p || q) - KL(p || q_reference) is in the top fraction k of the batch",
        "distill": "L = (1/N) sum over tokens in S KL(p || q)",
    },
    hyperparameters={
        "keep": Real(0.7, gt=0, le=1, note="k, the fraction of tokens that is learned; authors: 0.4 on every task, over several epochs"),
        "reference": Real(
            0.1, gt=0, lt=1, note="share of the budget that trains the reference; authors: as many epochs as the draft or more"
        ),
        "denominator": Choice("all", options=["all", "kept"], note="N: all tokens of the batch, as the authors' trainer, or those kept"),
    },
    claims=[
        Beats("scratch"),
        Beats(
            "distillspec",
            metric="acceptance",
            source="README of the authors' code, 3 epochs, Pythia 31M from 1.4B: GSM8K 57.58 to 62.63 percent, Alpaca 44.34 to 47.25, "
            "MBPP 46.88 to 47.73, CNN/DM 73.05 to 74.22, XSum 47.24 to 49.11",
        ),
    ],
    deviations=[
        "The reference's training is paid out of the run's own budget of student examples, so the draft gets fewer than a method without "
        "a reference; the authors add it on top.",
        "The fraction is one of the whole batch's tokens; the authors' is one of every device's micro-batch.",
        "The teacher is asked twice about each batch of the draft, for the selection and for the loss.",
        "The text is the teacher's own; the authors train on the responses of a data set that the target was tuned on.",
    ],
    notes="On the tune chain the fewer tokens are left out the better: kl 0.678 (reference 0.5) to 0.701 (reference 0.1) at keep 0.4, "
    "the authors' value; 0.558 at 0.7 and 0.462 at 0.9 (both reference 0.1). The default is a compromise: 300 updates end far "
    "from what the draft can hold, so every token is still worth learning.",
)


@dataclass(frozen=True, kw_only=True)
class SelectedBatch(TokenBatch):
    """Texts of whose tokens only some are to be learnt.   kept: (B, T) bool; its unit ``kept`` counts them."""

    kept: Tensor

    def units(self) -> dict[str, int]:
        """``rows``, ``tokens`` and ``kept``."""
        return {**super().units(), "kept": int(self.kept.sum())}

    def _with(self, change: Callable[[Tensor], Tensor]) -> Self:
        return dataclasses.replace(super()._with(change), kept=change(self.kept))

    @property
    def chosen(self) -> TokenBatch:
        """The same texts with nothing but the kept tokens as response."""
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(TokenBatch)}
        return TokenBatch(**{**shared, "response": self.kept})


@dataclass(frozen=True)
class Selected(Batches[SelectedBatch]):
    """Batches of ``texts`` with the tokens that are to be learnt.

    The selection looks at the student as it is when a batch is asked for: once per update, at the whole batch.
    """

    problem: LanguageModeling
    reference: LanguageModel
    texts: TextBatches
    keep: float
    batch_size: int = field(init=False)

    together = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_size", self.texts.batch_size)

    def rows(self, position: int) -> Tensor:
        """As those of the texts."""
        return self.texts.rows(position)

    def take(self, request: Request) -> SelectedBatch:
        """A batch of texts with its selection."""
        batch = self.texts.take(request).to(next(self.reference.parameters()).device)
        with torch.no_grad():
            theirs = self.problem.teacher.distributions(batch)
            draft, reference = (self.problem.divergence(batch, teacher=theirs, student=m) for m in (self.problem.student, self.reference))
        kept = torch.zeros_like(batch.response)
        kept.view(-1)[batch.predicted.rows[selection(draft, reference, keep=self.keep)] + 1] = True
        return SelectedBatch(**{f.name: getattr(batch, f.name) for f in dataclasses.fields(TokenBatch)}, kept=kept)


def distill(problem: LanguageModeling, run: Run, *, keep: float, reference: float, denominator: str) -> Student:
    """A twin of the draft is distilled first and shows what can be learned; the draft then learns that."""

    def forward_kl(batch: TokenBatch) -> Losses:
        return run.loss(batch, kl=(problem.divergence(batch, student=twin), "tokens"))

    def selected(batch: SelectedBatch) -> Losses:
        values = problem.divergence(batch.chosen)
        if denominator == "kept":
            return run.loss(batch, kl=(values, "kept"))
        every = batch.kept.flatten()[batch.predicted.rows + 1]
        return run.loss(batch, kl=(values.new_zeros(len(every)).masked_scatter(every, values), "tokens"))

    texts, twin = problem.teacher_text(), copy.deepcopy(problem.student)
    with run.phase("reference"):
        run.loop([Learner(twin, forward_kl)], texts, share=reference)
    twin.eval().requires_grad_(False)
    run.loop([Learner(problem.student, selected)], Selected(problem, twin, texts, keep))
    return run.export(problem.student)


def selection(draft: Tensor, reference: Tensor, *, keep: float) -> Tensor:
    """Which of N tokens to learn, (N,) bool: those whose ``draft`` loss exceeds that of the ``reference`` by most, a fraction ``keep``.

    The bound is the linearly interpolated quantile of the excess at 1 - keep, and what equals it is kept.  Losses: (N,) nats.
    """
    excess = draft - reference
    return excess >= torch.quantile(excess, 1 - keep)
