"""ND loss (Wang et al. 2023): the student's embedding is to be long and to point along the teacher's class mean."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distillbench.cards.card import Beats, Card, Paper, Real, Reported
from distillbench.problems.classification.losses import cross_entropy, kl_divergence
from distillbench.problems.classification.problem import Classification
from distillbench.training.data import Batch
from distillbench.training.nets import head
from distillbench.training.run import Losses, Run
from distillbench.training.student import Student

CARD = Card(
    slug="nd_loss",
    version=2,
    supersedes=1,
    problem="classification",
    title="Feature norm and direction (KD++)",
    paper=Paper(
        title="Improving Knowledge Distillation via Regularizing Feature Norm and Direction",
        year=2023,
        arxiv="2305.17007",
        code="https://github.com/WangYZ1608/Knowledge-Distillation-via-ND/blob/fc6f3f9058ed35189a1d3c0a79a7594025e4d88f/CIFAR/utils.py",
        catalogue="nd_loss",
        row=193,
    ),
    objective="nd_loss",
    equations={
        "nd_loss": "L_nd = 1 - <f_s, e_y> / max(|f_s|, |f_t|),  e_k = c_k / |c_k|,  c_k the teacher's mean embedding of class k",
        "distill": "L = w_ce CE + w_kd r(t) L_kd + w_nd L_nd,  r rises from 0 to 1 over the warm-up",
    },
    hyperparameters={
        "ce_weight": Real(1.0, ge=0),
        "kd_weight": Real(3.5, ge=0, note="KD++ ResNet32x4 to ResNet8x4; 0.5 to 4 elsewhere"),
        "nd_weight": Real(2.0, ge=0, note="KD++ ResNet32x4 to ResNet8x4; 0.5 to 4 elsewhere"),
        "temperature": Real(4.0, gt=0),
        "warmup": Real(0.0833, ge=0, le=1, note="fraction of the run over which the KD term rises: 20 of 240 epochs"),
    },
    claims=[
        Beats("kd", source="README table: 75.54 against 73.33 for ResNet32x4 to ResNet8x4"),
        Beats("scratch", source="the paper's claim"),
        Reported(
            suite="image-classification",
            setting="cifar100",
            metric="top1",
            value=0.7554,
            source="README table, KD++, ResNet32x4 to ResNet8x4",
            note="best test epoch; the KD weight is 3.5, where the KD row it is compared with has 0.9",
        ),
    ],
    deviations=[
        "The warm-up rises with every step; the released code raises it once per epoch.",
        "Class means are of the training examples as they are, not rounded; the released ones are of augmented images and rounded.",
        "Where a label was not observed, the class mean and the loss use the teacher's decision.",
    ],
    exempt={
        "micro_batches": "where the widths differ, the mapping has batch normalisation and dropout",
        "zero_at_match": "equal embeddings do not end the loss: it is 0 only along the class mean and at least as long as the teacher's",
    },
)


def nd_loss(student_embedding: Tensor, teacher_embedding: Tensor, labels: Tensor, class_means: Tensor) -> Tensor:
    """1 - <f_s, e_y> / max(|f_s|, |f_t|), in [0, 2].   (B, D) twice, (B,) int64, (C, D); returns (B,).

    While the student's embedding is shorter than the teacher's it is pulled along e_y by a constant force; once it is
    longer, this is the cosine distance. The teacher's embedding enters by its length alone.
    """
    direction = F.normalize(class_means.detach(), dim=1)[labels]
    length = torch.maximum(student_embedding.norm(dim=1), teacher_embedding.detach().norm(dim=1))
    return 1 - (student_embedding * direction).sum(1) / length.clamp(min=1e-12)


def teacher_class_means(problem: Classification) -> Tensor:
    """The teacher's mean embedding of every class over the training set (C, D); 0 for a class without examples."""
    total, count = torch.zeros(()), torch.zeros(problem.classes)
    for batch in problem.one_pass():
        member = F.one_hot(batch.labels, problem.classes).to(torch.float64)
        total = total + member.T @ problem.teacher.outputs(batch).embedding.to(member)
        count = count.to(member) + member.sum(0)
    return (total / count.clamp(min=1)[:, None]).float()


def distill(
    problem: Classification, run: Run, *, ce_weight: float, kd_weight: float, nd_weight: float, temperature: float, warmup: float
) -> Student:
    """Three terms; where the widths differ, a mapping that is thrown away takes the student's embedding to the teacher's."""
    student = problem.student
    means = teacher_class_means(problem).to(run.device)
    width, wanted = head(student).in_features, means.shape[1]
    mapping: nn.Module = nn.Identity()
    if width != wanted:
        last = nn.Linear(width, wanted)
        nn.init.zeros_(last.bias)
        mapping = nn.Sequential(nn.BatchNorm1d(width), nn.Dropout(0.5), last).to(run.device)

    def loss(batch: Batch) -> Losses:
        ours, theirs = problem.outputs(student, batch.inputs), problem.teacher.outputs(batch)
        done = run.progress
        ramp = min(1.0, done / warmup) if warmup else 1.0
        return run.loss(
            batch,
            ce=ce_weight * cross_entropy(ours.logits, batch.labels),
            kd=kd_weight * ramp * kl_divergence(ours.logits, theirs.logits, temperature=temperature),
            nd=nd_weight * nd_loss(mapping(ours.embedding), theirs.embedding, batch.labels, means),
        )

    return run.fit(student, loss, problem.batches, extra=[mapping])
