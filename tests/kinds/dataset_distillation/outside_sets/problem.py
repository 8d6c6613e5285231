"""Dataset distillation: the student is a small data set, and nobody teaches it but the large one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distillbench.identity import derive_seed
from distillbench.problems.base import Problem
from distillbench.training.data import Arrays, Batch
from distillbench.training.nets import Architecture
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
class PerClass:
    """Batches of ``each`` real examples of every class, class by class: a function of (seed, step)."""

    data: Arrays
    classes: int
    each: int
    seed: int

    @property
    def batch_size(self) -> int:
        """Examples in every batch."""
        return self.each * self.classes

    def stream(self, start: int) -> Iterator[Batch]:
        """Batches from step ``start`` on, without end."""
        rows = [torch.nonzero(self.data.labels == c).flatten() for c in range(self.classes)]
        step = start
        while True:
            generator = torch.Generator().manual_seed(derive_seed(f"step {step}", self.seed))
            yield self.data.take(torch.cat([r[torch.randperm(len(r), generator=generator)[: self.each]] for r in rows]))
            step += 1


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
