"""Checks of a long training that is looked at from the first update to the last."""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor, nn

from distillbench.checks.core import Failed, Skipped, Subject, Unproven, check
from distillbench.checks.trial import Trial, long_training, updated
from distillbench.checks.watch import COUNTED, KEPT, Watch, flat

CLOSE = 1e-4  # of the way that the weights went: how far rounding may take an average


def _watched(subject: Subject) -> tuple[Trial, Watch]:
    trial = long_training(subject)
    if not updated(trial):
        raise Skipped("nothing is trained")
    assert isinstance(trial.seen, Watch)
    return trial, trial.seen


@check
def data_intact(subject: Subject) -> None:
    """Data sets, texts, tables of answers and batches are after a training what they were before."""
    trial = long_training(subject)
    assert isinstance(trial.seen, Watch)
    if trial.data_faults:
        raise Failed(f"the training changed problem.{', problem.'.join(trial.data_faults[:3])} in place")
    if trial.seen.altered:
        raise Failed(f"a loss changed the batch's {', '.join(trial.seen.altered)} in place: others see the same rows")


@check
def updates(subject: Subject) -> None:
    """Weights change in a learner's optimizer steps and nowhere else."""
    trial = long_training(subject)
    assert isinstance(trial.seen, Watch)
    if trial.seen.foreign:
        raise Failed(
            f"{trial.seen.foreign[0]} made {len(trial.seen.foreign)} steps outside of run.fit and run.loop, which nobody bills or saves"
        )
    if trial.seen.moved:
        raise Failed(f"weights changed {', '.join(trial.seen.moved)}: let a learner of run.loop make every update")


@check
def terms(subject: Subject) -> str:
    """Every term of every loss has a gradient at some step, and one that has none is followed by ``after``."""
    _, seen = _watched(subject)
    for (_, name), felt in seen.felt.items():
        if felt.largest == 0 and not (felt.followed and felt.first is None):
            how = "it has no graph" if felt.first is None else "its gradient is 0 at every step"
            raise Failed(f"the term {name!r} teaches nothing: {how}; is a weight 0, or an answer detached that learns?")
    return ", ".join(dict.fromkeys(name for _, name in seen.felt))


@check
def averages(subject: Subject) -> str:
    """What is exported as an average is the one that its decay gives, made again here from the weights after every optimizer's step."""
    trial, seen = _watched(subject)
    if seen.strayed:
        raise Failed("an average began from other weights than those it follows: make the Learner when its network is ready for the loop")
    for follower, mine in seen.own.items():
        now, again = flat(follower), torch.cat([p.flatten() for p in mine])
        if not _close(now, again, seen):
            raise Failed(
                f"an average is off by {float((now - again).abs().max()):.2g} from what its decay gives: who else moved it, or did not?"
            )
    found = []
    for name, part in trial.student.parts.items():
        made, trained = trial.exported[name]
        average = made if part.kind == "averaged" else trained if part.kind == "converted" else None
        if average is None or (part.kind == "converted" and average not in seen.own):
            continue
        found.append(name)
        if average not in seen.own:
            _by_itself(part.how, average, seen)
    if not found and not seen.own:
        raise Skipped("no average is kept")
    return f"made again: {len(seen.own)}"


def _close(one: Tensor, other: Tensor, seen: Watch) -> bool:
    ways = [way for way in seen.ways.values() if way[0].shape == tuple(one.shape)]
    went = max((float(np.abs(way[-1] - way[0]).max()) for way in ways), default=0.0)
    return float((one.double() - other.double()).abs().max()) <= CLOSE * went + 1e-7


def _by_itself(how: str, average: nn.Module, seen: Watch) -> None:
    """Judge an average that a method made by itself. Raises Failed where it is none, Unproven where nobody can tell."""
    now = flat(average)
    ways = [way for way in seen.ways.values() if way[0].shape == tuple(now.shape)]
    if any(np.array_equal(now.numpy(), weights) for way in ways for weights in way):
        raise Failed("what is exported as an average is the weights of one moment: it was never updated, or is a copy from before the end")
    decay = re.search(r"(?<![\d.])(?:0?\.\d+|[01])(?![\d.])", how)
    if decay is None:
        raise Unproven(
            f"the method averages by itself ({how or 'it does not say how'}), so nobody can make its average again: "
            "use ema=..., or write the decay: averaged='ema 0.99'"
        )
    rate = float(decay.group())
    for way in ways:
        mean = way[0].astype(np.float64)
        for weights in way[1:]:
            mean = rate * mean + (1 - rate) * weights
        if _close(now, torch.from_numpy(mean), seen):
            return
    raise Failed(f"what is exported as {how!r} is not the average of that decay over any network's training: is it stale?")


@check
def memory(subject: Subject) -> str:
    """What is kept in memory does not grow with the number of updates."""
    _, seen = _watched(subject)
    if seen.grows:
        raise Failed(f"memory grows: {seen.grows}; keep numbers and detached sums, not what a loss was computed from")
    if len(seen.kept) < KEPT:
        raise Skipped(f"the last loop has fewer than {KEPT * COUNTED} updates")
    return f"{seen.kept[-1][0]} tensors"
