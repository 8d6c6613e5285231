"""MiniPLM (Gu et al. 2024): the teacher says which of the data are worth training on, and nothing more."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from distillbench.cards.card import Beats, Card, Paper, Real
from distillbench.problems.language_modeling.models import LanguageModel
from distillbench.problems.language_modeling.oracle import token_nll as token_nll
from distillbench.problems.language_modeling.problem import LanguageModeling
from distillbench.problems.language_modeling.texts import TextBatches, Texts, TokenBatch
from distillbench.training.run import Learner, Losses, Run
from distillbench.training.student import Student

CARD = Card(
    slug="miniplm",
    version=1,
    problem="language-modeling",
    title="Difference sampling of the training data",
    paper=Paper(
        title="MiniPLM: Knowledge Distillation for Pre-Training Language Models",
        year=2024,
        arxiv="2410.17215",
        code="https://github.com/thu-coai/MiniPLM/blob/ac2302f9a5512f91e839df310af8b5d052331cba/scripts/miniplm/difference_sampling/construct_pretrain_data.py",
        catalogue="miniplm",
        row=198,
    ),
    objective="token_nll",
    equations={
        "differences": "r(x) = mean over tokens of log p(x_t | x_<t) - log p_reference(x_t | x_<t)",
        "best": "D' = the fraction alpha of the texts with the largest r, in the order of the data",
        "distill": "L = -(1/N) sum over response tokens log q(y_t | y_<t) on D'",
    },
    hyperparameters={
        "alpha": Real(0.5, gt=0, le=1, note="fraction of the texts that is kept; paper's value"),
        "reference": Real(0.1, gt=0, lt=1, note="share of the budget that trains the reference; paper: 5B tokens beside the student's 50B"),
        "seen": Real(0.25, gt=0, le=1, note="fraction of the texts that the reference is trained on; paper: a random 5% of the corpus"),
    },
    claims=[
        Beats("scratch", source="abstract: better than conventional pre-training at the same student compute"),
        Beats("seqkd", source="the paper's comparison with SeqKD, at the same student compute"),
    ],
    deviations=[
        "The corpus is the references; the paper's is two thousand times what its student can read, here every text is read many times.",
        "The reference has the student's architecture and initial weights; the paper's is half the size of its smallest student.",
        "The reference's training is paid out of the run's own budget; the paper leaves it and the teacher's pass out of its comparison.",
        "The kept texts are shuffled anew in every epoch, as those of every method; the authors keep the order of the corpus.",
    ],
    exempt={
        "beats_scratch": "selection pays where there are more data than can be read, some of them worth less; the references of this track "
        "are 256 texts of one distribution, read dozens of times, so that leaving half of them out only adds overfitting"
    },
    notes="On the tune chain, kl: 0.655 at alpha 0.9, 0.665 at 1 (no selection, a tenth of the budget gone), 0.657 for scratch.",
)


def distill(problem: LanguageModeling, run: Run, *, alpha: float, reference: float, seen: float) -> Student:
    """Train a reference on some of the texts, score all of them once, train the student on the best."""
    texts, twin = problem.references, copy.deepcopy(problem.student)

    def nll(batch: TokenBatch, model: LanguageModel) -> Losses:
        return run.loss(batch, nll=(problem.nll(batch, model), "tokens"))

    with run.phase("reference"):
        generator = torch.Generator().manual_seed(run.seeds["noise"])
        some = torch.randperm(len(texts), generator=generator)[: max(1, int(seen * len(texts)))].sort().values
        run.loop([Learner(twin, lambda b: nll(b, twin))], batches(problem, texts.some(some)), share=reference)
    twin.eval().requires_grad_(False)
    kept = best(differences(problem, twin, texts), alpha)
    return run.fit(problem.student, lambda b: nll(b, problem.student), batches(problem, texts.some(kept)))


def batches(problem: LanguageModeling, texts: Texts) -> TextBatches:
    """``texts`` in the sizes and by the seed of every stream of the problem."""
    return TextBatches(texts, problem.batch_size, problem.order)


def differences(problem: LanguageModeling, reference: LanguageModel, texts: Texts) -> Tensor:
    """r of each of M texts, (M,) nats per token: by how much the teacher finds it likelier than the reference does."""
    found = []
    with torch.no_grad():
        for rows in torch.arange(len(texts)).split(problem.batch_size):
            batch = texts.take(rows).to(next(reference.parameters()).device)
            found.append(batch.per_sequence(problem.nll(batch, reference) + problem.teacher.log_probs(batch)))
    return torch.cat(found)


def best(scores: Tensor, alpha: float) -> Tensor:
    """Rows of the ``alpha`` M largest of ``scores`` (M,), rounded down but never none, in ascending order; the first of equal ones."""
    order = scores.argsort(descending=True, stable=True)
    return order[: max(1, int(alpha * len(scores)))].sort().values.cpu()
