"""A trainable network with its loss and its optimizer, and the learning rate as a function of the step."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distillbench.cards.card import Training
from distillbench.training import averages
from distillbench.training.averages import Decay
from distillbench.training.data import Batches, Examples

Losses = Mapping[str, Tensor]
Backward = Callable[[dict[str, Tensor], list[nn.Parameter]], None]


class Learner:
    """A trainable network with its loss, optimizer and learning-rate schedule.

    A loop may train several in turn (generator and critic).

    Args:
        module: what is trained.
        loss: ``loss(batch)`` returns ``run.loss(...)``.
        extra: networks trained along and thrown away (regressors, auxiliary heads).
        batches: its own stream; None for the loop's, which learners share.
        updates: optimizer steps of this learner per iteration of the loop.  every: it acts in every so many-th iteration.
        ema: decay of an exponential moving average of the weights, kept as :attr:`average` (what is exported), or None. A number, or
            a function from the updates made before in this loop to one (see :mod:`averages`).
        target: decay of a second average, kept as :attr:`target`, that the loss itself looks at (consistency models), or None.
        counts: what one example of an update is metered as; None for an auxiliary network such as a fake score.
        backward: replaces the sum-and-backward: gets the reduced terms and the parameters, and leaves ``.grad`` set.
        after: called once after every update with the terms of the whole batch, for schedules that follow the loss.
        options: fields of :class:`card.Training` that differ from the track's (``learning_rate=2e-4``).
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[[Any], Losses],
        *,
        extra: Sequence[nn.Module] = (),
        batches: Batches[Examples] | None = None,
        updates: int = 1,
        every: int = 1,
        ema: Decay | None = None,
        target: Decay | None = None,
        counts: Literal["student_examples", "teacher_examples"] | None = "student_examples",
        backward: Backward | None = None,
        after: Callable[[dict[str, Tensor]], object] | None = None,
        **options: Any,
    ) -> None:
        self.module = module
        self.loss = loss
        self.extra = list(extra)
        self.batches = batches
        self.updates, self.every = updates, every
        self.average = copy.deepcopy(module).requires_grad_(False) if ema is not None else None
        self.target = copy.deepcopy(module).requires_grad_(False) if target is not None else None
        self._followers = [(m, d) for m, d in ((self.average, ema), (self.target, target)) if m is not None and d is not None]
        for _, decay in self._followers:
            averages.at(decay, 0)  # what is no decay is said now, and not after the first step
        # With their names, such as ``ema 0.999``: what is exported says which it is.
        roles = ((self.average, "ema", ema), (self.target, "target", target))
        self.averages = [(m, averages.name(role, d)) for m, role, d in roles if m is not None and d is not None]
        self.counts = counts
        self.backward = backward
        self.after = after
        self.options = options
        self.parameters = [p for m in (module, *self.extra) for p in m.parameters() if p.requires_grad]
        self.training: Training
        self.optimizer: torch.optim.Optimizer

    def prepare(self, training: Training, device: torch.device) -> None:
        """Move to ``device`` and make the optimizer."""
        for module in (self.module, *self.extra, *(m for m, _ in self._followers)):
            module.to(device)
        self.training = dataclasses.replace(training, **self.options)
        self.optimizer = make_optimizer(self.parameters, self.training)

    def take_turn(self, learners: Sequence[Learner], rate: float) -> None:
        """Be the one of ``learners`` that learns, at ``rate`` times its learning rate; the networks of the others are frozen meanwhile."""
        if len(learners) > 1:
            for other in sorted(learners, key=lambda x: x is self):  # itself last: learners may share a network
                for p in other.parameters:
                    p.requires_grad_(other is self)
        for group in self.optimizer.param_groups:
            group["lr"] = self.training.learning_rate * rate

    def step(self) -> None:
        """One step of the optimizer, without torch's label for profilers around it: on small networks that costs 2% of an update."""
        step = type(self.optimizer).step
        getattr(step, "__wrapped__", step)(self.optimizer)

    def made_before(self, step: int) -> int:
        """How many updates it has made in its loop before iteration ``step``."""
        return self.updates * -(-step // self.every)

    def follow(self, update: int) -> None:
        """Move the averages towards the weights after an update, counted from 0 in its loop; buffers are copied."""
        if not self._followers:
            return
        with torch.no_grad():
            for follower, decay in self._followers:
                step = 1 - averages.at(decay, update)
                torch._foreach_lerp_(list(follower.parameters()), list(self.module.parameters()), step)
                for mean, now in zip(follower.buffers(), self.module.buffers(), strict=True):
                    mean.copy_(now)

    def state(self) -> dict[str, Any]:
        """All that a checkpoint needs."""
        return {
            "module": self.module.state_dict(),
            "extra": [m.state_dict() for m in self.extra],
            "followers": [m.state_dict() for m, _ in self._followers],
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state`."""
        self.module.load_state_dict(state["module"])
        for module, saved in zip(self.extra, state["extra"], strict=True):
            module.load_state_dict(saved)
        for (module, _), saved in zip(self._followers, state["followers"], strict=True):
            module.load_state_dict(saved)
        self.optimizer.load_state_dict(state["optimizer"])


def make_optimizer(parameters: Sequence[nn.Parameter], training: Training) -> torch.optim.Optimizer:
    """The optimizer a :class:`Training` describes."""
    lr, decay = training.learning_rate, training.weight_decay
    if training.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=training.momentum, nesterov=training.nesterov, weight_decay=decay, fused=True)
    if training.optimizer == "radam":
        return torch.optim.RAdam(parameters, lr=lr, betas=training.betas, weight_decay=decay)
    kind = torch.optim.AdamW if training.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr=lr, betas=training.betas, weight_decay=decay, fused=True)


def rate(training: Training, step: int, steps: float) -> float:
    """The factor on the learning rate at ``step`` of ``steps`` (0-based), in [0, 1]: a function, so nothing is to be saved."""
    done = step / max(steps, 1)
    if training.warmup and done < training.warmup:
        return min((step + 1) / (training.warmup * steps), 1.0)
    if training.schedule == "cosine":
        span = (done - training.warmup) / (1 - training.warmup)
        return 0.5 * (1 + math.cos(math.pi * span))
    if training.schedule == "steps":
        return training.gamma ** sum(done >= m for m in training.milestones)
    return 1.0
