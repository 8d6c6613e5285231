"""The parts of a stream's batches that one process has: split before anything is loaded, and stamped with what their noise is drawn by."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

from distillbench.errors import UserError
from distillbench.training.data import Batches, Examples, Request
from distillbench.training.meter import Meter
from distillbench.training.noise import Key


def bounds(batches: Batches[Examples], micro: int, processes: int, rank: int) -> list[tuple[int, int]]:
    """Where the micro-batches of one process begin and end in every batch. Every process has as many of them.

    Raises:
        UserError: the stream's batches cannot be split so.
    """
    size = batches.batch_size
    if batches.indivisible:
        if micro > 1:
            raise UserError("a batch of this stream is one whole, so it cannot be split into micro-batches")
        return [(0, size)]
    if size < processes:
        raise UserError(f"a batch of {size} cannot be shared by {processes} processes")
    low, high = rank * size // processes, (rank + 1) * size // processes
    count = min(micro, size // processes)
    return list(itertools.pairwise(low + p * (high - low) // count for p in range(count + 1)))


def parts(
    batches: Batches[Examples], start: int, key: Callable[[int], Key], places: list[tuple[int, int]], meter: Meter
) -> Iterator[list[Examples]]:
    """The parts at ``places`` (of :func:`bounds`) of every batch from position ``start`` on, without end.

    Args:
        key: of a whole batch, from its position.
        meter: told of loading that every process does alike.
    """

    def requests() -> Iterator[Request]:
        for position in itertools.count(start):
            whole = Request(batches.rows(position), position, key=key(position))
            yield from [whole] if batches.together else (whole.part(*place) for place in places)

    loaded = batches.load(requests())
    for position in itertools.count(start):
        if batches.together:
            with meter.together():
                whole = dataclasses.replace(next(loaded), key=key(position))
            yield [whole] if len(places) == 1 and places[0] == (0, len(whole)) else [whole.part(*place) for place in places]
        else:
            yield [dataclasses.replace(next(loaded), key=key(position).at(begin)) for begin, _ in places]
