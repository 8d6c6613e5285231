"""What objectives of language modelling take; a row is a token, or a chunk of text.

Objectives read hidden states and output projections, so that no logits are kept; here a projection is one tensor (V, D + 1), whose
last column is the bias. The vocabulary is padded in two ways: by entries of probability 0, which count, and by rows with anything in
them, beyond ``vocab``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distillbench.training.examples import PADDING, Draw, Input, Values, columns, far, labels, like, widened

WIDTH = 3  # of a state
TOP = 3  # entries of a teacher's answer that are kept
FAR = 1e4


@dataclass(frozen=True)
class Head:
    """All that objectives read of a language model: its output projection, weight (V, D) and bias (V,)."""

    head: tuple[Tensor, Tensor]


def _head(x: Tensor) -> Head:
    return Head((x[:, :-1], x[:, -1]))


def _projection(d: Draw) -> Tensor:
    return d.normal(d.classes, WIDTH + 1)


def _states(d: Draw) -> Tensor:
    return d.normal(d.rows, WIDTH)


def _excluded(x: Tensor) -> Tensor:
    rows = torch.zeros_like(x[:PADDING])
    rows[:, -1] = -FAR
    return torch.cat([x, rows])


def _garbage(dim: int) -> Callable[[Tensor], Tensor]:
    """Of a size that would be seen."""
    return lambda x: torch.cat([x, 7 * torch.ones_like(x.narrow(dim, 0, PADDING))], dim)


def _logits(values: Values) -> Tensor | None:
    if "model" not in values or "states" not in values:
        return None
    return values["states"] @ values["model"][:, :-1].T + values["model"][:, -1]


def _below_zero(d: Draw) -> Tensor:
    return -d.uniform(d.rows, low=0.05, high=4.0)


def _some_probabilities(d: Draw) -> Tensor:
    return d.normal(d.rows, TOP + 1).softmax(1)[:, :TOP].sort(1, descending=True).values


def _all_on(entry: int) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.zeros_like(x).index_fill_(1, torch.tensor(entry), 1.0)


def _rows(x: Tensor, order: Tensor) -> Tensor:
    return x[order]


EXAMPLES: Mapping[str, Input] = {
    # the student: its projection (V, D + 1), its states (N, D)
    **{name: Input(_projection, rows=False, pads=(_excluded, _garbage(0)), renamed=_rows, given_as=_head) for name in ("model", "draft")},
    "states": Input(_states, extremes=(far(FAR), far(FAR)), of="student"),
    # the teacher: as logits (N, V) that are asked for by slices of tokens, or as its projection and states like the student's
    "teacher": Input(
        lambda d: 2 * d.normal(d.rows, d.classes),
        "frozen",
        match=_logits,
        pads=(widened(-FAR), _garbage(1)),
        renamed=columns,
        extremes=(far(FAR), far(FAR, -1)),
        given_as=lambda x: lambda rows: x[rows],
        of="teacher",
    ),
    "target": Input(
        _projection, "frozen", rows=False, match=like("model", "draft"), pads=(_excluded, _garbage(0)), renamed=_rows, given_as=_head
    ),
    "theirs": Input(_states, "frozen", match=like("states"), extremes=(far(FAR), far(FAR, -1)), of="teacher"),
    # the entries that are no padding; the tokens (N,) int64; a position on a schedule
    "vocab": Input(lambda d: torch.tensor(d.classes), "given", rows=False, pads=(lambda x: x + PADDING, lambda x: x), given_as=int),
    "labels": Input(lambda d: d.integers(d.rows, high=d.classes), "given", renamed=labels),
    "t": Input(lambda d: torch.tensor(0.3, dtype=torch.float64), "given", rows=False, given_as=float),
    # (N,): one draw for a token each; and the mean that a reward, kept in float32, is compared with
    "uniforms": Input(lambda d: d.uniform(d.rows), "given", draws=True),
    "mean_reward": Input(lambda d: torch.tensor(0.375, dtype=torch.float64), "given", rows=False, given_as=float),
    # (N, K): probabilities of the teacher's K best tokens, the best first
    "student_top": Input(_some_probabilities, extremes=(_all_on(0), _all_on(1))),
    "teacher_top": Input(_some_probabilities, "frozen", match=like("student_top"), extremes=(_all_on(0), _all_on(0)), of="teacher"),
    # (C,): log-likelihoods of chunks
    "student_likelihood": Input(_below_zero, extremes=(far(FAR), far(1e-3)), of="student"),
    "teacher_likelihood": Input(_below_zero, "frozen", match=like("student_likelihood"), extremes=(far(1e-3), far(FAR)), of="teacher"),
    # (N,): of a token that was sampled: log q now and when it was, the importance weight, the advantage
    "log_q": Input(_below_zero, extremes=(far(FAR), far(1e-3)), of="student"),
    "old": Input(_below_zero, "frozen"),
    "weight": Input(lambda d: d.uniform(d.rows, low=0.2, high=1.2), "frozen"),
    "advantage": Input(lambda d: d.normal(d.rows), "frozen"),
}
