"""Universal self-knowledge distillation (Yang et al. 2023): soft labels from the student's own outputs, without a teacher."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distillbench.cards.card import Beats, Card, Choice, Paper, Real, Reported
from distillbench.errors import NotApplicable
from distillbench.problems.classification.losses import cross_entropy, soft_cross_entropy, without
from distillbench.problems.classification.problem import Classification
from distillbench.training.data import Batch
from distillbench.training.run import Losses, Run
from distillbench.training.student import Student

CARD = Card(
    slug="uskd",
    version=1,
    problem="classification",
    title="Universal self-knowledge distillation",
    paper=Paper(
        title="From Knowledge Distillation to Self-Knowledge Distillation: "
        "A Unified Approach with Normalized Loss and Customized Soft Labels",
        year=2023,
        arxiv="2303.13005",
        code="https://github.com/yzd-v/cls_KD/blob/1e5d48f36957ee460d39d7ebc592c6cc7f8f3d66/mmcls/models/dis_losses/uskd.py",
        catalogue="nkd_uskd",
        row=189,
    ),
    objective=("target_loss", "weak_loss", "non_target_loss"),
    equations={
        "target_loss": "L_tgt = -P_y log S_y,  P_y = stopgrad(S_y^2 + 1 - mean_batch S_y^2),  S = softmax(z_s)",
        "weak_loss": "L_weak = -sum_i [0.9 1(i = y) + 0.1/C] log W_i,  W = softmax(linear(pooled second-to-last stage))",
        "rank_score": "r_i = W_i/(1 - W_y) + S_i/(1 - S_y);  released code: r_i = W_i/(1 - W_y + 1e-6) + log S_i/(1 - log S_y + 1e-6)",
        "zipf": "Q_i = (1/k_i) / sum_{j != y} 1/k_j, i != y,  k_i the rank of class i by falling r",
        "non_target_loss": "L_non = -sum_{i != y} Q_i log softmax(z_{s,-y})_i",
        "distill": "L = CE(y, S) + alpha L_tgt + beta L_non + mu L_weak",
    },
    hyperparameters={
        "alpha": Real(0.1, ge=0, note="weight of the target; 0.1 on CIFAR-100, 1 on ImageNet"),
        "beta": Real(0.1, ge=0, note="weight of the other classes"),
        "mu": Real(0.1, ge=0, note="weight of the weak head; 0.1 on CIFAR-100, 0.005 on ImageNet"),
        "rank": Choice("paper", options=("paper", "released"), note="the released code has logarithms in the rank score's second part"),
    },
    claims=[
        Beats("scratch", metric="top1", source="the paper's tables"),
        Reported(
            suite="image-classification",
            setting="imagenet1k",
            metric="top1",
            value=0.7079,
            source="authors' nkd.md, ResNet18 (69.90 without)",
            note="alpha 1, beta 0.1, mu 0.005",
        ),
    ],
    deviations=[
        "The rank score is the paper's; the released code overwrites probabilities by their logarithms in it (rank=released runs that).",
        "The paper's score is ranked by its logarithm, which has the same order and no division by zero.",
        "Hard labels only: the authors' code also takes the two largest entries of a mixed label.",
        "Trains on the observed labels alone: a missing label is filled in by the teacher's decision, and this method has no teacher.",
        "Networks without 4-dimensional stages (vision transformers) use the whole stage; the authors take a token of it.",
    ],
    exempt={
        "teacher_matters": "no teacher is asked: what is learnt beside the labels is made of the student's own answers",
        "micro_batches": "P_y is centred by the mean of the rows seen together",
        "beats_scratch": "no teacher is asked; its gain over scratch is within the noise here, as the results say",
        "per_example": "P_y is centred by the batch's mean of S_y^2, so a row's target depends on the other rows",
        "class_padding": "label smoothing and the ranks give classes of probability 0 some mass too",
    },
)


def target_loss(student_logits: Tensor, labels: Tensor) -> Tensor:
    """-P_y log S_y with P_y = S_y^2 + 1 - mean_batch(S_y^2), a constant for the gradient; section 3.2 of the paper.

    P_y spreads the label's weight over the batch: its mean is 1, and more goes where the student is surer.

    student_logits: (B, C) float, labels: (B,) int64; returns (B,), nats.
    """
    sure = student_logits.detach().softmax(1).gather(1, labels[:, None]).squeeze(1) ** 2
    return (sure + 1 - sure.mean()) * cross_entropy(student_logits, labels)


def weak_loss(auxiliary_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the weak head with labels smoothed by 0.1.   (B, C) float, (B,) int64; returns (B,), nats."""
    return F.cross_entropy(auxiliary_logits, labels, label_smoothing=0.1, reduction="none")


def rank_score(student_logits: Tensor, auxiliary_logits: Tensor, labels: Tensor, *, rank: str) -> Tensor:
    """What the classes are ranked by, highest first: student and weak head together, each relative to its mass off the target.

    ``rank="paper"`` gives log [W_i/(1 - W_y) + S_i/(1 - S_y)]. ``rank="released"`` gives the authors' code,
    W_i/(1 - W_y + 1e-6) + log S_i/(1 - log S_y + 1e-6), where a surer student counts *less*.

    student_logits, auxiliary_logits: (B, C) float, labels: (B,) int64; returns (B, C).
    """
    column = labels[:, None]
    if rank == "released":
        weak, log_student = auxiliary_logits.softmax(1), student_logits.log_softmax(1)
        return weak / (1 - weak.gather(1, column) + 1e-6) + log_student / (1 - log_student.gather(1, column) + 1e-6)
    # p_i/(1 - p_y) = exp(z_i - logsumexp of the others)
    relative = [z - without(z, labels).logsumexp(1, keepdim=True) for z in (auxiliary_logits, student_logits)]
    return torch.logaddexp(*relative)


def zipf(score: Tensor, labels: Tensor) -> Tensor:
    """Q_i = (1/k_i) / sum_{j != y} 1/k_j over the classes that are not the label; k_i is the rank of class i by falling score.

    The label takes part in the ranking and is removed afterwards.   (B, C), (B,) -> (B, C-1) probabilities.
    """
    ranks = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    weight = without(1 / (ranks + 1).to(score.dtype), labels)
    return weight / weight.sum(1, keepdim=True)


def non_target_loss(student_logits: Tensor, auxiliary_logits: Tensor, labels: Tensor, *, rank: str) -> Tensor:
    """-sum_{i != y} Q_i log softmax(z_{s,-y})_i with Zipf's law for Q; section 3.2 of the paper. Q carries no gradient.

    student_logits, auxiliary_logits: (B, C) float, labels: (B,) int64; returns (B,), nats.
    """
    score = rank_score(student_logits.detach(), auxiliary_logits.detach(), labels, rank=rank)
    return soft_cross_entropy(without(student_logits, labels), zipf(score, labels))


def pooled(stages: tuple[Tensor, ...]) -> Tensor:
    """The second-to-last stage (B, K), averaged over space if it has any. Raises NotApplicable for a network with fewer stages."""
    if len(stages) < 2:
        raise NotApplicable("uskd reads the second-to-last stage; this student's stage_names names fewer than two")
    return stages[-2].flatten(2).mean(2) if stages[-2].dim() == 4 else stages[-2].flatten(1)


def _weak_head(problem: Classification, run: Run) -> nn.Linear:
    """A linear head for the second-to-last stage, with torch's usual initial weights from the run's own random stream."""
    first = next(problem.labelled.stream(0)).to(run.device)
    with torch.no_grad():
        width = pooled(problem.outputs(problem.student.eval(), first.inputs).stages).shape[1]
    head = nn.Linear(width, problem.classes)
    for p in head.parameters():
        nn.init.uniform_(p, -(width**-0.5), width**-0.5, generator=run.generator("noise"))
    return head


def distill(problem: Classification, run: Run, *, alpha: float, beta: float, mu: float, rank: str) -> Student:
    """One optimizer over the student and a weak head that is thrown away; its gradient reaches the student's early stages."""
    head = _weak_head(problem, run)

    def loss(batch: Batch) -> Losses:
        seen = problem.outputs(problem.student, batch.inputs)
        weak = head(pooled(seen.stages))
        return run.loss(
            batch,
            ce=cross_entropy(seen.logits, batch.labels),
            target=alpha * target_loss(seen.logits, batch.labels),
            non_target=beta * non_target_loss(seen.logits, weak, batch.labels, rank=rank),
            weak=mu * weak_loss(weak, batch.labels),
        )

    return run.fit(problem.student, loss, problem.labelled, extra=[head])
