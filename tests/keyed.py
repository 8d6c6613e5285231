"""What loops do to batches, for tests that look at batches outside of one."""

import dataclasses
import itertools

from distillbench.training.data import Request
from distillbench.training.noise import Key


def keyed(batch, position=0, seed=1):
    """``batch`` as the first loop of a run would hand it out."""
    return dataclasses.replace(batch, key=Key(seed, 0, 0, position))


def stream(batches, start=0, seed=1):
    """The batches of a stream from position ``start`` on, loaded as the first loop of a run would."""

    def requests():
        for position in itertools.count(start):
            yield Request(batches.rows(position), position, key=Key(seed, 0, 0, position))

    for position, batch in enumerate(batches.load(requests()), start):
        yield keyed(batch, position, seed)
