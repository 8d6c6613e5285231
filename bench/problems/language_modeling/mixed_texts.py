"""Batches of two kinds of text: what a method learns from, and data beside it for a language-modelling term of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from distillbench.problems.language_modeling.texts import TokenBatch


@dataclass(frozen=True, kw_only=True)
class MixedBatch(TokenBatch):
    """Rows of two kinds, every one of them an example of the budget. Made by :func:`beside`.

    Attributes:
        own: (B,) bool, true on the first kind.
        share: tokens that count in rows of the first kind, as a part of all in the *whole* batch; parts keep it.
    """

    own: Tensor
    share: float

    def _with(self, change: Callable[[Tensor], Tensor]) -> MixedBatch:
        batch = super()._with(change)
        assert isinstance(batch, MixedBatch)
        return replace(batch, own=change(self.own))

    @functools.cached_property
    def own_tokens(self) -> Tensor:
        """(N,) bool: which of the tokens that count are in rows of the first kind."""
        return self.own[self.predicted.rows // self.ids.shape[1]]

    def per_example_of(self, values: Tensor, own: bool) -> Tensor:
        """Values of the tokens of one kind -> (B,), such that their mean over the whole batch is the mean over those tokens.

        values: one for each token of that kind, in order.
        """
        chosen = self.own_tokens if own else ~self.own_tokens
        every = values.new_zeros(len(chosen)).masked_scatter(chosen, values)
        return self.per_example(every) / max(self.share if own else 1 - self.share, 1e-12)


def beside(own: TokenBatch, other: TokenBatch | None) -> MixedBatch:
    """The rows of ``own`` followed by those of ``other`` (fewer columns are padded; None adds no row)."""
    shared = {f.name: getattr(own, f.name) for f in fields(TokenBatch)}
    if other is None:
        return MixedBatch(**shared, own=torch.ones(len(own), dtype=torch.bool), share=1.0)
    begins = [int(b.response.any(0).long().argmax()) for b in (own, other)]  # responses begin at one place in every row
    widths = [b.ids.shape[1] - at for b, at in zip((own, other), begins, strict=True)]

    def both(name: str) -> Tensor:
        sides = [
            F.pad(getattr(b, name), (max(begins) - at, max(widths) - width))
            for b, at, width in zip((own, other), begins, widths, strict=True)
        ]
        return torch.cat(sides)

    response = both("response")
    total = int(response.sum())
    shared |= {"ids": both("ids"), "attention": both("attention"), "response": response}
    shared |= {"index": torch.cat([own.index, other.index]), "rows": torch.full((len(response),), -1), "text": ""}
    shared |= {"per_row": total / len(response)}
    return MixedBatch(**shared, own=torch.arange(len(response)) < len(own), share=int(own.response.sum()) / max(1, total))
