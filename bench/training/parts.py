"""The parts of a stream's batches that one process has: split before anything is loaded, and stamped with what their noise is drawn by."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from distillbench.errors import UserError
from distillbench.training.data import Batches, Examples, Request
from distillbench.training.meter import Meter
from distillbench.training.noise import Key

Keyed = tuple[Key, Examples]  # what the rows of a part are, and what their noise is drawn by


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
) -> Iterator[list[Keyed]]:
    """The parts at ``places`` (of :func:`bounds`) of every batch from position ``start`` on, without end.

    Args:
        key: of a whole batch, from its position.
        meter: told of loading that every process does alike.
    """

    alone = places == [(0, batches.batch_size)]

    def requests() -> Iterator[Request]:
        for position in itertools.count(start):
            whole = Request(batches.rows(position), position, key=key(position))
            if alone or batches.together:
                yield whole
            else:
                yield from (whole.part(*place) for place in places)

    loaded = batches.load(requests())
    if alone and not batches.together:  # the usual case, at every update of it
        for position, only in enumerate(loaded, start):
            yield [(key(position), only)]
    for position in itertools.count(start):
        if batches.together:
            with meter.together():
                whole = next(loaded)
            rows = [whole] if alone else [whole.part(*place) for place in places]
        else:
            rows = [next(loaded) for _ in places]
        yield [(key(position).at(begin), part) for (begin, _), part in zip(places, rows, strict=True)]
