"""Who looks on while a run trains: progress bars, contract checks, fingerprints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from distillbench.training.learner import Learner


class Observer:
    """Told what happens in a run. This one does nothing; others override what they want to see."""

    def progress(self, phase: str, step: int, steps: int | None) -> None:
        """``step`` of ``steps`` of a loop is done (None: nobody knows how many there are); at most ten times per second."""

    def began(self, learners: Sequence[Learner]) -> None:
        """A loop is about to begin; nothing is prepared or restored yet."""

    def batch(self, learner: Learner, batch: Any) -> Any:
        """The batch that the loss of ``learner`` gets in place of ``batch``."""
        return batch

    def losses(self, learner: Learner, terms: Mapping[str, Tensor]) -> None:
        """The loss of ``learner`` gave ``terms`` for a part of a batch, with their graph; their gradient is not there yet."""

    def stepping(self, learner: Learner) -> None:
        """The optimizer of ``learner`` is about to make its step."""

    def stepped(self, learner: Learner, made: int) -> None:
        """It has, and its averages have not followed yet; ``made`` updates of the learner's loop were before."""

    def updated(self, learner: Learner, terms: Mapping[str, Tensor]) -> None:
        """``learner`` made an update: its gradients are still there, ``terms`` are the whole batch's."""

    def ended(self, learners: Sequence[Learner]) -> None:
        """A loop is over."""

    def saves(self, step: int, steps: int | None) -> bool:
        """Whether to write the checkpoint that is due at ``step``."""
        return True

    def saved(self, written: bool) -> None:
        """A checkpoint was due, and was written or not."""

    def exported(self, parts: Mapping[str, tuple[nn.Module | None, nn.Module | None]]) -> None:
        """What the method exports, by part: the network as it is exported and as it was trained, where there are such."""
