"""Two tokenizations of one text: which tokens of one stand for the same bytes as which tokens of the other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from distillbench.errors import UserError
from distillbench.problems.language_modeling.texts import TokenBatch


def chunks(one: Sequence[bytes], other: Sequence[bytes], *, space: bool = False) -> tuple[list[int], list[int]]:
    """The chunk that every token is in, for both spellings of one text: chunks are the shortest stretches with equal bytes.

    A token that spells nothing (an end of sequence) must stand at the same position in both; the two are a chunk of their own.

    Args:
        one, other: the bytes of each token.
        space: chunks end only before white space, before and after tokens that spell nothing, and at the end.

    Raises:
        UserError: the texts differ, or a token that spells nothing stands alone.
    """
    if b"".join(one) != b"".join(other):
        raise UserError(
            f"only two tokenizations of the same text can be aligned; these begin {b''.join(one)[:40]!r}, {b''.join(other)[:40]!r}"
        )
    found: tuple[list[int], list[int]] = ([], [])
    i = j = chunk = 0
    while i < len(one) or j < len(other):
        if (i < len(one) and not one[i]) or (j < len(other) and not other[j]):
            if not (i < len(one) and j < len(other) and one[i] == other[j]):
                raise UserError("a token that spells nothing stands in one tokenization only; leave it out, or give it a spelling")
            i, j, ends = i + 1, j + 1, True
        else:
            left, right, i, j = len(one[i]), len(other[j]), i + 1, j + 1
            while left != right:
                if left < right:
                    left, i = left + _spelled(one, i), i + 1
                else:
                    right, j = right + _spelled(other, j), j + 1
            nexts = [s[k] for s, k in ((one, i), (other, j)) if k < len(s)]
            ends = not space or any(not s or s[:1].isspace() for s in nexts)
        found[0].extend([chunk] * (i - len(found[0])))
        found[1].extend([chunk] * (j - len(found[1])))
        chunk += ends
    return found


def _spelled(tokens: Sequence[bytes], position: int) -> int:
    if not tokens[position]:
        raise UserError("a token that spells nothing stands inside a token of the other tokenization; leave it out, or give it a spelling")
    return len(tokens[position])


@dataclass(frozen=True, kw_only=True)
class AlignedBatch(TokenBatch):
    """A batch in the student's tokens with the same texts in the teacher's, and the ``chunks`` of their responses, a unit of its own.

    Attributes:
        teacher: the same rows in the teacher's tokens.
        student_chunks: (B, R) int64, the chunk of each response token of a row, counted from 0; -1 behind the last token.
        teacher_chunks: (B, R') int64, the same for the teacher's tokens.
    """

    teacher: TokenBatch
    student_chunks: Tensor
    teacher_chunks: Tensor

    def _with(self, change: Callable[[Tensor], Tensor]) -> Self:
        return replace(
            super()._with(change),
            teacher=self.teacher._with(change),
            student_chunks=change(self.student_chunks),
            teacher_chunks=change(self.teacher_chunks),
        )

    def units(self) -> dict[str, int]:
        """``rows``, ``tokens`` and ``chunks``."""
        return {**super().units(), "chunks": int(self.counts.sum())}

    @functools.cached_property
    def counts(self) -> Tensor:
        """(B,) int64: the chunks of each row."""
        return self.student_chunks.amax(1) + 1

    def of_student(self, values: Tensor) -> Tensor:
        """Values (N,) of the student's tokens that count -> (C,): their sums over each chunk, rows one after the other."""
        return self._sums(values, self.student_chunks)

    def of_teacher(self, values: Tensor) -> Tensor:
        """Values of the teacher's tokens that count -> (C,), as :meth:`of_student`."""
        return self._sums(values, self.teacher_chunks)

    def _sums(self, values: Tensor, positions: Tensor) -> Tensor:
        first = self.counts.cumsum(0) - self.counts
        chunk = (positions + first[:, None])[positions >= 0]
        if values.shape != chunk.shape:
            raise UserError(f"token values have shape {tuple(values.shape)}; give one per response token: ({len(chunk)},)")
        return values.new_zeros(int(self.counts.sum())).index_add(0, chunk, values)


def align(
    student: TokenBatch,
    teacher: TokenBatch,
    spell_student: Callable[[list[int]], list[bytes]],
    spell_teacher: Callable[[list[int]], list[bytes]],
    *,
    space: bool = False,
) -> AlignedBatch:
    """The chunks of the responses of two batches that hold the same texts, row by row.

    Raises:
        UserError: as :func:`chunks`.
    """
    pairs = [chunks(spell_student(s), spell_teacher(t), space=space) for s, t in zip(responses(student), responses(teacher), strict=True)]
    mine, theirs = ([p[side] for p in pairs] for side in (0, 1))
    fields = {name: getattr(student, name) for name in TokenBatch.__dataclass_fields__}
    return AlignedBatch(
        **fields,
        teacher=teacher,
        student_chunks=_padded(mine),
        teacher_chunks=_padded(theirs),
    )


def responses(batch: TokenBatch) -> list[list[int]]:
    """The response tokens of every row, without padding."""
    return [ids[real].tolist() for ids, real in zip(batch.ids, batch.response, strict=True)]


def _padded(rows: list[list[int]]) -> Tensor:
    width = max(1, *map(len, rows))
    return torch.tensor([r + [-1] * (width - len(r)) for r in rows])
