"""FitNets (Romero et al. 2014): a regressor on a middle layer of the student predicts a middle layer of the teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distillbench.cards.card import Beats, Card, Flag, Integer, Paper, Real, Reported
from distillbench.errors import NotApplicable
from distillbench.problems.classification.losses import cross_entropy, kl_divergence
from distillbench.problems.classification.problem import Classification
from distillbench.training.data import Batch
from distillbench.training.run import Losses, Run
from distillbench.training.student import Student

CARD = Card(
    slug="fitnets",
    version=1,
    problem="classification",
    title="Hints from a middle layer",
    paper=Paper(
        title="FitNets: Hints for Thin Deep Nets",
        year=2014,
        arxiv="1412.6550",
        code="https://github.com/HobbitLong/RepDistiller/blob/b84f547c5db6a35318d4671d7d5c4de74c822403/distiller_zoo/FitNet.py",
        catalogue="fitnets",
    ),
    objective="hint_loss",
    equations={
        "hint_loss": "L_hint = mean over the feature's elements of (r(v) - u)^2, v the student's feature, u the teacher's, r the regressor",
        "distill": "L = w_ce CE(y, softmax(z_s)) + beta L_hint;   two stages: L_hint, then CE + lambda(t) KD, lambda 4 to 1",
    },
    hyperparameters={
        "hint": Integer(2, ge=0, note="index into the stages, 0 the stem; a network with fewer stages gives its last one"),
        "hint_weight": Real(100.0, ge=0, note="beta, on the mean over elements: 200 / (C H W) on the paper's half squared distance"),
        "ce_weight": Real(1.0, ge=0),
        "two_stage": Flag(False, note="the paper's own form: half the budget for the hint alone, half for distillation"),
        "temperature": Real(3.0, gt=0, note="of the second stage; the benchmark's form has none"),
    },
    claims=[
        Beats("scratch", source="the paper's claim"),
        Reported(
            suite="image-classification",
            setting="cifar100",
            metric="top1",
            value=0.7350,
            source="CRD benchmark table, ResNet32x4 to ResNet8x4",
        ),
    ],
    deviations=[
        "The default is the one-stage form that the CRD benchmark made known under this name, not the two-stage form of 2014.",
        "Features that are vectors get a linear regressor without normalisation or ReLU: they may be negative, which a ReLU cannot reach.",
        "The hint index is clamped to the last stage of a network that has fewer; the benchmark's networks all have more than two.",
        "Two stages: the switch comes at half the budget; the paper waits until the validation error stalls.",
        "Two stages: lambda falls linearly over the second stage step by step.",
        "Two stages: the second one's soft term is a divergence times T^2; the paper's cross-entropy has 1/T^2 of its gradient.",
    ],
    notes="The hint's weight is the benchmark's. On the tune split of digits 1 does better: 0.958 against 0.943 (3 seeds).",
)


def hint_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """mean_e (student_e - teacher_e)^2 over the elements e of one example.   (B, ...) each; returns (B,).

    ``student_feature`` is what the regressor made of the student's. The CRD benchmark's hint loss before its mean over
    the batch; times C H W / 2 it is the paper's half squared distance.
    """
    return (student_feature - teacher_feature.detach()).square().flatten(1).mean(1)


def regressor(student: torch.Size, teacher: torch.Size) -> nn.Module:
    """The map from student features to teacher features of these shapes (without the batch), by the benchmark's rule.

    Raises:
        NotApplicable: the teacher's map is larger by another factor than two, or the student's feature is a vector and the teacher's a map.
    """
    if len(teacher) == 1:
        return nn.Sequential(nn.Flatten(), nn.Linear(student.numel(), teacher[0]))
    if len(student) == 1:
        raise NotApplicable("no regressor from a vector to a map; choose another layer with hint=...")
    (inner, high, wide), (outer, tall, broad) = student, teacher
    conv: nn.Module
    if high == 2 * tall:
        conv = nn.Conv2d(inner, outer, 3, stride=2, padding=1)
    elif 2 * high == tall:
        conv = nn.ConvTranspose2d(inner, outer, 4, stride=2, padding=1)
    elif high >= tall and wide >= broad:
        conv = nn.Conv2d(inner, outer, (1 + high - tall, 1 + wide - broad))
    else:
        raise NotApplicable(f"no regressor from a {high}x{wide} map to a {tall}x{broad} one; choose another layer with hint=...")
    return nn.Sequential(conv, nn.BatchNorm2d(outer), nn.ReLU())


def distill(
    problem: Classification, run: Run, *, hint: int, hint_weight: float, ce_weight: float, two_stage: bool, temperature: float
) -> Student:
    """One pass tells the shapes; the regressor is trained along and thrown away."""
    student = problem.student
    probe = next(problem.batches.stream(0)).part(0, 1).to(run.device)
    with torch.no_grad():
        ours = pick(problem.outputs(student.eval(), probe.inputs).stages, hint)
    theirs = pick(problem.teacher.outputs(probe).stages, hint)
    regress = regressor(ours.shape[1:], theirs.shape[1:]).to(run.device)

    def hinted(batch: Batch) -> Losses:
        seen = problem.outputs(student, batch.inputs)
        target = pick(problem.teacher.outputs(batch).stages, hint)
        guide = hint_weight * hint_loss(regress(pick(seen.stages, hint)), target)
        if two_stage:
            return run.loss(batch, hint=guide)
        return run.loss(batch, ce=ce_weight * cross_entropy(seen.logits, batch.labels), hint=guide)

    if not two_stage:
        return run.fit(student, hinted, problem.batches, extra=[regress])

    with run.phase("hint"):
        run.fit(student, hinted, problem.batches, extra=[regress], share=0.5)

    def softened(batch: Batch) -> Losses:
        done = 2 * run.meter.counts["student_examples"] / run.budget.student_examples - 1  # 0 to 1 over the second half
        logits = student(batch.inputs)
        return run.loss(
            batch,
            ce=ce_weight * cross_entropy(logits, batch.labels),
            kd=(4 - 3 * done) * kl_divergence(logits, problem.teacher.logits(batch), temperature=temperature),
        )

    return run.fit(student, softened, problem.batches)


def pick(stages: tuple[Tensor, ...], hint: int) -> Tensor:
    """The stage of that index, or the last where there are fewer."""
    return stages[min(hint, len(stages) - 1)]
