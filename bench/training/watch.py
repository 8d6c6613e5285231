"""The bill follows the modules: rows that pass through networks are counted where they pass, and what becomes of weights is looked at.

*Rows.* Every network that the problem built (and every copy of it), and what the oracles ask, counts what passes through it. A pass with
gradients into the network's own weights counts its rows:

- In an update of a loop, of a network that the loop's learner trains: the loop has counted the batch's rows already. A method whose
  card says ``passes=p`` sends every row through its network p times, so what is more than p times the batch is billed, divided by p, to
  the same meter. An honest method's bill is what the loop counts, to the row.
- Of any other network, and anywhere else (in ``after``, in a loop of the method's own, between loops): every row is billed, of the
  student as ``student_examples``, of other networks as ``auxiliary_examples``.
- Through the teacher and its copies every row counts, with a gradient or without one, as ``teacher_examples``, less what its oracle has
  billed itself.

*Weights.* Where a tensor comes from is known by its bytes: the problem made it, a teacher has it, an optimizer of a loop left it, or it
is an average that a learner kept. A loop begins, and a student leaves, with such tensors alone; nothing else is a training that was
paid for. Rows that went into an auxiliary network follow its tensors: where these end up in the student they are the student's. Within a
loop, at steps that nobody can foresee, weights are compared before an optimizer's step with what the step before left.

What cannot be seen from inside a process (a forward that is called by its class, a network that the method writes anew from the
student's tensors, a meter that is set back) is why a record says how far it can be trusted.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from distillbench.cards.card import Card
from distillbench.errors import UserError
from distillbench.training.flops import flops_per_row
from distillbench.training.learner import Learner
from distillbench.training.meter import Meter
from distillbench.training.nets import Architecture
from distillbench.training.oracle import ModuleOracle, Oracle
from distillbench.training.pace import LONG
from distillbench.training.problem import Problem
from distillbench.training.student import Student

Role = Literal["student", "auxiliary", "teacher"]
BILLED = {"student": "student_examples", "auxiliary": "auxiliary_examples", "teacher": "teacher_examples"}
FRESH = 2**16  # tensors: methods may build a network for every step
LOOKS = 16  # steps of a loop after which weights are looked at, about

P = TypeVar("P", bound=Problem)


class Ledger:
    """What passes through one network, in whose stead it stands as its ``forward``: that costs less than a hook, and misses nobody who
    calls it by name. A copy of the network has a ledger of its own.

    Attributes:
        rows, calls: with gradients (of a teacher: all) and not settled yet.  asked: what a teacher was last called with.
        apart: rows that it was trained on and that no student was billed for.
        usual: it is the one network of the one learner of the loop under way, of which the watch need not be told.
    """

    def __init__(self, touched: set[Ledger], module: nn.Module, role: Role) -> None:
        self.module, self.role = module, role
        self._weights: list[nn.Parameter] = []
        self.rows = self.calls = self.apart = 0
        self.usual = False
        self.asked: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._touched = touched
        self._forward: Callable[..., Any] = type(module).forward.__get__(module)
        functools.update_wrapper(self, self._forward, updated=())  # libraries ask a forward for its signature
        module.__dict__["forward"] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> Ledger:
        copied = memo.get(id(self.module), self.module)
        return self if copied is self.module else Ledger(self._touched, copied, "auxiliary" if self.role == "student" else self.role)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those of the network, which a copy in the making has not yet."""
        if not self._weights:
            self._weights = list(self.module.parameters())
        return self._weights

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The network's forward."""
        if self.role == "teacher":
            answer = self._forward(*inputs, **named)  # what it cannot answer costs nothing
            self.asked = (inputs, named)
            self._count(inputs, named)
            return answer
        if torch.is_grad_enabled():
            for p in self._weights or self.parameters:
                if p.requires_grad:
                    self._count(inputs, named)
                    break
        return self._forward(*inputs, **named)

    def _count(self, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        try:
            self.rows += inputs[0].shape[0]
        except (IndexError, AttributeError):
            self.rows += _rows(inputs, named)
        self.calls += 1
        if not self.usual:
            self._touched.add(self)

    def settled(self) -> None:
        """Nothing is left to bill."""
        self.rows = self.calls = 0
        self.asked = None


class _Builds:
    """``problem.build`` of a problem that is watched."""

    def __init__(self, build: Any, watch: Watch) -> None:
        self._build, self._watch = build, watch

    def __call__(self, architecture: Architecture, /, **options: int) -> nn.Module:
        network: nn.Module = self._build(architecture, **options)
        self._watch.add(network, "auxiliary")
        return network


class Watch:
    """Watches the networks of one run; does nothing before :meth:`begin`.

    Args:
        shared: whether the run has several processes.

    Attributes:
        next: the iteration of the loop under way from which on weights are looked at after a step.
        left: weights and the sums of their bits as a step left them, until the next one; None where that step was not looked at.
    """

    def __init__(self, meter: Meter, *, shared: bool) -> None:
        self._meter, self._shared = meter, shared
        self._on, self._passes, self._closed_form = False, 1, False
        self._touched: set[Ledger] = set()
        self._own: dict[Learner, list[Ledger]] = {}  # of the loop under way: the watched networks that each trains
        self._usual: Ledger | None = None  # the only one of a loop that trains one student
        self._spent: dict[tuple[int, ...], int] = {}  # form of a network -> the most rows of one such that no student was billed for
        self._known: dict[str, int] = {}  # digest of a tensor -> rows that no student was billed for and that went into it
        self._fresh: dict[str, None] = {}  # digests of tensors that the problem made, the newest of them
        self._buffers: set[str] = set()
        self._teachers: list[tuple[nn.Module, list[str]]] = []
        self._forwards = 0.0
        self.next = math.inf
        self.left: list[tuple[Tensor, int]] | None = None
        self._gap = 1
        self._last: int | None = None
        # Processes stop together or not at all, so they look at the same steps.
        self._chance = torch.Generator().manual_seed(0 if shared else secrets.randbits(62))

    # --- who is watched -----------------------------------------------------------------------------------------------

    def begin(self, problem: P, oracles: Iterable[Oracle], card: Card) -> P:
        """Watch a problem's networks and teachers; what the method gets in place of the problem."""
        self._on, self._passes, self._closed_form = True, card.passes, "export" in card.exempt
        for student in problem.students.values():
            self.add(student, "student")
        for oracle in oracles:
            oracle.watch = self
            if isinstance(oracle, ModuleOracle):
                self.add(oracle._module, "teacher")
                self._teachers.append((oracle._module, [digest(p) for p in oracle._module.parameters()]))
        watched = copy.copy(problem)
        object.__setattr__(watched, "build", _Builds(problem.build, self))
        return watched

    def add(self, network: nn.Module, role: Role) -> None:
        """Watch one more network, whose weights are as somebody honest made them."""
        Ledger(self._touched, _body(network), role)  # instead of that of a network it is a copy of, or of a run before
        self._buffers |= {name for name, _ in network.named_buffers()}
        self._fresh |= dict.fromkeys(map(digest, network.parameters()))
        while len(self._fresh) > FRESH:
            del self._fresh[next(iter(self._fresh))]

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What passes through teachers inside is billed by their oracles."""
        before = {ledger: (ledger.rows, ledger.calls, ledger.asked) for ledger in self._touched}
        yield
        for ledger in self._touched:
            if ledger.role == "teacher":
                ledger.rows, ledger.calls, ledger.asked = before.get(ledger, (0, 0, None))

    # --- rows ---------------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Bill what passed outside of updates since the last settling."""
        if self._touched:
            self._bill((), 0, None, whole=False)

    def forget(self) -> None:
        """What passed since the last settling is made once more."""
        for ledger in self._touched:
            ledger.settled()
        self._touched.clear()

    def updated(self, learner: Learner, rows: int, whole: bool) -> None:
        """Bill what passed in an update beyond what the loop counts: ``rows`` of this process. ``whole``: a batch is one thing, so that
        passes are counted and not their rows."""
        if not self._on:
            return
        only = self._usual
        if only is not None:
            if only.calls <= self._passes and only.rows <= rows * self._passes and not self._touched:  # nearly every update there is
                only.rows = only.calls = 0
                return
            self._touched.add(only)
        own = self._own[learner]
        if self._touched:
            self._bill(own, rows, learner.counts or BILLED["auxiliary"], whole=whole)
        if learner.counts != "student_examples":
            for ledger in own:
                self._aside(ledger, rows)

    def _bill(self, own: Sequence[Ledger], rows: int, meter: str | None, *, whole: bool) -> None:
        of_teachers = 0
        asked: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []
        for ledger in self._touched:
            if ledger in own:
                seen = ledger.calls * rows if whole else ledger.rows
                self._more(ledger, meter or "", -(-seen // self._passes) - rows)
            elif ledger.role == "teacher":
                of_teachers += ledger.rows
                if ledger.asked is not None:
                    asked.append((ledger.module, *ledger.asked))
            else:
                self._more(ledger, BILLED[ledger.role], ledger.rows)
            ledger.settled()
        self._touched.clear()
        forwards = self._meter.counts["teacher_forwards"]
        unasked = of_teachers - max(0, int(forwards - self._forwards))
        self._forwards = forwards
        if unasked > 0:
            self._meter.add("teacher_examples", unasked)
            self._meter.add("teacher_forwards", unasked)
            self._forwards += unasked
            with self.paused():
                self._meter.add("teacher_flops", unasked * max(flops_per_row(module, given, named) for module, given, named in asked))

    def _more(self, ledger: Ledger, meter: str, rows: int) -> None:
        if rows > 0:
            (self._meter.add_own if self._shared else self._meter.add)(meter, rows)
            if meter != "student_examples":
                self._aside(ledger, rows)

    def _aside(self, ledger: Ledger, rows: int) -> None:
        ledger.apart += rows
        form = _form(ledger.parameters)
        self._spent[form] = max(ledger.apart, self._spent.get(form, 0))

    # --- weights ------------------------------------------------------------------------------------------------------

    def began(self, learners: Sequence[Learner], steps: int | None) -> None:
        """A loop is about to make its first step, or goes on.

        Raises:
            UserError: a network begins with weights of which nobody knows where they come from.
        """
        if not self._on:
            return
        self.settle()
        parts = {learner: [m for part in (learner.module, *learner.extra) for m in part.modules()] for learner in learners}
        self._own = {learner: [found for m in modules if (found := _ledger(m)) is not None] for learner, modules in parts.items()}
        self._gap, self._last, self.next = max(1, (steps or LONG) // LOOKS), steps, 0.0
        for learner, ledgers in self._own.items():
            for ledger in ledgers:
                if ledger.role != "teacher":
                    ledger.role = "student" if learner.counts == "student_examples" else ledger.role
                ledger.apart = max(ledger.apart, self._origin(dict(ledger.module.named_parameters()), "a loop begins with"))
        if len(learners) == 1 and learners[0].counts == "student_examples" and len(self._own[learners[0]]) == 1:
            [self._usual] = self._own[learners[0]]
            self._usual.usual = True
        self._keep()

    def restored(self, apart: Sequence[Sequence[int]], learners: Sequence[Learner]) -> None:
        """Go on from :meth:`state`: the weights are those of a checkpoint."""
        self._forwards = self._meter.counts["teacher_forwards"]
        if self._on:
            for learner, known in zip(learners, apart, strict=True):
                for ledger, rows in zip(self._own[learner], known, strict=True):
                    ledger.apart = rows
            self._keep()

    def state(self, learners: Sequence[Learner]) -> list[list[int]]:
        """What a checkpoint of a loop needs."""
        return [[ledger.apart for ledger in self._own.get(x, ())] for x in learners]

    def before_step(self) -> None:
        """An optimizer is about to change weights.

        Raises:
            UserError: something else has changed them since the step that was looked at.
        """
        for tensor, kept in self.left or ():
            if _sum(tensor) != kept:
                raise UserError(
                    "weights of a network that a loop trains were changed between two steps of its optimizer; a loss gives gradients and "
                    "changes nothing, and an average is kept by Learner(ema=...)"
                )
        self.left = None

    def stepped(self, step: int) -> None:
        """An optimizer has changed weights, in iteration ``step`` of a loop, and it is time to look at them."""
        self.next = step + int(torch.randint(1, 2 * self._gap, (), generator=self._chance))
        if self._last is not None and step < self._last - 1:
            self.next = min(self.next, self._last - 1)
        self._keep()

    def _keep(self) -> None:
        """Sums of bits, for want of a second copy of a large network: only who aims at it changes weights and not their sum."""
        parameters = {id(p): p for ledgers in self._own.values() for ledger in ledgers for p in ledger.module.parameters()}
        self.left = [(p, _sum(p)) for p in parameters.values()]

    def ended(self, learners: Sequence[Learner]) -> None:
        """A loop is over: what its optimizers left, and the averages, is known from here on.

        Raises:
            UserError: as :meth:`before_step`, or a network is no longer watched.
        """
        if not self._on:
            return
        self.before_step()
        if self._usual is not None:
            self._usual.usual, self._usual = False, None
        self.next = math.inf
        if any(_ledger(ledger.module) is not ledger for ledgers in self._own.values() for ledger in ledgers):
            raise UserError("a network's forward, which counts what passes, was put aside; leave a network's functions alone")
        for learner in learners:
            apart = [ledger.apart for ledger in self._own[learner]]
            for ledger in self._own[learner]:
                self._know(ledger.module, ledger.apart)
            for average, _ in learner.averages:
                self._know(average, max(apart, default=0))
        self._own = {}

    def returned(self, student: Student) -> None:
        """The method has given its student: bill what was spent on networks that ended up in it.

        A part that is an average of the method's own, or was converted, has weights of its own; it is billed for all that was spent on
        auxiliary networks of its form.

        Raises:
            UserError: a part has weights of which nobody knows where they come from, or a teacher's network was changed.
        """
        if not self._on:
            return
        self.settle()
        apart = 0
        for name, part in student.parts.items():
            if part.architecture is None or part.base is not None:
                continue
            weights = {key: t for key, t in part.weights.items() if key not in self._buffers}
            if part.kind in ("averaged", "converted") and any(self._apart(t) is None for t in weights.values()):
                apart = max(apart, self._spent.get(_form(weights.values()), 0))
            else:
                apart = max(apart, self._origin(weights, f"the student's part {name!r} has"))
        self._meter.add("student_examples", apart)
        for network, before in self._teachers:
            if [digest(p) for p in network.parameters()] != before:
                raise UserError("the teacher's own network was changed; what trains a teacher trains problem.teacher.trainable_copy()")

    def _know(self, network: nn.Module, apart: int) -> None:
        for p in network.parameters():
            before = self._apart(p)
            self._known[digest(p)] = apart if before is None else min(apart, before)

    def _apart(self, tensor: Tensor) -> int | None:
        """Rows that no student was billed for and that went into a tensor; None where nobody knows where it comes from."""
        key = digest(tensor)
        return 0 if key in self._fresh else self._known.get(key)

    def _origin(self, weights: Mapping[str, Tensor], who: str) -> int:
        """Rows that no student was billed for and that went into ``weights``."""
        found = 0
        for name, tensor in weights.items():
            rows = self._apart(tensor)
            if rows is None and not self._closed_form:
                raise UserError(
                    f"{who} weights that no optimizer of a loop left (first {name}); train through run.fit or run.loop, take networks "
                    "from problem.new_student or problem.build, and export what was changed afterwards as "
                    "run.export(copy, converted=..., of=network)"
                )
            found = max(found, rows or 0)
        return found


def _body(network: nn.Module) -> nn.Module:
    """The innermost module with all of a network's parameters: through it goes every pass, also of who calls it inside a wrapper."""
    count = len(list(network.parameters()))
    for child in network.children():
        if count and len(list(child.parameters())) == count:
            return _body(child)
    return network


def _ledger(module: nn.Module) -> Ledger | None:
    found = module.__dict__.get("forward")
    return found if isinstance(found, Ledger) else None


def _form(weights: Iterable[Tensor]) -> tuple[int, ...]:
    return tuple(sorted(t.numel() for t in weights))


def _rows(inputs: tuple[Any, ...], named: Mapping[str, Any]) -> int:
    if inputs and isinstance(inputs[0], Tensor) and inputs[0].dim():
        return inputs[0].shape[0]
    for value in (*inputs, *named.values()):
        if isinstance(value, Tensor):
            return len(value) if value.dim() else 1
    return 1


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's type, shape and bytes."""
    plain = tensor.detach().cpu().contiguous()
    found = hashlib.sha256(f"{plain.dtype}{tuple(plain.shape)}".encode())
    found.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _sum(tensor: Tensor) -> int:
    """The sum of a tensor's bits, read as whole numbers."""
    plain = tensor.detach().contiguous()
    return int(plain.view(BITS.get(plain.element_size(), torch.uint8)).sum(dtype=torch.int64))
