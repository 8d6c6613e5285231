"""Self-distillation in ridge regression (Borup and Andersen 2021): each fit is the next one's teacher, beside the ground truth."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distillbench.cards.card import Beats, Card, Integer, Paper, Real
from distillbench.problems.classification.losses import cross_entropy
from distillbench.problems.classification.problem import Classification
from distillbench.training.nets import head
from distillbench.training.run import Run
from distillbench.training.student import Student

CARD = Card(
    slug="self_distill_ridge",
    version=1,
    problem="classification",
    title="Self-distillation of the last layer by ridge regression",
    paper=Paper(
        title="Even your Teacher Needs Guidance: Ground-Truth Targets Dampen Regularization Imposed by Self-Distillation",
        year=2021,
        arxiv="2102.13088",
        code="https://github.com/Kennethborup/self_distillation/blob/cb20d6ce0b6005d97414225f97c7237117f54cf0/toy_example.ipynb",
        catalogue="self_distill_ridge",
        row=27,
    ),
    objective="cross_entropy",
    equations={
        "kernel_coefficients": "c_t = (K + lambda I)^-1 (alpha y + (1 - alpha) y_{t-1}),  y_t = K c_t,  y_0 = y;   f_t(x) = k(x, X) c_t",
        "ridge_weights": "beta_t = (Phi^T Phi + lambda I)^-1 Phi^T (alpha y + (1 - alpha) y_{t-1}),  y_t = Phi beta_t;   K = Phi Phi^T",
        "limit": "c_inf = (K + (lambda / alpha) I)^-1 y: plain ridge with more regularisation",
        "optimal_truth_weight": "alpha* = <s - v, u - v> / |u - v|^2,  u predicted from y, v from y_{t-1}, s held-out targets",
        "distill": "logits = scale * f_T(embedding), the student trained by CE(y, softmax(z)) before",
    },
    hyperparameters={
        "truth_weight": Real(0.35, ge=0, le=1, note="alpha, on the ground truth: 1 is no distillation, 0 is nothing but the step before"),
        "ridge": Real(10.0, gt=0, note="lambda, not divided by the number of examples; 0.2 in the toy of eleven points"),
        "rounds": Integer(5, ge=1, note="T; the first one is the plain fit"),
        "scale": Real(10.0, gt=0, note="of the regression's outputs, which lie around 0 and 1, as logits"),
        "training_share": Real(0.9, gt=0, lt=1, note="of the budget, for the student's training before its last layer is refitted"),
    },
    claims=[Beats("scratch", source="the paper's deep experiments: self-distillation improves on the first fit")],
    deviations=[
        "The paper distils a whole network, or a kernel on fixed inputs; here the kernel is that of the trained student's embedding.",
        "Regression outputs are no log-probabilities: a fixed factor makes their softmax sharp. Decisions do not depend on it.",
        "The constant feature that stands for the bias is regularised like the others.",
        "No teacher is asked and unlabelled examples are not used: compare with scratch, not with methods that have a teacher.",
        "The ridge is chosen on the tune splits (10 of 2, 5, 10 and 20), factor and share by hand; the toy's 0.2 is for eleven points.",
    ],
    exempt={
        "teacher_matters": "no teacher is asked: the last layer learns from its own answers",
        "export": "after the training the last layer is replaced by the closed form: that is the method",
        "beats_scratch": "no teacher is asked; its gain over scratch is within the noise here, as the results say",
    },
)


def kernel_coefficients(kernel: Tensor, targets: Tensor, *, ridge: float, truth_weight: float, rounds: int) -> Tensor:
    """Dual coefficients of round T: f_T(x) = k(x, X) c_T.   (n, n) symmetric, (n, C); returns (n, C).

    Section 3 of the paper. The system is factorised once (Cholesky) and never inverted; every round is one solve.
    """
    factor = torch.linalg.cholesky(kernel + ridge * torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device))
    previous = targets
    coefficients = torch.zeros_like(targets)
    for _ in range(rounds):
        coefficients = torch.cholesky_solve(truth_weight * targets + (1 - truth_weight) * previous, factor)
        previous = kernel @ coefficients
    return coefficients


def ridge_weights(features: Tensor, targets: Tensor, *, ridge: float, truth_weight: float, rounds: int) -> Tensor:
    """The same f_T in weight space: f_T(x) = phi(x) beta_T.   (n, D), (n, C); returns (D, C).

    A D x D system in place of an n x n one: the two agree because Phi^T (Phi Phi^T + l I)^-1 = (Phi^T Phi + l I)^-1 Phi^T.
    """
    gram = features.T @ features
    factor = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    previous, weights = targets, features.new_zeros(features.shape[1], targets.shape[1])
    for _ in range(rounds):
        weights = torch.cholesky_solve(features.T @ (truth_weight * targets + (1 - truth_weight) * previous), factor)
        previous = features @ weights
    return weights


def limit(kernel: Tensor, targets: Tensor, *, ridge: float, truth_weight: float) -> Tensor:
    """Coefficients after infinitely many rounds: the plain fit with ridge / alpha; 0 for alpha = 0.   Shapes as above."""
    if truth_weight == 0:
        return torch.zeros_like(targets)
    return kernel_coefficients(kernel, targets, ridge=ridge / truth_weight, truth_weight=1.0, rounds=1)


def optimal_truth_weight(truth: Tensor, from_targets: Tensor, from_previous: Tensor) -> Tensor:
    """The alpha of one round with the least squared error on held-out targets; may lie outside [0, 1].   (m, C) each; 0-dim."""
    step = from_targets - from_previous
    return ((truth - from_previous) * step).sum() / step.square().sum()


def distill(
    problem: Classification, run: Run, *, truth_weight: float, ridge: float, rounds: int, scale: float, training_share: float
) -> Student:
    """Train on the observed labels, then let the last layer teach itself on the frozen embeddings."""
    student = problem.student
    with run.phase("train"):
        run.fit(
            student,
            lambda batch: run.loss(batch, ce=cross_entropy(student(batch.inputs), batch.labels)),
            problem.labelled,
            share=training_share,
        )
    student.eval()
    features, targets = [], []
    for batch in problem.one_pass():
        own = torch.nonzero(batch.labelled).flatten()
        with torch.no_grad():
            embedding = problem.outputs(student, batch.inputs[own].to(run.device)).embedding.double()
        features.append(F.pad(embedding, (0, 1), value=1.0))
        targets.append(F.one_hot(batch.labels[own], problem.classes).to(embedding))
        run.meter.add("student_examples", len(own))
    weights = ridge_weights(torch.cat(features), torch.cat(targets), ridge=ridge, truth_weight=truth_weight, rounds=rounds)
    last = head(student)
    with torch.no_grad():
        last.weight.copy_(scale * weights[:-1].T)
        last.bias.copy_(scale * weights[-1])
    return run.export(student)
