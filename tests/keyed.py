"""What loops do to batches, for tests that look at batches outside of one."""

import dataclasses
import itertools

from distillbench.training.data import Request
from distillbench.training.noise import Key
from distillbench.training.reduction import Reduction


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


def reduced(batch, values, unit="rows"):
    """What a loop makes of one term of a batch, or of its part of a batch: a 0-dimensional tensor."""
    return Reduction()(batch, {"x": (values, unit)})["x"]
