"""How far a loop is, and what its steps cost."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

from torch.utils.flop_counter import FlopCounterMode

from distillbench.errors import UserError
from distillbench.training.meter import Bill

IRREGULAR = 16  # steps of a loop whose operations are counted, where no two steps are alike
NOTHING = contextlib.nullcontext()
LONG = 1000  # steps that a loop is taken to have where nobody knows how many it will


class Pace:
    """The progress of a loop: by its steps, or by what the budget's pace counts.

    Args:
        steps: how many there are, or None where the pace decides.
        begun: the pace's count when the loop began.  share: the part of the pace's cap that the loop may use.

    Raises:
        UserError: nothing is left of the pace.
    """

    def __init__(self, bill: Bill, steps: int | None, begun: float, share: float) -> None:
        self.steps = steps
        self._bill, self._name, self._begun = bill, bill.budget.pace, begun
        self._cap = float(getattr(bill.budget, self._name))
        self._allowed = min(self._cap - begun, share * self._cap)
        if steps is None and self._allowed <= 0:
            raise UserError(f"the budget of {self._cap:g} {self._name} is used up before phase {bill.phase!r}")

    def done(self, step: int) -> float:
        """The part of the loop that is done before ``step``; 1 or more when it is over.

        Raises:
            UserError: after many steps the pace has not moved.
        """
        if self.steps is not None:
            return step / self.steps
        used = self._bill.meter.counts[self._name]
        self._bill.excess = max(0.0, used - self._cap)  # the step that uses up the pace may go past its cap
        if step >= LONG and used == self._begun:
            raise UserError(f"after {step} steps of phase {self._bill.phase!r} nothing is counted as {self._name}, the budget's pace")
        return (used - self._begun) / self._allowed

    def whole(self, step: int, done: float) -> float:
        """How many steps the loop has in all, as far as can be told at ``step``."""
        if self.steps is not None:
            return self.steps
        return step / done if done else math.inf


class Operations:
    """Floating-point operations, counted at some steps, each of which stands for those up to the next one of its place in a period.

    Args:
        period: steps after which all learners have acted as often as each does.
        irregular: no two steps cost the same, so more of them are counted.
        counted: what was counted last at each place in the period, from a checkpoint.
    """

    def __init__(self, steps: int | None, period: int, *, irregular: bool, counted: list[float] | None = None) -> None:
        self._steps, self._period = steps, period
        cycles = -(-(steps or LONG) // period)
        stride = max(2, cycles // IRREGULAR)
        self._cycles = range(1, 10**9, stride) if steps is None or irregular else (1, cycles // 2)
        self.counted = counted or [0.0] * period

    def of(self, step: int) -> contextlib.AbstractContextManager[object]:
        """Counts the operations of what is done inside, where it is the turn of ``step``."""
        if step // self._period not in self._cycles and not self._alone(step):
            return NOTHING
        return self._counting(step)

    @contextlib.contextmanager
    def _counting(self, step: int) -> Iterator[None]:
        counter = FlopCounterMode(display=False)
        with counter:
            yield
        self.counted[step % self._period] = float(counter.get_total_flops())

    def spent(self, step: int) -> float:
        """What to bill after ``step``. The first period may fill tables once, so the second stands for it as well."""
        if step < self._period and not self._alone(step):
            return 0.0
        return self.counted[step % self._period] * (2 if self._period <= step < 2 * self._period else 1)

    def _alone(self, step: int) -> bool:
        """Whether a step is of the first period and has none of its place behind it."""
        return self._steps is not None and step < self._period and step + self._period >= self._steps
