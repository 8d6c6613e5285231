"""What is seen of a training while it goes on: who moves weights and how, what becomes of batches, terms and averages, what is kept."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distillbench.training import averages
from distillbench.training.data import epoch_order
from distillbench.training.learner import Learner
from distillbench.training.observer import Observer

EVERY = 10  # updates of a learner between two looks at the gradients of its terms
COUNTED = 40  # updates of a loop between two counts of what is kept in memory
KEPT = 4  # counts in a row that must rise before something grows

Weights = list[Tensor]
Way = NDArray[np.float32]


class Killed(BaseException):
    """Stands for kill -9: nothing after the checkpoint is written."""


class Seen(Observer):
    """Notes what loops do to weights, dies in time, and changes batches.

    Of the checkpoints before the one it dies after only the last of each loop is written: it is restored.

    Attributes:
        starts, ends: parameters of every trained network before its first and after its last loop.
        training: every module that the loop under way trains, submodules too; empty between loops.
        learners: all that loops had, in order.
    """

    def __init__(
        self,
        kill_at: int | None = None,
        change: Callable[[Any], Any] | None = None,
        look: Callable[[Learner, Mapping[str, Tensor]], None] | None = None,
    ) -> None:
        self.starts: dict[nn.Module, dict[str, Tensor]] = {}
        self.ends: dict[nn.Module, dict[str, Tensor]] = {}
        self.parts: Mapping[str, tuple[nn.Module | None, nn.Module | None]] = {}
        self.training: set[nn.Module] = set()
        self.learners: list[Learner] = []
        self._kill_at, self._change, self._look, self._count = kill_at, change, look, 0

    def began(self, learners: Sequence[Learner]) -> None:
        """See :class:`Observer`."""
        self.learners += learners
        self.training = {part for x in learners for m in (x.module, *x.extra) for part in m.modules()}
        for learner in learners:
            self.starts.setdefault(learner.module, named_weights(learner.module))

    def batch(self, learner: Learner, batch: Any) -> Any:
        """See :class:`Observer`."""
        return batch if self._change is None else self._change(batch)

    def losses(self, learner: Learner, terms: Mapping[str, Tensor]) -> None:
        """See :class:`Observer`."""
        if self._look is not None:
            self._look(learner, terms)

    def ended(self, learners: Sequence[Learner]) -> None:
        """See :class:`Observer`."""
        self.training = set()
        for learner in learners:
            self.ends[learner.module] = named_weights(learner.module)

    def saves(self, step: int, steps: int | None) -> bool:
        """See :class:`Observer`."""
        self._count += 1
        return self._kill_at is None or self._count == self._kill_at or step == steps

    def saved(self, written: bool) -> None:
        """See :class:`Observer`."""
        if self._count == self._kill_at:
            raise Killed

    def exported(self, parts: Mapping[str, tuple[nn.Module | None, nn.Module | None]]) -> None:
        """See :class:`Observer`."""
        self.parts = parts


@dataclasses.dataclass
class Felt:
    """What was seen of one term of a loss.

    Attributes:
        first: norm of its gradient at its learner's first update that was looked at, or None while it had no graph.
        largest: the largest of all.  followed: whether an ``after`` gets its value.
    """

    first: float | None = None
    largest: float = 0.0
    followed: bool = False


class Watch(Seen):
    """Looks at every update to the last one.

    Attributes:
        moved: who changed weights outside of an optimizer's step.
        altered: fields of batches that a loss changed in place.
        felt: (learner's place among all, term) -> what its gradient was.
        own: for the averages that learners keep, the same averages made here from the optimizer's weights, in float64.
        ways: trained network -> its weights at the start of its first loop and after every optimizer's step, one flat array
            each: no tensors, because tensors are counted.
        foreign: optimizers that made steps and are of no learner.
        strayed: averages that did not start from the weights they follow.
        kept: (tensors, their bytes, nodes of graphs) alive at counts in a loop.
        notes: where each update is told: functions of nothing.
    """

    def __init__(self, notes: Sequence[Callable[[], None]] = ()) -> None:
        super().__init__()
        self.moved: list[str] = []
        self.altered: list[str] = []
        self.felt: dict[tuple[int, str], Felt] = {}
        self.own: dict[nn.Module, Weights] = {}
        self.ways: dict[nn.Module, list[Way]] = {}
        self.foreign: list[str] = []
        self.strayed: list[nn.Module] = []
        self.kept: list[tuple[int, int, int]] = []
        self.grows: str | None = None
        self._notes = notes
        self._follow: dict[Learner, list[tuple[nn.Module, averages.Decay]]] = {}
        self._held: dict[nn.Module, Weights] = {}
        self._batch: list[tuple[str, Tensor, Tensor]] = []
        self._updates: dict[Learner, int] = {}
        self._first: Learner | None = None  # of the loop under way

    # --- the loop's events --------------------------------------------------------------------------------------

    def began(self, learners: Sequence[Learner]) -> None:
        """See :class:`Observer`."""
        super().began(learners)
        for module, held in self._held.items():
            # A phase may start from what is known: an average, or another network's weights.
            known = [weights(m) for m in (*self.own, *self._held) if m is not module]
            if module in self.training and any(same(weights(module), other) for other in known):
                held[:] = weights(module)
        self._settle("between two loops")
        self.kept, self._first = [], learners[0]
        gc.collect()
        gc.freeze()  # what is there already is looked through no more: only what the loop makes
        for learner in learners:
            self._held[learner.module] = weights(learner.module)
            self.ways.setdefault(learner.module, [flat(learner.module).numpy().copy()])
            self._follow[learner] = list(learner._followers)
            for follower, _ in learner._followers:
                if follower not in self.own:
                    self.own[follower] = [p.double() for p in weights(learner.module)]
                    if not same(weights(follower), weights(learner.module)):
                        self.strayed.append(follower)

    def batch(self, learner: Learner, batch: Any) -> Any:
        """See :class:`Observer`."""
        self._settle("between two updates")
        given = super().batch(learner, batch)
        self._batch = [(name, x, x.detach().clone()) for name, x in tensors(given)]
        return given

    def losses(self, learner: Learner, terms: Mapping[str, Tensor]) -> None:
        """See :class:`Observer`."""
        self._settle("while its loss is computed")
        self.altered += [name for name, x, before in self._batch if name not in self.altered and not torch.equal(x.detach(), before)]
        done = self._updates.get(learner, 0)
        look = done < 3 or done % EVERY == 0
        for name, term in terms.items():
            found = self.felt.setdefault((self.learners.index(learner), name), Felt(followed=learner.after is not None))
            if term.requires_grad and (look or found.first is None):
                size = _slope(term, learner.parameters)
                found.first = size if not found.first else found.first
                found.largest = max(found.largest, size)

    def stepping(self, learner: Learner) -> None:
        """See :class:`Observer`."""
        self._settle("before the optimizer's step")

    def stepped(self, learner: Learner, made: int) -> None:
        """See :class:`Observer`."""
        for module in self._held:
            if module in self.training:
                self._held[module] = weights(module)
        self.ways[learner.module].append(flat(learner.module).numpy().copy())
        for follower, decay in self._follow[learner]:
            rate = averages.at(decay, made)
            now = zip(self.own[follower], learner.module.parameters(), strict=True)
            self.own[follower] = [rate * a + (1 - rate) * w.detach().double() for a, w in now]

    def updated(self, learner: Learner, terms: Mapping[str, Tensor]) -> None:
        """See :class:`Observer`."""
        self._settle("after the optimizer's step")
        for note in self._notes:
            note()
        done = self._updates[learner] = self._updates.get(learner, 0) + 1
        if done % COUNTED == 0 and learner is self._first:
            self._take_stock()

    def ended(self, learners: Sequence[Learner]) -> None:
        """See :class:`Observer`."""
        gc.unfreeze()
        super().ended(learners)
        self._settle("at the end of a loop")

    def other(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """A hook for all optimizers' steps: the learners' own do not pass it."""
        if all(optimizer is not getattr(x, "optimizer", None) for x in self.learners):
            self.foreign.append(type(optimizer).__name__)

    # --- what it looks at -----------------------------------------------------------------------------------------

    def _settle(self, when: str) -> None:
        """Note every trained network whose weights are not those that the last optimizer's step left."""
        if not self.training and when != "at the end of a loop":
            return
        for module, held in self._held.items():
            if module in self.training and not same(list(module.parameters()), held):
                if when not in self.moved:
                    self.moved.append(when)
                self._held[module] = weights(module)

    def _take_stock(self) -> None:
        """Count the tensors that are alive, their bytes, and the nodes of the graphs that hang on them."""
        epoch_order.cache_clear()  # it keeps the orders of a few epochs, on purpose
        gc.collect()
        count, places, roots = 0, {}, []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for thing in gc.get_objects():
                if not issubclass(type(thing), Tensor):
                    continue
                count += 1
                if thing.layout is torch.strided and thing.device.type != "meta":
                    storage = thing.untyped_storage()
                    places[storage.data_ptr()] = storage.nbytes()
                if thing.grad_fn is not None:
                    roots.append(thing.grad_fn)
        self.kept.append((count, sum(places.values()), _nodes(roots)))
        last = self.kept[-KEPT:]
        if len(last) == KEPT and self.grows is None:
            for i, (what, least) in enumerate((("tensors", COUNTED // 5), ("bytes", 8 * COUNTED), ("nodes of graphs", COUNTED // 5))):
                more = [b[i] - a[i] for a, b in itertools.pairwise(last)]
                if min(more) >= least:
                    self.grows = f"{min(more) / COUNTED:.3g} {what} more at every update"
                    break


def _slope(term: Tensor, parameters: Sequence[nn.Parameter]) -> float:
    """The norm of the gradient of a term; what the gradient is afterwards is what it was."""
    before = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    torch.autograd.backward([term], retain_graph=True, inputs=list(parameters))  # not autograd.grad, which not every hook allows
    size = math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters if p.grad is not None))
    for p, grad in zip(parameters, before, strict=True):
        p.grad = grad
    return size


def _nodes(roots: list[Any], most: int = 20_000) -> int:
    seen: set[Any] = set()
    left = list(roots)
    while left and len(seen) < most:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [parent for parent, _ in node.next_functions]
    return len(seen)


def named_weights(module: nn.Module) -> dict[str, Tensor]:
    """Copies of its parameters, by name."""
    return {name: p.detach().cpu().clone() for name, p in module.named_parameters()}


def weights(module: nn.Module) -> Weights:
    """Copies of its parameters, in order."""
    return [p.detach().clone() for p in module.parameters()]


def flat(module: nn.Module) -> Tensor:
    """All its parameters in a row."""
    return torch.cat([p.detach().cpu().flatten() for p in module.parameters()])


def same(one: Weights, other: Weights) -> bool:
    """Whether two networks' weights are the same bit for bit."""
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def tensors(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor in a batch, a data set or what holds them: dataclasses, mappings and lists, a few levels deep."""
    if isinstance(value, Tensor):
        yield name, value
    elif depth > 6 or isinstance(value, nn.Module | type):
        return
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name, None), f"{name}.{field.name}".lstrip("."), depth + 1)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from tensors(inner, f"{name}[{key}]", depth + 1)
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from tensors(inner, f"{name}[{i}]", depth + 1)
