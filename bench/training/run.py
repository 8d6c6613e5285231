"""The run: what a method is handed besides its problem. It owns budget, metering, loops, checkpoints, seeds and reduction.

A method's ``distill`` is executed from its beginning every time. Loops that a killed process had begun continue from
their last checkpoint and finished ones are restored, so the code between them must be a function of problem and run.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from distillbench.cards.card import Budget, Training
from distillbench.errors import Diverged, UserError
from distillbench.identity import derive_seed
from distillbench.training.averages import Decay
from distillbench.training.checkpoint import load_checkpoint, rng_state, save_checkpoint, set_rng_state
from distillbench.training.data import Batches
from distillbench.training.learner import Backward, Learner, Losses, rate
from distillbench.training.oracle import Meter
from distillbench.training.student import AVERAGE, ONLY, Kind, Part, Student

__all__ = ["Learner", "Losses", "Run", "has_bfloat16"]

TRACED = 40  # points of each loss term that a record keeps


class Run:
    """Budget, loops, seeds and reduction of one run.

    Args:
        seeds: role -> seed, as in the resolved spec.
        budget: caps of the track; :meth:`fit` uses what is left of ``student_examples`` unless told otherwise.
        training: the optimizer of the track.
        meter: where costs are counted; the oracle's, so that both count in one place.
        folder: for checkpoints, or None for a run that is not to survive.
        checkpoint_seconds: the most that a ``kill -9`` can lose.
        micro_batches: parts a batch is split into before its gradients are summed.
        progress: called with (phase, steps done, steps in all), at most ten times a second.
        code: digest of the code that trains; a checkpoint of other code is refused.
    """

    def __init__(
        self,
        *,
        seeds: Mapping[str, int],
        budget: Budget,
        training: Training,
        meter: Meter | None = None,
        folder: Path | None = None,
        checkpoint_seconds: float = 30.0,
        micro_batches: int = 1,
        accelerator: Accelerator | None = None,
        progress: Callable[[str, int, int], None] | None = None,
        code: str | None = None,
    ) -> None:
        self.seeds = dict(seeds)
        self.budget = budget
        self.training = training
        self.meter = meter or Meter()
        self.trace: dict[str, list[float]] = {}
        self.phases: dict[str, dict[str, float]] = {}
        # What a method wants to keep besides weights (a schedule that follows the loss, a replay buffer): numbers, tensors, lists and
        # dicts of them. Checkpoints carry it.
        self.state: dict[str, Any] = {}
        # What the checks compare with: of the last export, by part, the network as it was exported and as it was trained, where there
        # are such; and the networks that loops have trained.
        self.exported: dict[str, tuple[nn.Module | None, nn.Module | None]] = {}
        self.seen: list[nn.Module] = []
        self._averages: list[tuple[nn.Module, str]] = []
        self._folder = folder
        self._every = checkpoint_seconds
        self._code = code
        self._micro = micro_batches
        self._accelerator = accelerator or Accelerator(cpu=not torch.cuda.is_available())
        # Read at every step, and slow to ask the accelerator for.
        self._ranks, self._rank = self._accelerator.num_processes, self._accelerator.process_index
        self._on_cpu = self.device.type == "cpu"
        self._progress = progress or (lambda phase, done, total: None)
        self._generators: dict[str, torch.Generator] = {}
        self._phase = "fit"
        self._started: dict[str, float] = dict(self.meter.counts)
        self._unit = 0
        self._share = 1.0
        self._loose = 0.0  # seconds of finished loops that no checkpoint holds: with the loop under way, never more than self._every
        self._progress_made = 0.0
        self._ticked = time.perf_counter()
        torch.manual_seed(self.seeds["noise"])  # networks a method makes before its first loop are the same every time

    # --- what methods use -------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where networks and batches are."""
        device: torch.device = self._accelerator.device
        return device

    @property
    def progress(self) -> float:
        """The part of the loop under way that is done, in [0, 1): for weights that rise or fall with training."""
        return self._progress_made

    def generator(self, role: str = "noise") -> torch.Generator:
        """The random stream of a role, on the CPU so that every device sees the same numbers; checkpoints carry its state.

        The same on every process. One stream for each kind of draw keeps micro-batches exact.
        """
        if role not in self._generators:
            seed = self.seeds.get(role, derive_seed(role, self.seeds["noise"]))
            self._generators[role] = torch.Generator().manual_seed(seed)
        return self._generators[role]

    def loss(self, **terms: Tensor) -> dict[str, Tensor]:
        """Reduce named terms: the one owner of the denominator.

        Each term is per example (B,), or 0-dimensional where the objective couples the batch. The result sums over
        micro-batches and processes to the mean over the whole batch.

        Raises:
            UserError: a term has another shape.
        """
        for name, value in terms.items():
            if value.dim() > 1:
                raise UserError(f"loss term {name!r} has shape {tuple(value.shape)}; give one value per example: (B,)")
        if self._share == 1.0:  # a product with 1 would change nothing and cost two kernels a term
            return {name: value.mean() for name, value in terms.items()}
        return {name: value.mean() * self._share for name, value in terms.items()}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Label what is spent inside: its cost stands in the record under ``name``."""
        before, self._phase = self._phase, name
        self._settle(before)
        try:
            yield
        finally:
            self._settle(name)
            self._phase = before

    def steps(self, batch_size: int, share: float = 1.0) -> int:
        """Optimizer steps that ``share`` of the whole budget allows, at least one, never more than what is left of it.

        Raises:
            UserError: nothing is left.
        """
        left = self.budget.student_examples - self.meter.counts["student_examples"]
        steps = min(int(left) // batch_size, max(1, int(share * self.budget.student_examples) // batch_size))
        if steps < 1:
            raise UserError(
                f"the budget of {self.budget.student_examples} student examples is used up before phase {self._phase!r}: "
                f"{left:.0f} left, one batch takes {batch_size}"
            )
        return steps

    def fit(
        self,
        student: nn.Module,
        loss: Callable[[Any], Losses],
        batches: Batches,
        *,
        extra: Sequence[nn.Module] = (),
        steps: int | None = None,
        share: float = 1.0,
        ema: Decay | None = None,
        backward: Backward | None = None,
        after: Callable[[dict[str, Tensor]], None] | None = None,
        recipe: dict[str, Any] | None = None,
        **options: Any,
    ) -> Student:
        """Train ``student`` with one optimizer and export it: its average where ``ema`` is given, else its last weights.

        Args:
            share: the part of the whole budget to use (at most what is left); ``steps`` overrides it.
            extra, ema, backward, after, options: as in :class:`Learner`.

        Raises:
            Diverged: the loss left the finite numbers.
        """
        learner = Learner(student, loss, extra=extra, ema=ema, backward=backward, after=after, **options)
        self.loop([learner], batches, steps=steps, share=share)
        return self.export(student if learner.average is None else learner.average, recipe=recipe, averaged=ema is not None)

    def export(
        self,
        module: nn.Module | None = None,
        *,
        parts: Mapping[str, nn.Module | Part] | None = None,
        recipe: dict[str, Any] | None = None,
        averaged: bool | str = False,
        converted: str = "",
        of: nn.Module | Mapping[str, nn.Module] | None = None,
    ) -> Student:
        """``module``, or ``parts`` by name, as the student that leaves the method.

        Args:
            parts: networks, as they were trained, and :class:`Part` for what is something else.
            averaged: whether these are averaged weights. True takes the name of the learner's average that ``module`` is; a method
                that averages by itself says what it does.
            converted: what was done to the weights after the training (``int8``, ``merged``, ``masked``), or empty.
            of: the network that was trained, or its average, of which ``module`` is a converted copy; with ``parts``, those of the
                parts that are converted, by name.

        Raises:
            UserError: the problem did not build it, it is declared as an average and is the network that was trained, or it is
                declared as converted without a word of the network that was trained.
        """
        if (module is None) == (parts is None):
            raise UserError("export one network, or parts={name: network or Part}")
        if (averaged and converted) or (module is None and (averaged or converted)):
            raise UserError(
                "a part is of one kind: of=... names an average that was converted; parts say it as Part.of(network, kind, how)"
            )
        if module is not None and not hasattr(module, "architecture"):
            raise UserError("only a network the problem built can be exported: problem.student or problem.new_student(...)")
        if averaged and any(m is module for m in self.seen):
            raise UserError("declared as an average, but this network was trained itself: export learner.average, or leave averaged out")
        if averaged is True:
            averaged = next((name for m, name in self._averages if m is module), AVERAGE)
        given = dict(parts or {})
        networks = {name: part for name, part in given.items() if isinstance(part, nn.Module)}
        if module is not None:
            kind: Kind = "converted" if converted else "averaged" if averaged else "trained"
            given, networks = {ONLY: Part.of(module, kind, converted or averaged or "")}, {ONLY: module}
        made = {name: part if isinstance(part, Part) else Part.of(part) for name, part in given.items()}
        before = {ONLY: of} if isinstance(of, nn.Module) else dict(of or {})
        if stray := sorted(before.keys() ^ {name for name, part in made.items() if part.kind == "converted"}):
            raise UserError(f"of=... names, for each part that is converted and no other, the network that was trained: {', '.join(stray)}")
        if any(before.get(name) is network for name, network in networks.items()):
            raise UserError("converted in place, so nobody can tell what was trained: export a converted copy, with of=the network")
        self.exported = {name: (networks.get(name), before.get(name, networks.get(name))) for name in made}
        return Student(made, dict(recipe or {}))

    def loop(self, learners: Sequence[Learner], batches: Batches, *, steps: int | None = None, share: float = 1.0) -> None:
        """Iterate: each learner in turn makes its updates, every update on the next batch of the stream.

        A learner's networks are frozen while another one learns, so a generator's gradient can pass through its critic.
        ``steps`` defaults to what ``share`` of the budget allows for the learner that is metered as the student.

        Raises:
            Diverged: a loss left the finite numbers; names the step.
            SaveError: a checkpoint could not be written.
        """
        metered = next((x for x in learners if x.counts == "student_examples"), None)
        if steps is None:
            if metered is None:
                raise UserError("a loop without a student needs steps=...")
            steps = self.steps(batches.batch_size * metered.updates, share)
        for learner in learners:
            learner.prepare(self.training, self.device)
            self.seen.append(learner.module)
            self._averages += learner.averages
        torch.manual_seed(derive_seed(f"loop {self._unit}", self.seeds["noise"]))
        self._tick()
        state = self._resume(learners)
        step, flops = state["step"], state["flops"]
        per_step = sum(x.updates for x in learners)
        stream = batches.stream(step * per_step)
        every = max(1, steps // TRACED)
        device = self.device
        saved = self._ticked = time.perf_counter()
        shown = 0.0
        for learner in learners:
            learner.module.train()
            for module in learner.extra:
                module.train()
        while step < steps:
            self._progress_made = step / steps
            # Step 0 may fill tables once, so the second step stands for the first half; the middle one for the rest.
            counter = FlopCounterMode(display=False) if step in (min(1, steps - 1), steps // 2) else None
            with counter or contextlib.nullcontext():
                for learner in learners:
                    if len(learners) > 1:
                        for other in sorted(learners, key=lambda x: x is learner):  # itself last: learners may share a network
                            for p in other.parameters:
                                p.requires_grad_(other is learner)
                    lr = learner.training.learning_rate * rate(learner.training, step, steps)
                    for group in learner.optimizer.param_groups:
                        group["lr"] = lr
                    # Asking a GPU at every step would make it wait; what the trace shows has been looked at.
                    watched = self._on_cpu or step % 16 == 0 or step % every == 0
                    for again in range(learner.updates):
                        terms = self._update(learner, next(stream).to(device), step, watched, again)
                    if step % every == 0:
                        for name, value in terms.items():
                            self.trace.setdefault(f"{self._phase}/{name}", []).append(float(f"{float(value):.5g}"))
            if counter is not None:
                flops = float(counter.get_total_flops()) * self._accelerator.num_processes
            if step > 0 or steps == 1:
                self.meter.add("training_flops", flops * (2 if step == 1 else 1))
            step += 1
            now = time.perf_counter()
            if now - shown > 0.1:
                self._progress(self._phase, step, steps)
                shown = now
            if self._folder is not None and now - saved >= self._every - self._loose and step < steps:
                self._save(learners, step, flops)
                saved = time.perf_counter()
        for learner in learners:
            for p in learner.parameters:
                p.requires_grad_(True)
        self._progress(self._phase, steps, steps)
        self._tick()
        unsaved = self._ticked - saved
        if self._folder is not None and self._loose + unsaved >= self._every / 2:
            self._save(learners, step, flops)
        else:
            self._loose += unsaved
        self._unit += 1

    # --- the engine -------------------------------------------------------------------------------------------

    def _update(self, learner: Learner, batch: Any, step: int, watched: bool, again: int) -> dict[str, Tensor]:
        """One optimizer step of one learner on one global batch, its ``again``-th of this step; this process takes its share of it."""
        size, ranks, rank = len(batch), self._ranks, self._rank
        if size < ranks:
            raise UserError(f"a batch of {size} cannot be shared by {ranks} processes")
        low, high = rank * size // ranks, (rank + 1) * size // ranks
        before = dict(self.meter.counts) if ranks > 1 else {}
        for p in learner.parameters:  # what optimizer.zero_grad does, without its profiling
            p.grad = None
        total: dict[str, Tensor] = {}
        finite = 0.0
        for part in range(self._micro):
            start, stop = (low + _aligned(p * (high - low) // self._micro, high - low, self._micro) for p in (part, part + 1))
            if start == stop:
                continue
            self._share = (stop - start) / size
            with self._autocast(learner.training):
                terms = learner.loss(batch if stop - start == size else batch.part(start, stop))
            self._share = 1.0
            objective = functools.reduce(torch.add, terms.values())
            if learner.backward is None:
                objective.backward()  # type: ignore[no-untyped-call]
            else:
                learner.backward(dict(terms), learner.parameters)
            if watched:
                finite += objective.item()
            for name, value in terms.items():
                total[name] = total[name] + value.detach() if name in total else value.detach()
        if ranks > 1:
            # What was asked about this share stands for the whole batch, and every process sees the whole batch's loss:
            # they stop together or not at all.
            for asked in ("teacher_examples", "teacher_forwards"):
                share = self.meter.counts[asked] - before[asked]
                self.meter.add(asked, round(share * size / (high - low)) - share)
            total = {name: self._accelerator.reduce(value, reduction="sum") for name, value in total.items()}
            finite = float(sum(total.values())) if watched else 0.0
        if not math.isfinite(finite):
            self._tick()
            shown = ", ".join(f"{n}={float(v):.4g}" for n, v in total.items())
            raise Diverged(step, self._phase, shown)
        if ranks > 1:
            for p in learner.parameters:
                if p.grad is not None:
                    p.grad = self._accelerator.reduce(p.grad, reduction="sum")
            for m in (learner.module, *learner.extra):
                for b in m.buffers():
                    b.copy_(self._accelerator.reduce(b, reduction="mean") if b.is_floating_point() else b)
        if learner.training.clip is not None:
            self._accelerator.clip_grad_norm_(learner.parameters, learner.training.clip)
        learner.optimizer.step()
        learner.follow(step * learner.updates + again)
        if learner.after is not None:
            learner.after(total)
        if learner.counts is not None:
            self.meter.add(learner.counts, size)
        if learner.counts == "student_examples":
            self.meter.add("student_steps", 1)
        return total

    def _autocast(self, training: Training) -> contextlib.AbstractContextManager[Any]:
        if training.precision == "bfloat16" and has_bfloat16(self.device):
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def _tick(self) -> None:
        """Add the wall-clock time since the last tick."""
        now = time.perf_counter()
        self.meter.add("wall_seconds", now - self._ticked)
        self._ticked = now

    def _settle(self, name: str) -> None:
        """Bill what was spent since the last settling to phase ``name``."""
        self._tick()
        bill = self.phases.setdefault(name, dict.fromkeys(Meter.FIELDS, 0.0))
        for field, count in self.meter.counts.items():
            bill[field] += count - self._started[field]
        self._started = dict(self.meter.counts)

    def cost(self) -> dict[str, Any]:
        """What was used: ``total`` and ``phases``, with the meters' names."""
        self._settle(self._phase)
        return {"total": dict(self.meter.counts), "phases": {n: b for n, b in self.phases.items() if any(b.values())}}

    def over_budget(self) -> str | None:
        """Which cap was passed, or None."""
        for name in ("student_examples", "teacher_examples", "training_flops", "wall_seconds"):
            cap = getattr(self.budget, name)
            if cap is not None and self.meter.counts[name] > cap:
                return f"{name} {self.meter.counts[name]:.6g} of {cap:.6g}"
        return None

    def _path(self) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._unit:02d}-{self._phase}.checkpoint"

    def _save(self, learners: Sequence[Learner], step: int, flops: float) -> None:
        self._tick()
        if not self._accelerator.is_main_process:
            return
        state = {
            "code": self._code,
            "step": step,
            "flops": flops,
            "learners": [x.state() for x in learners],
            "meter": self.meter.counts,
            "started": self._started,
            "phases": self.phases,
            "trace": self.trace,
            "method": self.state,
            "rng": rng_state(),
            "generators": {role: g.get_state() for role, g in self._generators.items()},
        }
        path = self._path()
        if path.exists():
            path.replace(path.with_suffix(".previous"))
        save_checkpoint(path, state)

    def _resume(self, learners: Sequence[Learner]) -> dict[str, Any]:
        """Continue from the newest whole checkpoint of this loop, if there is one."""
        fresh = {"step": 0, "flops": 0.0}
        if self._folder is None:
            return fresh
        for path in (self._path(), self._path().with_suffix(".previous")):
            if not path.exists():
                continue
            try:
                state = load_checkpoint(path)
            except UserError as error:
                warnings.warn(f"{path.name} is not usable, going back to the one before: {error}", stacklevel=2)
                continue
            if state.get("code") != self._code:
                warnings.warn(f"{path.name} was written by other code than today's, so it is not used; this loop begins anew", stacklevel=2)
                continue
            for learner, saved in zip(learners, state["learners"], strict=True):
                learner.restore(saved)  # what does not fit raises: half a state restored is no fresh start
            self.meter.counts.update(state["meter"])
            self._started, self.phases, self.trace = state["started"], state["phases"], state["trace"]
            self.state = state["method"]
            set_rng_state(state["rng"])
            for role, saved in state["generators"].items():
                self.generator(role).set_state(saved)
            return state
        return fresh


def _aligned(place: int, size: int, parts: int) -> int:
    """Where a part begins: at a multiple of 16 where there is room, because torch draws normal numbers in blocks of 16.

    So the noise of a batch is the same whether it is drawn at once or part by part.
    """
    return place - place % 16 if place < size and size >= 16 * parts else place


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16: every CPU build of torch does, a GPU from Ampere on."""
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported())
