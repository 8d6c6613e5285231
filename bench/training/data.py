"""Batches as a pure function of (seed, position): nothing to save, so a killed run resumes on the very next batch.

A stream says which rows make the batch of a position; a loop splits them over micro-batches and processes, and the stream loads each
part. So nobody decodes or samples another's rows, and what a loss is divided by is known before the first loss is computed.
"""

from __future__ import annotations

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from distillbench.identity import derive_seed
from distillbench.training.noise import Key, Rows
from distillbench.training.trees import Tree


@dataclass(frozen=True)
class Request(Rows):
    """Rows that a stream is to load.

    Attributes:
        rows: (B,) int64, in the stream's own numbers.  position: of the batch in the stream.
    """

    rows: Tensor
    position: int

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, start: int, stop: int) -> Request:
        """Rows ``start:stop``: of a micro-batch, or of one process."""
        return Request(self.rows[start:stop], self.position, key=None if self.key is None else self.key.at(start))


@dataclass(frozen=True, kw_only=True)
class Examples(Rows):
    """What every kind of batch is: rows, of which a loop may hand out a part.

    A term of a loss has a value for each of a *unit*: ``rows``, or what else a kind of batch has (tokens, pixels, pairs).

    Attributes:
        totals: unit -> how many the *whole* batch has, on all processes; None where these rows are the whole batch.
    """

    totals: Mapping[str, int] | None = None

    def stamped(self, key: Key, totals: Mapping[str, int]) -> Self:
        """The same rows as a loop hands them out."""
        stamped = object.__new__(type(self))  # dataclasses.replace checks every field anew, at every update
        stamped.__dict__.update(self.__dict__, key=key, totals=totals)
        return stamped

    def units(self) -> dict[str, int]:
        """Unit -> how many there are in these rows."""
        return {"rows": len(self)}

    def total(self, unit: str) -> int:
        """How many of ``unit`` the whole batch has. Raises KeyError for a unit that this kind of batch has not."""
        return (self.units() if self.totals is None else self.totals)[unit]

    def part(self, start: int, stop: int) -> Self:
        """Rows ``start:stop`` of a whole batch. A stream whose rows are loaded together needs it."""
        raise NotImplementedError

    def to(self, device: torch.device) -> Self:
        """The same rows on ``device``."""
        raise NotImplementedError

    def _sliced(self, start: int, stop: int) -> dict[str, Any]:
        """Key and totals of a part: what is the whole's stays the whole's."""
        return {"key": None if self.key is None else self.key.at(start), "totals": self.totals or self.units()}


@dataclass(frozen=True)
class Batch(Examples):
    """Examples with a class each.

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

    @property
    def _device(self) -> torch.device:
        return self.inputs.device

    @property
    def condition(self) -> Tree:
        """What a generator of such examples is told of each row: its label."""
        return self.labels

    def part(self, start: int, stop: int) -> Batch:
        """Rows ``start:stop``."""
        parts = (x[start:stop] for x in (self.inputs, self.labels, self.index, self.labelled))
        return Batch(*parts, **self._sliced(start, stop))

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``."""
        if self.inputs.device == device:
            return self
        moved = (x.to(device) for x in (self.inputs, self.labels, self.index, self.labelled))
        return Batch(*moved, key=self.key, totals=self.totals)


B = TypeVar("B", bound=Examples, covariant=True)


class Batches(ABC, Generic[B]):
    """An endless stream of batches that can be entered at any position.

    Attributes:
        together: the rows of a batch are chosen or sampled together, so every process loads all of them, and parts are cut afterwards.
        regular: every batch costs as much; where one is sampled at a length that nobody knows, operations are counted more often.
        indivisible: a batch is one thing (a whole graph): it is never split, processes repeat it, and gradients are not summed.
    """

    batch_size: int
    regular: bool = True
    together: bool = False
    indivisible: bool = False

    @abstractmethod
    def rows(self, position: int) -> Tensor:
        """Which rows make the batch of a position, (B,) int64: a pure function."""

    @abstractmethod
    def take(self, request: Request) -> B:
        """The rows of a request as a batch; what is random in it is a function of position and row."""

    def load(self, requests: Iterator[Request]) -> Iterator[B]:
        """The batch of each request, in order. Streams that read ahead do so here."""
        return map(self.take, requests)

    def stream(self, start: int) -> Iterator[B]:
        """Whole batches from position ``start`` on, outside of a loop, and so without a key to draw noise with."""
        return self.load(Request(self.rows(p), p) for p in itertools.count(start))


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


@functools.lru_cache(maxsize=16)
def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """A permutation of ``count`` numbers, (count,) int64, drawn from (seed, epoch) alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed(f"epoch {epoch}", seed)))


def epoch_rows(count: int, batch_size: int, seed: int, position: int) -> Tensor:
    """The rows (B,) of a position in epochs over ``count`` rows, each a permutation; short tails are dropped."""
    epoch, place = divmod(position, count // batch_size)
    return epoch_order(count, seed, epoch)[place * batch_size : (place + 1) * batch_size]


@dataclass(frozen=True)
class Shuffled(Batches[Batch]):
    """Epochs over rows of :class:`Arrays`: each epoch is a permutation drawn from (seed, epoch); short tails are dropped.

    Attributes:
        chosen: (M,) int64, the rows to draw from; with fewer rows than ``batch_size`` a batch holds all M of them.
    """

    data: Arrays
    chosen: Tensor
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_size", min(self.batch_size, int(self.chosen.numel())))

    def rows(self, position: int) -> Tensor:
        """Rows of the data set."""
        return self.chosen[epoch_rows(len(self.chosen), self.batch_size, self.seed, position)]

    def take(self, request: Request) -> Batch:
        """Rows of the data set as a batch."""
        return self.data.take(request.rows)
