"""Batches as a pure function of (seed, step): nothing to save, so a killed run resumes on the very next batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from distillbench.identity import derive_seed


@dataclass(frozen=True)
class Batch:
    """Examples of one step.

    Attributes:
        inputs: (B, ...) float.  labels: (B,) int64.  index: (B,) int64 rows in the data set.
        labelled: (B,) bool: where False, the label is the teacher's decision, not an observed one.
    """

    inputs: Tensor
    labels: Tensor
    index: Tensor
    labelled: Tensor

    def __len__(self) -> int:
        return int(self.inputs.shape[0])

    def part(self, start: int, stop: int) -> Batch:
        """Rows ``start:stop``: a micro-batch, or the share of one process."""
        return Batch(self.inputs[start:stop], self.labels[start:stop], self.index[start:stop], self.labelled[start:stop])

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``."""
        if self.inputs.device == device:
            return self
        return Batch(self.inputs.to(device), self.labels.to(device), self.index.to(device), self.labelled.to(device))


class Batches(Protocol):
    """An endless stream of batches that can be entered at any step: of :class:`Batch`, or a kind with ``len``, ``part``, ``to``."""

    @property
    def batch_size(self) -> int:
        """Examples in every batch."""
        ...

    def stream(self, start: int) -> Iterator[Any]:
        """Batches of step ``start``, ``start + 1``, ... The same for every call."""
        ...


@dataclass(frozen=True)
class Arrays:
    """A data set in memory. ``digest`` identifies its bytes and keys what is cached about it.

    Attributes:
        inputs: (N, ...) float.  labels: (N,) int64.  labelled: (N,) bool.
    """

    inputs: Tensor
    labels: Tensor
    labelled: Tensor
    digest: str

    def __len__(self) -> int:
        return int(self.inputs.shape[0])

    def take(self, index: Tensor) -> Batch:
        """The rows of ``index`` (B,) as a batch."""
        return Batch(self.inputs[index], self.labels[index], index, self.labelled[index])


def epoch_order(rows: Tensor, seed: int, epoch: int) -> Tensor:
    """A permutation of ``rows`` (M,), drawn from (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(derive_seed(f"epoch {epoch}", seed))
    return rows[torch.randperm(len(rows), generator=generator)]


@dataclass(frozen=True)
class Shuffled:
    """Epochs over rows of :class:`Arrays`: each epoch is a permutation drawn from (seed, epoch); short tails are dropped.

    Attributes:
        rows: (M,) int64, the rows to draw from; with fewer rows than ``batch_size`` a batch holds all M of them.
    """

    data: Arrays
    rows: Tensor
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_size", min(self.batch_size, int(self.rows.numel())))

    def stream(self, start: int) -> Iterator[Batch]:
        """Batches from step ``start`` on, without end."""
        epoch, place = divmod(start, len(self.rows) // self.batch_size)
        while True:
            order = epoch_order(self.rows, self.seed, epoch)
            for begin in range(place * self.batch_size, len(order) - self.batch_size + 1, self.batch_size):
                yield self.data.take(order[begin : begin + self.batch_size])
            epoch, place = epoch + 1, 0
