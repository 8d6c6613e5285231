"""TAID (Shing et al. 2025): the target moves from the student's own distribution to the teacher's, as fast as the loss allows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distillbench.cards.card import Beats, Card, Flag, Paper, Real
from distillbench.problems.language_modeling.models import LanguageModel
from distillbench.problems.language_modeling.oracle import real_logits, token_divergence
from distillbench.problems.language_modeling.problem import LanguageModeling
from distillbench.problems.language_modeling.texts import TokenBatch
from distillbench.training.run import Losses, Run
from distillbench.training.student import Student

CARD = Card(
    slug="taid",
    version=1,
    problem="language-modeling",
    title="Temporally adaptive interpolated distillation",
    paper=Paper(
        title="TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in Language Models",
        year=2025,
        arxiv="2501.16937",
        code="https://github.com/SakanaAI/TAID/blob/a0628922c16169d1fca10ddf61849e0693289cf8/src/distil_losses/taid.py",
        catalogue="taid",
        row=67,
    ),
    objective="taid_loss",
    frozen={"interpolated": ["return"]},
    equations={
        "interpolated": "p_t = softmax((1 - t) sg(z_student) + t z_teacher)",
        "taid_loss": "J = (1/N) sum over response tokens KL(p_t || q)",
        "next_t": "delta = (J_before - J) / J_before,  m <- beta m + (1 - beta) delta,  "
        "t <- min(end, max(start + (end - start) n/N, t + alpha sigmoid(m) (1 - t)))",
    },
    hyperparameters={
        "start": Real(0.4, ge=0, lt=1, note="first t; authors: 0.4 for Phi-3-mini to TinyLlama, 0.2 for their two other pairs"),
        "end": Real(1.0, gt=0, le=1, note="last t; authors' value"),
        "alpha": Real(0.03, ge=0, le=1, note="largest step of t; authors: 5e-4 over many thousand updates, too small to be felt in 300"),
        "beta": Real(0.99, ge=0, lt=1, note="decay of the momentum; authors' value"),
        "adaptive": Flag(True, note="False: t grows linearly, the authors' disable_adaptive"),
    },
    claims=[
        Beats("scratch"),
        Beats("gkd", source="abstract and MT-Bench comparison: superior to earlier losses, among them GKD and forward KL"),
        Beats("distillm", source="abstract and MT-Bench comparison"),
    ],
    deviations=[
        "The schedule follows the KL of the paper; the authors' code follows the cross-entropy, which contains the entropy of p_t, so its "
        "relative changes are smaller.",
        "The schedule moves once per update, by the loss of the whole batch; the authors' moves at every forward pass of every device.",
        "The text is the teacher's own; the authors train on the responses of a data set.",
        "alpha is larger, since runs are shorter: at the authors' value the linear floor alone moves t "
        "(kl 0.411 against 0.395 on the tune chain).",
    ],
)


def distill(problem: LanguageModeling, run: Run, *, start: float, end: float, alpha: float, beta: float, adaptive: bool) -> Student:
    """Forward KL to a target that starts at the student's own distribution, on fixed text."""
    student, vocab = problem.student, problem.vocab
    run.state.setdefault("taid", {"t": start, "momentum": 0.0, "loss": math.inf})  # what a checkpoint restores takes its place

    def loss(batch: TokenBatch) -> Losses:
        states = batch.predicted.take(student(batch.ids, batch.attention))
        theirs = batch.predicted.take(problem.teacher.states(batch))
        values = taid_loss(student, problem.teacher.module, states, theirs, run.state["taid"]["t"], vocab)
        return run.loss(batch, taid=(values, "tokens"))

    def after(terms: dict[str, Tensor]) -> None:
        floor = start + (end - start) * run.progress
        run.state["taid"] = next_t(run.state["taid"], float(terms["taid"]), floor, end=end, alpha=alpha, beta=beta, adaptive=adaptive)

    return run.fit(student, loss, problem.teacher_text(), after=after)


def taid_loss(model: LanguageModel, target: LanguageModel, states: Tensor, theirs: Tensor, t: float, vocab: int) -> Tensor:
    """KL(p_t || q) of each token, (N,) nats, p_t held still.   states, theirs: (N, D) of the student and of its ``target``."""

    def towards(rows: slice) -> Tensor:
        with torch.no_grad():
            return interpolated(real_logits(model, states[rows], vocab), real_logits(target, theirs[rows], vocab), t)

    return token_divergence(model, states, towards, vocab=vocab)


def interpolated(student_logits: Tensor, teacher_logits: Tensor, t: float) -> Tensor:
    """Logits of p_t, (n, V) as both arguments: the normalised p_teacher^t q^(1 - t). No gradient may pass through it.

    At t = 0 an entry that the teacher excludes (-inf) counts as the student has it, at t above 0 it is excluded.
    """
    if t in (0, 1):  # 0 times -inf is no number
        return teacher_logits if t else student_logits
    return (1 - t) * student_logits + t * teacher_logits


def next_t(
    state: dict[str, float], loss: float, floor: float, *, end: float, alpha: float, beta: float, adaptive: bool
) -> dict[str, float]:
    """The state behind an update with ``loss`` (nats per token): t in [floor, end], never below the t before.

    The first loss is only remembered. ``state``: t, momentum, and the loss before (inf: none).  ``floor``: the linear schedule here.
    """
    t, momentum, before = state["t"], state["momentum"], state["loss"]
    if before < math.inf:
        momentum = beta * momentum + (1 - beta) * (before - loss) / (before + 1e-15)
        step = alpha * (1 - t) / (1 + math.exp(-max(momentum, -700.0)))  # a larger exponent overflows
        t = min(end, max(floor, t + step)) if adaptive else floor
    return {"t": t, "momentum": momentum, "loss": loss}
