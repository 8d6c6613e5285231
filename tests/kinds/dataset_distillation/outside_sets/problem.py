"""Dataset distillation: the student is a small data set, and nobody teaches it but the large one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distillbench.identity import derive_seed
from distillbench.training.data import Arrays, Batch, Batches, Request
from distillbench.training.nets import Architecture
from distillbench.training.problem import Problem
from distillbench.training.student import Part


class SyntheticSet(nn.Module):
    """A data set that can be learnt. It is no function, so it has no ``forward``.

    Attributes:
        images: (N, K, H, W), a parameter.  labels: (N, C), probabilities, which are not learnt.
    """

    labels: Tensor

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        super().__init__()
        self.images = nn.Parameter(images)
        self.register_buffer("labels", labels)

    def parts(self) -> dict[str, Part]:
        """What leaves a method: data alone, of which the images were learnt."""
        return {"images": Part.data({"images": self.images}), "labels": Part.data({"labels": self.labels}, "untrained")}


@dataclass(frozen=True)
class PerClass(Batches[Batch]):
    """Batches of ``each`` real examples of every class, class by class: a function of (seed, position).

    A batch is one thing, since losses compare means of classes.
    """

    data: Arrays
    classes: int
    each: int
    seed: int
    indivisible = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_size", self.each * self.classes)

    def rows(self, position: int) -> Tensor:
        """Rows of the data set."""
        generator = torch.Generator().manual_seed(derive_seed(f"batch {position}", self.seed))
        every = (torch.nonzero(self.data.labels == c).flatten() for c in range(self.classes))
        return torch.cat([rows[torch.randperm(len(rows), generator=generator)[: self.each]] for rows in every])

    def take(self, request: Request) -> Batch:
        """Rows of the data set as a batch."""
        return self.data.take(request.rows)


@dataclass(frozen=True)
class DatasetDistillation(Problem):
    """A data set to be made small.

    ``student`` begins as random real images of each class. ``build`` also gives fresh networks of :attr:`network`, from any seed.

    Attributes:
        classes: C.  train: the real examples.  batches: as many of every class, class by class.
        network: of which methods may make networks to look through.
    """

    student: SyntheticSet
    classes: int
    train: Arrays
    batches: PerClass
    network: Architecture
