"""Batches as a pure function of (seed, step): nothing to save, so a killed run resumes on the very next batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


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
    """An endless stream of batches that can be entered at any step."""

    batch_size: int

    def stream(self, start: int) -> Iterator[Batch]:
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
    _orders: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_size", min(self.batch_size, int(self.rows.numel())))

    def order(self, epoch: int) -> Tensor:
        """The rows in the order of ``epoch`` (M,)."""
        if epoch not in self._orders:
            self._orders.clear()
            generator = torch.Generator().manual_seed((self.seed + 0x9E3779B97F4A7C15 * (epoch + 1)) % 2**63)
            self._orders[epoch] = self.rows[torch.randperm(len(self.rows), generator=generator)]
        return self._orders[epoch]

    def stream(self, start: int) -> Iterator[Batch]:
        """Batches from step ``start`` on, without end."""
        per_epoch = len(self.rows) // self.batch_size
        step = start
        while True:
            epoch, place = divmod(step, per_epoch)
            begin = place * self.batch_size
            yield self.data.take(self.order(epoch)[begin : begin + self.batch_size])
            step += 1
