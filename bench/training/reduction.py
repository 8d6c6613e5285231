"""From the terms of a part of a batch to what the whole batch's loss is made of: the one owner of the denominator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distillbench.errors import UserError
from distillbench.training.data import Examples


@dataclass(frozen=True)
class Coupled:
    """A term that couples the rows of the whole batch; made by :func:`coupled`."""

    function: Callable[..., Tensor]
    outputs: tuple[Tensor, ...]


# A value for each row, a value for each of a named unit, or a function of the whole batch.
Term = Tensor | tuple[Tensor, str] | Coupled


def coupled(function: Callable[..., Tensor], *outputs: Tensor) -> Coupled:
    """A term that is no sum over rows: a correlation within the batch, a contrast between its rows, a mean that divides.

    Args:
        function: gets ``outputs`` of the *whole* batch, whatever it was split into, and gives a 0-dimensional tensor. It has no side
            effects: it is called once per part. The gradient flows through each part's own outputs, and adds up to that of the whole.
        outputs: of this part, with a leading dimension of rows (or tokens, ...), with or without a graph.
    """
    return Coupled(function, outputs)


class NeedsOutputs(Exception):
    """A coupled term was met while the outputs of the other parts are not known yet."""


class Reduction:
    """The reduction of one update.

    Args:
        parts: micro-batches of this process.  ranks: processes.
        gather: the rows of all processes, one after the other, from one's own; and where one's own begin.
    """

    def __init__(self, parts: int = 1, ranks: int = 1, gather: Callable[[Tensor], tuple[Tensor, int]] | None = None) -> None:
        self.parts, self.ranks = parts, ranks
        self.part = 0
        self._gather = gather
        self._outputs: list[dict[str, tuple[Tensor, ...]]] | None = None
        self._collecting = False

    def collect(self) -> None:
        """The parts' next pass is for their outputs alone."""
        self._outputs, self._collecting = [{} for _ in range(self.parts)], True

    def learn(self) -> None:
        """The outputs are there; the next pass is for gradients."""
        self._collecting = False

    def __call__(self, batch: Examples, terms: Mapping[str, Term]) -> dict[str, Tensor]:
        """Terms that sum over parts and processes to those of the whole batch, 0-dimensional.

        Raises:
            UserError: a term is not one value per unit, or its unit is not one of the batch's.
        """
        units = batch.units()
        return {
            name: self._coupled(name, term) if isinstance(term, Coupled) else _summed(batch, units, name, term)
            for name, term in terms.items()
        }

    def _coupled(self, name: str, term: Coupled) -> Tensor:
        outputs = term.outputs
        if self.parts > 1:
            if self._outputs is None:
                raise NeedsOutputs
            if self._collecting:
                self._outputs[self.part][name] = tuple(x.detach() for x in outputs)
                return torch.zeros(())
            if not all(name in seen for seen in self._outputs):
                raise UserError(f"the coupled loss term {name!r} is missing in a part of the batch; give it for all batches alike")
            others = [seen[name] for seen in self._outputs]
            outputs = tuple(torch.cat([*(o[i] for o in others[: self.part]), x, *(o[i] for o in others[self.part + 1 :])])
                            for i, x in enumerate(outputs))  # fmt: skip
        if self._gather is not None:
            outputs = tuple(_among(x, *self._gather(x.detach())) for x in outputs)
        value = term.function(*outputs)
        if value.dim():
            raise UserError(f"the coupled loss term {name!r} has shape {tuple(value.shape)}; its function gives one number")
        count = self.parts * self.ranks
        # Every part computes the whole value; its gradient is complete once all have passed theirs, and the value counts once.
        return value if count == 1 else value - value.detach() * (1 - 1 / count)


def _among(mine: Tensor, everyone: Tensor, begin: int) -> Tensor:
    return torch.cat([everyone[:begin], mine, everyone[begin + len(mine) :]])


def _summed(batch: Examples, units: Mapping[str, int], name: str, term: Tensor | tuple[Tensor, str]) -> Tensor:
    value, unit = term if isinstance(term, tuple) else (term, "rows")
    if unit not in units:
        raise UserError(f"loss term {name!r} is counted in {unit!r}, which this batch has none of; it has {', '.join(units)}")
    if value.shape != (units[unit],):
        hint = (
            "a term that couples the batch is coupled(function, *outputs)"
            if value.dim() == 0
            else "another unit is named: (values, 'tokens')"
        )
        raise UserError(f"loss term {name!r} has shape {tuple(value.shape)}; give one value for each of the {units[unit]} {unit}; {hint}")
    total = batch.total(unit)
    if total == len(value) != 0:
        return value.mean()  # the same number, in one kernel instead of two
    return value.sum() / max(1, total)
