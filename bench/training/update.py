"""One update of one learner: the losses of the parts of a batch, their gradients, the optimizer's step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distillbench.training.learner import Learner, Losses
from distillbench.training.meter import Meter
from distillbench.training.noise import Key
from distillbench.training.observer import Observer
from distillbench.training.parts import Keyed
from distillbench.training.processes import Processes
from distillbench.training.reduction import NeedsOutputs, Reduction
from distillbench.training.watch import Watch


class Updates:
    """Makes updates, each on the parts that this process has of a batch.

    Attributes:
        reduction: of the losses that are being computed, None between them.
        following: key of the update that ``after`` is called for, None elsewhere.
    """

    def __init__(self, processes: Processes, meter: Meter, observer: Observer, watch: Watch) -> None:
        self._processes, self._meter, self._observer, self._watch = processes, meter, observer, watch
        self.reduction: Reduction | None = None
        self.following: Key | None = None
        self._coupled: set[Learner] = set()  # whose terms couple the parts of a batch

    def gradients(self, learner: Learner, parts: list[Keyed], *, repeated: bool) -> tuple[dict[str, Tensor], Mapping[str, int]]:
        """The gradient of the whole batch's loss in ``.grad``, its terms, and how many of each unit the batch has.

        Args:
            repeated: every process has the whole batch, and computes the same.
        """
        shared = self._processes.count > 1 and not repeated
        totals = parts[0][1].totals or self._totals([rows.units() for _, rows in parts], shared)
        for p in learner.parameters:  # what optimizer.zero_grad does, without its profiling
            p.grad = None
        self.reduction = Reduction(len(parts), self._processes.count if shared else 1, self._processes.gather if shared else None)
        try:
            total = self._passes(self.reduction, learner, parts, totals)
        finally:
            self.reduction = None
        # Every process sees the whole batch's loss: they stop together or not at all.
        return ({name: self._processes.sum(value) for name, value in total.items()} if shared else total), totals

    def step(self, learner: Learner, terms: dict[str, Tensor], key: Key, *, step: int, made: int, repeated: bool) -> None:
        """What follows the gradients: their sum over processes, the optimizer, the averages, ``after``.

        Args:
            step: of the loop.  made: updates that this learner made in it before.
        """
        if self._processes.count > 1 and not repeated:
            for p in learner.parameters:
                if p.grad is not None:
                    p.grad = self._processes.sum(p.grad)
            for m in (learner.module, *learner.extra):
                for b in m.buffers():
                    b.copy_(self._processes.mean(b) if b.is_floating_point() else b)
        if learner.training.clip is not None:
            self._processes.clip(learner.parameters, learner.training.clip)
        if self._watch.left is not None:
            self._watch.before_step()
        self._observer.stepping(learner)
        learner.step()
        self._observer.stepped(learner, made)
        if step >= self._watch.next:
            self._watch.stepped(step)
        learner.follow(made)
        if learner.after is not None:
            self.following = dataclasses.replace(key, row=0, asked=set())
            learner.after(terms)
            self.following = None
        self._observer.updated(learner, terms)

    def _passes(self, reduction: Reduction, learner: Learner, parts: list[Keyed], totals: Mapping[str, int]) -> dict[str, Tensor]:
        """The gradients of every part, summed into ``.grad``; the terms of all of them together.

        Where a term couples the parts, a first pass without a graph gives each the others' outputs (Gao et al. 2021, arXiv 2101.06983).
        """
        total: dict[str, Tensor] = {}
        asked = {name: self._meter.counts[name] for name in ("teacher_examples", "teacher_flops")}
        if learner not in self._coupled:
            try:
                self._learn(reduction, learner, parts, totals, total)
                return total
            except NeedsOutputs:
                self._coupled.add(learner)
                self._meter.counts.update(asked)
                self._watch.forget()
        reduction.collect()
        with torch.no_grad():
            for reduction.part, part in enumerate(parts):
                self._terms(learner, part, totals)
        self._meter.counts.update(asked)  # a batch that is looked at twice is asked about once
        reduction.learn()
        self._learn(reduction, learner, parts, totals, total)
        return total

    def _learn(
        self, reduction: Reduction, learner: Learner, parts: list[Keyed], totals: Mapping[str, int], total: dict[str, Tensor]
    ) -> None:
        for reduction.part, part in enumerate(parts):
            terms = self._terms(learner, part, totals)
            self._observer.losses(learner, terms)
            self._backward(learner, terms, total)

    def _terms(self, learner: Learner, part: Keyed, totals: Mapping[str, int]) -> Losses:
        key, rows = part
        self._processes.seed(key.seed_of("global"))  # dropout
        batch = self._observer.batch(learner, rows.stamped(key.at(0), totals).to(self._processes.device))
        if learner.training.precision == "bfloat16" and has_bfloat16(self._processes.device):
            with torch.autocast(self._processes.device.type, dtype=torch.bfloat16):
                return learner.loss(batch)
        return learner.loss(batch)

    @staticmethod
    def _backward(learner: Learner, terms: Losses, total: dict[str, Tensor]) -> None:
        if learner.backward is None:
            functools.reduce(torch.add, terms.values()).backward()  # type: ignore[no-untyped-call]
        else:
            learner.backward(dict(terms), learner.parameters)
        for name, value in terms.items():
            total[name] = total[name] + value.detach() if name in total else value.detach()

    def _totals(self, units: Sequence[Mapping[str, int]], shared: bool) -> dict[str, int]:
        mine = {unit: sum(p[unit] for p in units) for unit in units[0]}
        return dict(zip(mine, map(round, self._processes.total(list(mine.values()))), strict=True)) if shared else mine


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16: every CPU build of torch does, a GPU from Ampere on."""
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported())
