"""The control for what soft targets say about *this* example: distillation from the teacher's answer about another one."""

from __future__ import annotations

import torch

from distillbench.cards.card import Card, Real
from distillbench.problems.classification.losses import kl_divergence
from distillbench.problems.classification.problem import Classification
from distillbench.training.data import Batch
from distillbench.training.run import Losses, Run
from distillbench.training.student import Student

CARD = Card(
    slug="shuffled_teacher",
    version=2,
    supersedes=1,
    problem="classification",
    title="Distillation from another example of the same decision",
    control=True,
    objective="kl_divergence",
    equations={
        "distill": "L = T^2 KL(softmax(z_t(x')/T) || softmax(z_s(x)/T)), x' a random training example with argmax z_t(x') = argmax z_t(x)"
    },
    hyperparameters={"temperature": Real(4.0, gt=0)},
    exempt={"micro_batches": "partners are drawn within a micro-batch, so two halves pair other examples than the whole does"},
)


def distill(problem: Classification, run: Run, *, temperature: float) -> Student:
    """Soft targets that know the class but not the example; batches are matched within themselves."""

    def loss(batch: Batch) -> Losses:
        teacher = problem.teacher.logits(batch)
        decision = teacher.argmax(dim=1)
        order = torch.randperm(len(batch), generator=batch.generator("partners")).to(decision.device)
        # A random partner of the same decision: the i-th example of a class gets the answer about the class's i-th in a shuffle.
        other = torch.empty_like(order)
        other[torch.argsort(decision, stable=True)] = order[torch.argsort(decision[order], stable=True)]
        return run.loss(batch, kd=kl_divergence(problem.student(batch.inputs), teacher[other], temperature=temperature))

    return run.fit(problem.student, loss, problem.batches)
