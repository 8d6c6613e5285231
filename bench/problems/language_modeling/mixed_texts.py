"""Batches of two kinds of text: what a method learns from, and data beside it for a language-modelling term of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from distillbench.problems.language_modeling.texts import TokenBatch


@dataclass(frozen=True, kw_only=True)
class MixedBatch(TokenBatch):
    """Rows of two kinds, every one of them an example of the budget. Made by :func:`beside`.

    Beside ``rows`` and ``tokens`` its units are ``own``, the tokens in rows of the first kind, and ``beside``, those in all others.

    Attributes:
        own: (B,) bool, true on the first kind.
    """

    own: Tensor

    def units(self) -> dict[str, int]:
        """``rows``, ``tokens``, ``own`` and ``beside``."""
        units, own = super().units(), int(self.response[self.own, 1:].sum())
        return {**units, "own": own, "beside": units["tokens"] - own}

    def _with(self, change: Callable[[Tensor], Tensor]) -> Self:
        return replace(super()._with(change), own=change(self.own))

    @functools.cached_property
    def own_tokens(self) -> Tensor:
        """(N,) bool: which of the tokens that count are in rows of the first kind."""
        return self.own[self.predicted.rows // self.ids.shape[1]]


def beside(own: TokenBatch, other: TokenBatch | None) -> MixedBatch:
    """The rows of ``own`` followed by those of ``other`` (fewer columns are padded; None adds no row)."""
    shared = {f.name: getattr(own, f.name) for f in fields(TokenBatch)}
    if other is None:
        return MixedBatch(**shared, own=torch.ones(len(own), dtype=torch.bool))
    begins = [int(b.response.any(0).long().argmax()) for b in (own, other)]  # responses begin at one position in every row
    widths = [b.ids.shape[1] - at for b, at in zip((own, other), begins, strict=True)]

    def both(name: str) -> Tensor:
        sides = [
            F.pad(getattr(b, name), (max(begins) - at, max(widths) - width))
            for b, at, width in zip((own, other), begins, widths, strict=True)
        ]
        return torch.cat(sides)

    response = both("response")
    shared |= {"ids": both("ids"), "attention": both("attention"), "response": response}
    shared |= {"index": torch.cat([own.index, other.index]), "rows": torch.full((len(response),), -1), "text": ""}
    return MixedBatch(**shared, own=torch.arange(len(response)) < len(own))
