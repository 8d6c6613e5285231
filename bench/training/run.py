"""The run: what a method is handed besides its problem. It owns budget, metering, loops, checkpoints, seeds and reduction.

A method's ``distill`` is executed from its beginning every time. Loops that a killed process had begun continue from
their last checkpoint and finished ones are restored, so the code between them must be a function of problem and run.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from distillbench.cards.card import Budget, Card, Training
from distillbench.errors import Diverged, OverBudget, UserError
from distillbench.identity import derive_seed
from distillbench.training.averages import Decay
from distillbench.training.checkpoint import Checkpoints, rng_state, set_rng_state
from distillbench.training.data import Batches, Examples, Request
from distillbench.training.learner import Backward, Learner, Losses, rate
from distillbench.training.meter import Bill, Meter
from distillbench.training.noise import Key
from distillbench.training.observer import Observer
from distillbench.training.oracle import Oracle
from distillbench.training.pace import LONG, Operations, Pace
from distillbench.training.parts import Keyed, bounds, parts
from distillbench.training.problem import Problem
from distillbench.training.processes import Processes
from distillbench.training.reduction import Reduction, Term, coupled
from distillbench.training.student import AVERAGE, ONLY, Kind, Part, Student
from distillbench.training.update import Updates, has_bfloat16
from distillbench.training.watch import Watch

__all__ = ["Learner", "Losses", "Run", "coupled", "has_bfloat16"]

TRACED = 40  # points of each loss term that a record keeps

Made = TypeVar("Made")
B = TypeVar("B", bound=Examples)
P = TypeVar("P", bound=Problem)


class Run:
    """Budget, loops, seeds and reduction of one run.

    Args:
        seeds: role -> seed, as in the resolved spec.
        budget: caps of the track; :meth:`fit` uses what is left of its pace unless told otherwise.
        training: the optimizer of the track.
        oracles: those that the problem has; they count on this run's meter.
        folder: for checkpoints, or None for a run that is not to survive.
        checkpoint_seconds: the most that a ``kill -9`` can lose.
        micro_batches: parts a batch is split into before its gradients are summed.
        observer: is told what happens.
        code: digest of the code that trains; a checkpoint of other code is refused.
    """

    def __init__(
        self,
        *,
        seeds: Mapping[str, int],
        budget: Budget,
        training: Training,
        oracles: Iterable[Oracle] = (),
        folder: Path | None = None,
        checkpoint_seconds: float = 30.0,
        micro_batches: int = 1,
        accelerator: Accelerator | None = None,
        observer: Observer | None = None,
        code: str | None = None,
    ) -> None:
        self.seeds = dict(seeds)
        self.training = training
        self._processes = Processes(accelerator)
        self._bill = Bill(budget)
        self._oracles = list(oracles)
        for oracle in self._oracles:
            oracle.meter = self.meter
        self.trace: dict[str, list[float]] = {}
        # What a method wants to keep besides weights (a schedule that follows the loss, a replay buffer): numbers, tensors, lists and
        # dicts of them. Checkpoints carry it.
        self.state: dict[str, Any] = {}
        self._trained: list[nn.Module] = []
        self._averages: list[tuple[nn.Module, str]] = []
        self._checkpoints = Checkpoints(folder, code, writes=self._processes.main)
        self._every = checkpoint_seconds
        self._micro = micro_batches
        self._observer = observer or Observer()
        self._watch = Watch(self.meter, shared=self._processes.count > 1)
        self._updates = Updates(self._processes, self.meter, self._observer, self._watch)
        self._generators: dict[str, torch.Generator] = {}
        self._unit = 0  # of the work that checkpoints know: loops, and what is made once
        self._loose = 0.0  # seconds of finished loops that no checkpoint holds: with the loop under way, never more than self._every
        self._progress_made = 0.0
        self._processes.seed(self.seeds["noise"])  # networks a method makes before its first loop are the same every time

    # --- what those use who run a method ------------------------------------------------------------------------

    def watching(self, problem: P, card: Card) -> P:
        """What a method gets in place of ``problem``, so that all that passes through its networks is billed (:mod:`.watch`)."""
        return self._watch.begin(problem, self._oracles, card)

    def returned(self, student: Student) -> None:
        """Bill what a method's student is made of. Raises UserError as :meth:`watch.Watch.returned`."""
        self._watch.returned(student)

    # --- what methods use -------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where networks and batches are."""
        return self._processes.device

    @property
    def budget(self) -> Budget:
        """The caps of the track."""
        return self._bill.budget

    @property
    def meter(self) -> Meter:
        """What was used so far."""
        return self._bill.meter

    @property
    def phases(self) -> dict[str, dict[str, float]]:
        """Phase -> what was used in it, as far as phases are over."""
        return self._bill.phases

    @property
    def progress(self) -> float:
        """The part of the loop under way that is done, in [0, 1): for weights that rise or fall with training."""
        return self._progress_made

    def seed(self, role: str, i: int = 0) -> int:
        """A seed for what a method makes itself, such as the ``i``-th of many fresh networks: ``problem.build(architecture, seed)``."""
        return derive_seed(f"{role} {i}", self.seeds["noise"])

    def generator(self, role: str = "noise") -> torch.Generator:
        """The random stream of a role for draws outside of losses, on the CPU so that every device sees the same numbers.

        The same on every process; checkpoints carry its state. Within a loss, draw from the batch: ``batch.noise(...)``.

        Raises:
            UserError: asked for within a loss, where the order of draws would depend on how the batch is split.
        """
        if self._updates.reduction is not None:
            raise UserError(f"the random stream {role!r} is asked for within a loss: draw from the batch (batch.noise, batch.uniform, ...)")
        if role not in self._generators:
            seed = self.seeds.get(role, derive_seed(role, self.seeds["noise"]))
            self._generators[role] = torch.Generator().manual_seed(seed)
        return self._generators[role]

    def noise(self, shape: Sequence[int], role: str) -> Tensor:
        """Standard normal numbers of any shape, one draw per update and role, the same on every process: for ``after``.

        Raises:
            UserError: outside of an update, or a role asked twice.
        """
        if self._updates.following is None:
            raise UserError(f"run.noise({role!r}) is for what follows an update (after=...); outside of loops draw from run.generator(...)")
        return Request(torch.zeros(1), 0, key=self._updates.following).noise((1, *shape), f"after {role}")[0].to(self.device)

    def loss(self, batch: Examples, /, **terms: Term) -> dict[str, Tensor]:
        """Reduce named terms: the one owner of the denominator.

        A term is one value per row (B,); ``(values, "tokens")`` is one value for each of another unit of the batch; ``coupled(...)``
        is a function of the whole batch. The result sums over micro-batches and processes to the whole batch's mean over its unit.

        Raises:
            UserError: a term has another shape, or a unit that the batch has not.
        """
        return (self._updates.reduction or Reduction())(batch, terms)

    def once(self, name: str, make: Callable[[], Made]) -> Made:
        """``make()``, or what it gave before this run was killed: for costly work outside of loops. Plain data and tensors only."""
        saved = self._restored(name)
        if saved is None:
            made = make()
            self.meter.agree()
            self._write(name, {"made": made})
        else:
            made = saved["made"]
        self._unit += 1
        return made

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Label what is spent inside: its cost stands in the record under ``name``."""
        bill = self._bill
        self._watch.settle()
        before, bill.phase = bill.phase, name
        bill.settle(before)
        try:
            yield
        finally:
            self._watch.settle()
            bill.settle(name)
            bill.phase = before

    def steps(self, batch_size: int, share: float = 1.0) -> int:
        """Optimizer steps that ``share`` of the whole budget allows, at least one, never more than what is left of it.

        Raises:
            UserError: nothing is left, or the setting's pace is not counted in examples.
        """
        if self.budget.pace != "student_examples":
            raise UserError(
                f"the budget's pace is {self.budget.pace}, so nobody knows the number of steps; let run.loop go on until it is used"
            )
        left = self.budget.student_examples - self.meter.counts["student_examples"]
        steps = min(int(left) // batch_size, max(1, int(share * self.budget.student_examples) // batch_size))
        if steps < 1:
            raise UserError(
                f"the budget of {self.budget.student_examples} student examples is used up before phase {self._bill.phase!r}: "
                f"{left:.0f} left, one batch takes {batch_size}"
            )
        return steps

    def fit(
        self,
        student: nn.Module,
        loss: Callable[[B], Losses],
        batches: Batches[B],
        *,
        extra: Sequence[nn.Module] = (),
        steps: int | None = None,
        share: float = 1.0,
        ema: Decay | None = None,
        backward: Backward | None = None,
        after: Callable[[dict[str, Tensor]], object] | None = None,
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
        if averaged and any(m is module for m in self._trained):
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
        self._observer.exported({name: (networks.get(name), before.get(name, networks.get(name))) for name in made})
        return Student(made, dict(recipe or {}))

    def loop(
        self, learners: Sequence[Learner], batches: Batches[Examples] | None = None, *, steps: int | None = None, share: float = 1.0
    ) -> None:
        """Iterate: each learner in turn makes its updates, every update on the next batch of its stream.

        A learner's networks are frozen while another one learns, so a generator's gradient can pass through its critic.
        ``steps`` defaults to what ``share`` of the budget allows for the learner that is metered as the student.

        Args:
            batches: of the learners that bring no stream of their own.

        Raises:
            Diverged: a loss left the finite numbers; names the step.
            SaveError: a checkpoint could not be written.
            OverBudget: a hard cap of the budget was passed.
        """
        if steps is None and self.budget.pace == "student_examples":
            metered = next((x for x in learners if x.counts == "student_examples"), None)
            if metered is None:
                raise UserError("a loop without a student needs steps=...")
            steps = metered.every * self.steps(_stream_of(metered, batches).batch_size * metered.updates, share)
        self._observer.began(learners)
        self._watch.began(learners, steps)
        for learner in learners:
            learner.prepare(self.training, self.device)
            for module in (learner.module, *learner.extra):
                self._processes.synchronise(module)
            self._trained.append(learner.module)
            self._averages += learner.averages
        self._processes.seed(derive_seed(f"loop {self._unit}", self.seeds["noise"]))
        self._bill.tick()
        self.meter.agree()  # outside of loops every process does the same
        state = self._resume(learners)
        step, pace = state["step"], Pace(self._bill, steps, state["begun"], share)
        irregular = any(not _stream_of(x, batches).regular for x in learners)
        operations = Operations(steps, math.lcm(*(x.every for x in learners)), irregular=irregular, counted=state["flops"])
        streams = self._streams(learners, batches, step)
        every = max(1, (steps or LONG) // TRACED)
        saved = time.perf_counter()
        shown = 0.0
        for learner in learners:
            for module in (learner.module, *learner.extra):
                module.train()
        while (done := pace.done(step)) < 1:
            self._stop_past_hard_caps()
            self._progress_made = done
            with operations.of(step):
                for learner in (x for x in learners if step % x.every == 0):
                    learner.take_turn(learners, rate(learner.training, step, pace.whole(step, done)))
                    # Asking a GPU at every step would make it wait; what the trace shows has been looked at.
                    watched = self.device.type == "cpu" or step % 16 == 0 or step % every == 0
                    for again in range(learner.updates):
                        repeated = _stream_of(learner, batches).indivisible
                        terms = self._update(learner, next(streams[learner]), step, again, watched, repeated)
                    if step % every == 0:
                        for name, value in terms.items():
                            self.trace.setdefault(f"{self._bill.phase}/{name}", []).append(float(f"{float(value):.5g}"))
            self.meter.add("training_flops", operations.spent(step))
            if self._processes.count > 1:
                self.meter.agree(self._processes.total)
            step += 1
            now = time.perf_counter()
            if now - shown > 0.1:
                self._observer.progress(self._bill.phase, step, steps)
                shown = now
            if now - saved >= self._every - self._loose and step != steps:
                self._save(learners, step, steps, {**state, "flops": operations.counted})
                saved = time.perf_counter()
        self._stop_past_hard_caps()
        for learner in learners:
            for p in learner.parameters:
                p.requires_grad_(True)
        self._observer.progress(self._bill.phase, step, step)
        unsaved = time.perf_counter() - saved
        if self._loose + unsaved >= self._every / 2:
            self._save(learners, step, step, {**state, "flops": operations.counted})
        else:
            self._loose += unsaved
        # Networks that are made between two loops are the same on every process, whatever rows it had.
        self._processes.seed(derive_seed(f"after loop {self._unit}", self.seeds["noise"]))
        self._unit += 1
        self._watch.ended(learners)
        self._observer.ended(learners)

    def cost(self) -> dict[str, Any]:
        """What was used: ``total`` and ``phases``, with the meters' names."""
        self._watch.settle()
        return self._bill.cost()

    def over_budget(self) -> str | None:
        """Which cap was passed, or None."""
        return self._bill.over()

    # --- the engine -------------------------------------------------------------------------------------------

    def _streams(self, learners: Sequence[Learner], batches: Batches[Examples] | None, step: int) -> dict[Learner, Iterator[list[Keyed]]]:
        """Each learner's iterator over the parts of its batches, as it is at ``step``; learners without their own stream share one."""

        def begin(stream: Batches[Examples], made: int, place: int) -> Iterator[list[Keyed]]:
            seed, loop = self.seeds["noise"], self._unit
            places = bounds(stream, self._micro, self._processes.count, self._processes.rank)
            return parts(stream, made, lambda position: Key(seed, loop, place, position), places, self.meter)

        sharing = [x for x in learners if x.batches is None]
        found = {x: begin(x.batches, x.made_before(step), 1 + i) for i, x in enumerate(learners) if x.batches is not None}
        if sharing:
            shared = begin(_stream_of(sharing[0], batches), sum(x.made_before(step) for x in sharing), 0)
            found |= dict.fromkeys(sharing, shared)
        return found

    def _update(self, learner: Learner, batch: list[Keyed], step: int, again: int, watched: bool, repeated: bool) -> dict[str, Tensor]:
        """One update of a learner, its ``again``-th of this step, on the parts that this process has of a batch."""
        terms, totals = self._updates.gradients(learner, batch, repeated=repeated)
        if watched and not math.isfinite(sum(float(v) for v in terms.values())):
            shown = ", ".join(f"{n}={float(v):.4g}" for n, v in terms.items())
            raise Diverged(step, self._bill.phase, shown)
        self._updates.step(learner, terms, batch[0][0], step=step, made=learner.made_before(step) + again, repeated=repeated)
        self._watch.updated(learner, totals["rows"] if self._processes.count == 1 else sum(len(rows) for _, rows in batch), repeated)
        self.meter.add(learner.counts or "auxiliary_examples", totals["rows"])
        if learner.counts == "student_examples":
            self.meter.add("student_steps", 1)
        return terms

    def _stop_past_hard_caps(self) -> None:
        """All processes stop together: their clocks differ."""
        if self.budget.hard:
            over = self._bill.over(hard=True)
            if self._processes.total([over is not None])[0]:
                raise OverBudget(over or "another process is past a hard cap")

    # --- checkpoints ------------------------------------------------------------------------------------------

    def _save(self, learners: Sequence[Learner], step: int, steps: int | None, state: dict[str, Any]) -> None:
        if self._checkpoints.folder is not None:
            written = self._observer.saves(step, steps)
            if written:
                learning = {"learners": [x.state() for x in learners], "apart": self._watch.state(learners)}
                self._write(self._bill.phase, {**state, "step": step, **learning})
            self._observer.saved(written)

    def _write(self, name: str, state: dict[str, Any]) -> None:
        """A checkpoint of ``state`` and of all that a run has besides."""
        self._bill.tick()
        whole = {
            **state,
            "meter": self.meter.counts,
            "started": self._bill.started,
            "phases": self.phases,
            "trace": self.trace,
            "method": self.state,
            "oracles": [o.state() for o in self._oracles],
            "rng": rng_state(),
            "generators": {role: g.get_state() for role, g in self._generators.items()},
        }
        self._checkpoints.write(f"{self._unit:02d}-{name}", whole)

    def _restored(self, name: str) -> dict[str, Any] | None:
        """The newest checkpoint of the work under way, or None; all that a run has besides is put back as it was."""
        state = self._checkpoints.newest(f"{self._unit:02d}-{name}")
        if state is not None:
            self.meter.restore(state["meter"])
            self._bill.started, self._bill.phases = state["started"], state["phases"]
            self.trace, self.state = state["trace"], state["method"]
            for oracle, asked in zip(self._oracles, state["oracles"], strict=True):
                oracle.restore(asked)
            set_rng_state(state["rng"])
            for role, saved in state["generators"].items():
                self.generator(role).set_state(saved)
        return state

    def _resume(self, learners: Sequence[Learner]) -> dict[str, Any]:
        """Continue from the newest whole checkpoint of this loop, if there is one: step, flops by step, and the pace it began at."""
        state = self._restored(self._bill.phase)
        if state is None:
            return {"step": 0, "flops": [], "begun": self.meter.counts[self.budget.pace]}
        for learner, saved in zip(learners, state["learners"], strict=True):
            learner.restore(saved)  # what does not fit raises: half a state restored is no fresh start
        self._watch.restored(state["apart"], learners)
        return {k: state[k] for k in ("step", "flops", "begun")}


def _stream_of(learner: Learner, batches: Batches[Examples] | None) -> Batches[Examples]:
    found = batches if learner.batches is None else learner.batches
    if found is None:
        raise UserError("a learner without batches of its own needs those of the loop: run.loop(learners, batches)")
    return found
