"""Distillation losses at the vocabularies of language models, fused with the output projection.

Hidden states go in, one loss per token comes out. Logits exist for a chunk of tokens at a time, and the gradient is taken in closed
form while they do, so no (tokens x vocabulary) tensor is kept for backward. Everything between the inputs
and the results is float32, or float64 where a state or a projection is.

p is the teacher's distribution of the next token and q the student's, both softmax(logits / T):

    forward_kl       KL(p || q)                                  Hinton et al. 2015 (arXiv 1503.02531)
    reverse_kl       KL(q || p)                                  Gu et al. 2023, MiniLLM (arXiv 2306.08543)
    js               beta KL(p || m) + (1 - beta) KL(q || m)     Agarwal et al. 2023, GKD (arXiv 2306.13649), eq. 1
                     with m = beta p + (1 - beta) q
    skew_kl          KL(p || alpha p + (1 - alpha) q)            Ko et al. 2024, DistiLLM (arXiv 2402.03898)
    skew_reverse_kl  KL(q || alpha q + (1 - alpha) p)            the same
    tv               sum |p - q| / 2                             Wen et al. 2023 (arXiv 2307.15190)

``js`` divided by beta tends to forward_kl as beta tends to 0, and divided by 1 - beta to reverse_kl as beta tends to 1. As in GKD,
beta = 0 *is* forward_kl and beta = 1 *is* reverse_kl, so the value jumps there. The skewed ones are their plain forms at alpha = 0,
and 0 at alpha = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from distillbench.errors import UserError, unknown

# --- which tokens count -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NextTokens:
    """The predictions of a batch that count. Made by :func:`next_tokens`.

    Attributes:
        rows: (N,) int64, positions b * T + t whose *next* token counts, in order.
        labels: (N,) int64, those next tokens.
        shape: (B, T) of the batch.
    """

    rows: Tensor
    labels: Tensor
    shape: tuple[int, int]

    @property
    def count(self) -> int:
        """N. Summed over the micro-batches of a batch, it is the denominator of :meth:`mean`."""
        return len(self.rows)

    def take(self, states: Tensor) -> Tensor:
        """(B, T, ...) -> (N, ...): what the model said at the position before each token that counts; differentiable.

        Raises:
            UserError: ``states`` belongs to a batch of another shape.
        """
        if tuple(states.shape[:2]) != self.shape:
            raise UserError(f"states have shape {tuple(states.shape)} but the tokens {self.shape}; give one state per token: (B, T, ...)")
        return states.flatten(0, 1).index_select(0, self.rows)

    def mean(self, values: Tensor, denominator: int) -> Tensor:
        """sum(values) / denominator: a mean over all tokens that count in the *whole* batch once micro-batches are added up.

        ``denominator`` is ``count`` summed over the micro-batches (and processes) of one optimizer step; a mean of their own means
        would weigh a token by the length of its neighbours. 0 where nothing counts.

        Raises:
            UserError: ``values`` is not (N,), or the denominator is smaller than N.
        """
        if values.shape != self.rows.shape:
            raise UserError(f"token losses have shape {tuple(values.shape)}; give one value per token that counts: ({self.count},)")
        if denominator < self.count:
            raise UserError(f"denominator {denominator} is below this micro-batch's {self.count} tokens; give the count of the whole batch")
        return values.sum() / max(denominator, 1)


def next_tokens(ids: Tensor, mask: Tensor) -> NextTokens:
    """The one owner of the next-token shift and the mask.

    The token at t counts where ``mask`` is true at t, and the state at t - 1 predicts it. A first token has no state before it and
    never counts. Padding may stand on either side: it is false in the mask, and with padding on the left the first token that
    counts needs a real one before it (a prompt, or a begin-of-sequence token).

    ids: (B, T) int64.  mask: (B, T) bool, true on response tokens, the end-of-sequence token among them.

    Raises:
        UserError: the shapes differ, or the mask is not boolean.
    """
    if ids.dim() != 2 or ids.shape != mask.shape:
        raise UserError(f"token ids have shape {tuple(ids.shape)} and the mask {tuple(mask.shape)}; both must be (B, T)")
    if mask.dtype != torch.bool:
        raise UserError(f"the response mask is {mask.dtype}; give a boolean one, true where a token counts (mask.bool())")
    counts = mask.clone()
    counts[:, :1] = False
    positions = counts.flatten().nonzero().squeeze(1)
    return NextTokens(positions - 1, ids.flatten()[positions], (ids.shape[0], ids.shape[1]))


# --- teachers ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Projection:
    """A teacher by its hidden states (N, D) and output projection (V, D), with an optional bias (V,). No gradient reaches it."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class TopK:
    """A teacher by the k entries it kept of each token's distribution, and the mass of all others.

    The others are one event: divergences are between distributions over k + 1 outcomes. So they are 0 at match, never above the divergence
    of the full distributions, and equal to it where the tail is empty. With k = 1, log-probability 0 and tail 0, ``forward_kl`` is
    cross-entropy.

    Attributes:
        ids: (N, k) int64, distinct in a row.
        log_probs: (N, k) float, nats.
        tail: (N,) float in [0, 1]: 1 minus the mass of the k entries.
        temperature: the one at which the distribution was taken. A tail cannot be brought to another temperature.
    """

    ids: Tensor
    log_probs: Tensor
    tail: Tensor
    temperature: float = 1.0


Teacher = Projection | TopK | Callable[[slice], Tensor]
"""A callable returns the logits (n, V) of the rows in a slice of tokens, the same ones if it is asked again in backward."""

# --- divergences ------------------------------------------------------------------------------------------------

# An excluded outcome (logit -inf) counts as this log-probability: 0 times it is 0, and a divergence that should be infinite is huge.
_EXCLUDED = -1e30


@dataclass(frozen=True)
class _Distributions:
    """Teacher p and student q over the same outcomes, (n, outcomes) each, and the two skews."""

    log_p: Tensor
    p: Tensor
    log_q: Tensor
    q: Tensor
    beta: float
    alpha: float

    def beside_mixture(self, of_p: float, of_q: float) -> tuple[Tensor, Tensor]:
        """log(p / q) and log(m / q) for the mixture m = of_p p + of_q q of positive weights.

        By a softplus, which keeps the digits that a difference of log m and log q loses where both are far below 0. Beyond the bounds,
        the smaller of p and q is nothing beside the other.
        """
        odds = math.log(of_p) - math.log(of_q)
        ratio = (self.log_p - self.log_q).clamp_(-100 - abs(odds), 100 + abs(odds))
        return ratio, F.softplus(ratio + odds, threshold=50).add_(math.log(of_q))


# Each divergence D returns its value (n,) and a = q dD/dq (n, outcomes), up to a multiple of q: the gradient in the logits,
# a - q sum(a), does not see that.
_Divergence = Callable[[_Distributions], tuple[Tensor, Tensor]]


def _forward_kl(x: _Distributions) -> tuple[Tensor, Tensor]:
    return (x.log_p - x.log_q).mul_(x.p).sum(1), -x.p


def _reverse_kl(x: _Distributions) -> tuple[Tensor, Tensor]:
    a = (x.log_q - x.log_p).mul_(x.q)
    return a.sum(1), a


def _js(x: _Distributions) -> tuple[Tensor, Tensor]:
    if x.beta in (0, 1):
        return _reverse_kl(x) if x.beta else _forward_kl(x)
    p_to_q, m_to_q = x.beside_mixture(x.beta, 1 - x.beta)
    teachers = p_to_q.sub_(m_to_q).mul_(x.p).sum(1)
    a = m_to_q.mul_(x.q).mul_(x.beta - 1)
    return a.sum(1).add_(teachers, alpha=x.beta), a


def _skew_kl(x: _Distributions) -> tuple[Tensor, Tensor]:
    if x.alpha == 0:
        return _forward_kl(x)
    if x.alpha == 1:
        return torch.zeros_like(x.p[:, 0]), torch.zeros_like(x.p)
    p_to_q, m_to_q = x.beside_mixture(x.alpha, 1 - x.alpha)
    value = p_to_q.sub_(m_to_q).mul_(x.p).sum(1)
    return value, m_to_q.neg_().exp_().mul_(x.p).mul_(x.alpha - 1)


def _skew_reverse_kl(x: _Distributions) -> tuple[Tensor, Tensor]:
    if x.alpha == 0:
        return _reverse_kl(x)
    if x.alpha == 1:
        return torch.zeros_like(x.q[:, 0]), torch.zeros_like(x.q)
    spare, m_to_q = x.beside_mixture(1 - x.alpha, x.alpha)
    value = torch.mul(m_to_q, x.q, out=spare).sum(1).neg_()
    return value, m_to_q.add_(torch.neg(m_to_q, out=spare).exp_(), alpha=x.alpha).mul_(x.q).neg_()


def _tv(x: _Distributions) -> tuple[Tensor, Tensor]:
    a = x.q - x.p
    return a.abs().sum(1).mul_(0.5), a.sign_().mul_(x.q).mul_(0.5)


_DIVERGENCES: Mapping[str, _Divergence] = MappingProxyType(
    {
        "forward_kl": _forward_kl,
        "reverse_kl": _reverse_kl,
        "js": _js,
        "skew_kl": _skew_kl,
        "skew_reverse_kl": _skew_reverse_kl,
        "tv": _tv,
    }
)
DIVERGENCES: tuple[str, ...] = tuple(_DIVERGENCES)
"""The names that a mix may hold."""

# --- one chunk of tokens ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """What is asked of every chunk of tokens. Nothing beyond ``vocab`` entries is read; everything is computed in ``dtype``."""

    teacher: Teacher
    mix: tuple[tuple[str, float], ...]
    temperature: float
    beta: float
    alpha: float
    vocab: int
    padded: bool  # whether a teacher's logits may be wider than ``vocab``
    chunk: int
    dtype: torch.dtype

    def project(self, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """logits / T (n, vocab), in memory of their own. Autocast leaves ``out=`` alone."""
        states, weight = states.to(self.dtype) / self.temperature, weight[: self.vocab]
        logits = states.new_empty(len(states), self.vocab)
        for block in _blocks(weight, self.dtype):
            torch.mm(states, weight[block].to(self.dtype).T, out=logits[:, block])
        return logits if bias is None else logits.add_(bias[: self.vocab], alpha=1 / self.temperature)

    def teacher_logits(self, rows: slice) -> Tensor:
        t = self.teacher
        if isinstance(t, Projection):
            return self.project(t.hidden[rows], t.weight, t.bias)
        assert not isinstance(t, TopK)
        logits, n = t(rows), rows.stop - rows.start
        if logits.dim() != 2 or len(logits) != n or logits.shape[1] < self.vocab or (logits.shape[1] > self.vocab and not self.padded):
            raise UserError(f"teacher logits have shape {tuple(logits.shape)}, not ({n}, {self.vocab}); if they are padded, give vocab")
        return logits[:, : self.vocab].to(self.dtype) / self.temperature

    def compare(self, log_p: Tensor, p: Tensor, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """The mix's values (n,) and their slopes in the logits / T that make q: (n, outcomes)."""
        both = _Distributions(log_p, p, log_q, q, self.beta, self.alpha)
        value, a = log_q.new_zeros(len(log_q)), None
        for name, weight in self.mix:
            v, s = _DIVERGENCES[name](both)
            value.add_(v, alpha=weight)
            a = (s if weight == 1 else s.mul_(weight)) if a is None else a.add_(s, alpha=weight)
        assert a is not None
        return value, a.addcmul_(q, a.sum(1, keepdim=True), value=-1)

    def top_k(self, logits: Tensor, rows: slice, kept: TopK) -> tuple[Tensor, Tensor]:
        """Values and slopes where all entries but k are one outcome; no second (n, vocab) tensor stays beside the logits."""
        ids, tail = kept.ids[rows], kept.tail[rows, None].to(self.dtype)
        if ids.shape[1] == self.vocab:  # no others: what stands in the tail is rounding
            tail = torch.zeros_like(tail)
        top = logits.gather(1, ids)
        rest = logits.scatter_(1, ids, -math.inf)
        mass = torch.logsumexp(rest, 1, keepdim=True).clamp_(min=_EXCLUDED)
        log_p = torch.cat([kept.log_probs[rows].to(self.dtype), tail.clamp(min=0).log()], 1).clamp_(min=_EXCLUDED)
        value, slope = self.compare(log_p, log_p.exp(), *_log_and_probs(torch.cat([top, mass], 1)))
        rest = rest.sub_(mass).exp_().mul_(slope[:, -1:])  # the rest shares its slope as it shares its mass
        return value, rest.scatter_(1, ids, slope[:, :-1])

    def losses(self, states: Tensor, weight: Tensor, bias: Tensor | None, rows: slice) -> tuple[Tensor, Tensor]:
        """Divergences (n,) in nats and their slopes in the student's logits / T (n, vocab)."""
        if isinstance(self.teacher, TopK):
            return self.top_k(self.project(states, weight, bias), rows, self.teacher)
        return self.compare(*_log_and_probs(self.teacher_logits(rows)), *_log_and_probs(self.project(states, weight, bias)))


def _log_and_probs(logits: Tensor) -> tuple[Tensor, Tensor]:
    """log softmax(logits), and its exponential. The logits are let go before the second is made."""
    logits = F.log_softmax(logits, 1).clamp_(min=_EXCLUDED)
    return logits, logits.exp()


_BLOCK = 4096  # entries of a half-precision projection that are brought to float32 at a time


def _blocks(weight: Tensor, dtype: torch.dtype) -> list[slice]:
    step = len(weight) if weight.dtype == dtype else _BLOCK
    return [slice(i, i + step) for i in range(0, len(weight), step)]


def _walk(
    task: _Task, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Losses (N,) and, where needed, slopes in hidden (N, D; each token's own), weight (V, D) and bias (V,; summed with ``scale`` (N,))."""
    t, dtype, real = task.temperature, task.dtype, weight[: task.vocab]
    losses = hidden.new_empty(len(hidden), dtype=dtype)
    of_hidden, of_weight, of_bias = (
        torch.zeros_like(x, dtype=dtype) if need and x is not None else None for need, x in zip(needs, (hidden, weight, bias), strict=True)
    )
    for start in range(0, len(hidden), task.chunk):
        rows = slice(start, min(start + task.chunk, len(hidden)))
        losses[rows], slope = task.losses(hidden[rows], weight, bias, rows)
        if of_hidden is not None:
            for block in _blocks(real, dtype):  # T^2 from the convention, 1 / T from the chain rule
                of_hidden[rows].addmm_(slope[:, block], real[block].to(dtype), alpha=t)
        factor = slope.new_full((len(slope), 1), t) if scale is None else scale[rows, None] * t
        if of_weight is not None:
            of_weight[: task.vocab].addmm_(slope.T, hidden[rows].to(dtype) * factor)
        if of_bias is not None:
            of_bias[: task.vocab].addmv_(slope.T, factor[:, 0])
        del slope  # before the next chunk makes its own
    return losses.mul_(t**2), of_hidden, of_weight, of_bias


class _Fused(torch.autograd.Function):
    """Per-token losses. Slopes of the weight are summed on the way forward as if every token's loss had the same gradient, as under any
    sum or mean; backward scales them by it. Where it differs between tokens, backward walks through the chunks once more."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, task: _Task, grad: bool) -> Tensor:
        needs = [grad and need for need in ctx.needs_input_grad[:3]]
        losses, *slopes = _walk(task, hidden, weight, bias, None, needs)
        ctx.task, ctx.needs, ctx.slope_hidden, ctx.slopes = task, needs, slopes[0], slopes[1:]
        ctx.save_for_backward(hidden, weight, bias)
        return losses

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        of_hidden = (ctx.slope_hidden * grad[:, None]).to(hidden.dtype) if ctx.needs[0] else None
        rest: list[Tensor | None] = [None, None]
        if any(ctx.needs[1:]):
            if ctx.slopes and bool((grad == grad[:1]).all()):
                scale = grad[0] if len(grad) else 0.0
                rest = [None if s is None else s.mul_(scale) for s in ctx.slopes]
                ctx.slopes = None  # handed over, not copied: a second backward through the same graph walks again
            else:
                rest = list(_walk(ctx.task, hidden, weight, bias, grad, [False, *ctx.needs[1:]])[2:])
        of_weight, of_bias = (None if g is None else g.to(x.dtype) for g, x in zip(rest, (weight, bias), strict=True))
        return of_hidden, of_weight, of_bias, None, None


# --- the loss ---------------------------------------------------------------------------------------------------


def token_losses(
    hidden: Tensor,
    weight: Tensor,
    teacher: Teacher,
    mix: str | Mapping[str, float],
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    beta: float = 0.5,
    alpha: float = 0.1,
    vocab: int | None = None,
    chunk: int = 64,
) -> Tensor:
    """T^2 times the weighted sum of the divergences in ``mix``, one value per token (N,), nats, reduced by nothing.

    T^2 keeps the size of the gradient roughly independent of T for all but ``tv``, whose gradient grows with T. ``tv`` is 1 minus the
    acceptance of speculative decoding, and in [0, 1], at T = 1 only. Gradients reach hidden, weight and bias, never the teacher. A
    sum or a mean of the result costs nothing extra; gradients that differ between tokens cost a second walk through the chunks.

    Args:
        hidden: (N, D) the student's states before the projection, of the tokens that count (:meth:`NextTokens.take`).
        weight: (V, D) the student's output projection; tied embeddings get the sum of both gradients.
        teacher: :class:`Projection`, :class:`TopK`, or a callable from a slice of tokens to their logits (n, V).
        mix: a name of :data:`DIVERGENCES`, or weights by name, such as ``{"forward_kl": 0.5, "tv": 0.5}``.
        bias: (V,) of the student's projection.
        temperature: T > 0, of both distributions.
        beta: in [0, 1], of ``js``.
        alpha: in [0, 1], of the skewed divergences.
        vocab: the number of real entries, where student or teacher pad their projections. Padding never enters.
        chunk: tokens at a time; six to eight tensors of (chunk, V) are the memory above the gradients.

    Raises:
        UserError: shapes, ranges or names that do not fit; a top-k teacher of another temperature.
    """
    weights = _mix(mix)
    for name, value, fits, what in (
        ("temperature", temperature, 0 < temperature < math.inf, "above 0"),
        ("beta", beta, 0 <= beta <= 1, "in [0, 1]"),
        ("alpha", alpha, 0 <= alpha <= 1, "in [0, 1]"),
        ("chunk", chunk, chunk >= 1, "at least 1"),
    ):
        if not fits:
            raise UserError(f"{name} is {value}; it must be {what}")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise UserError(f"student states {tuple(hidden.shape)} and projection {tuple(weight.shape)} do not fit; give (N, D) and (V, D)")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise UserError(f"the student's bias has shape {tuple(bias.shape)}; give one entry per row of the projection: ({len(weight)},)")
    _check_teacher(teacher, len(hidden), temperature, len(weight), vocab)
    wide = [x.dtype for x in (hidden, weight)] + ([teacher.hidden.dtype] if isinstance(teacher, Projection) else [])
    dtype = torch.float64 if torch.float64 in wide else torch.float32
    task = _Task(teacher, weights, temperature, beta, alpha, vocab or len(weight), vocab is not None, chunk, dtype)
    losses: Tensor = _Fused.apply(hidden, weight, bias, task, torch.is_grad_enabled())
    return losses


def _mix(mix: str | Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    weights = {mix: 1.0} if isinstance(mix, str) else dict(mix)
    for name, weight in weights.items():
        if name not in _DIVERGENCES:
            raise unknown("divergence", name, DIVERGENCES)
        if not 0 <= weight < math.inf:
            raise UserError(f"divergence {name!r} has weight {weight}; weights must be finite and at least 0")
    if not weights:
        raise UserError(f"the mix of divergences is empty; give weights by name: {', '.join(DIVERGENCES)}")
    return tuple((name, float(weight)) for name, weight in weights.items())


def _check_teacher(teacher: Teacher, tokens: int, temperature: float, entries: int, vocab: int | None) -> None:
    """Raise where the teacher does not fit ``tokens`` states and ``entries`` rows of the student's projection."""
    size = entries
    if isinstance(teacher, Projection):
        size = len(teacher.weight)
        if teacher.hidden.dim() != 2 or teacher.weight.dim() != 2 or teacher.hidden.shape != (tokens, teacher.weight.shape[1]):
            shapes = f"{tuple(teacher.hidden.shape)} and projection {tuple(teacher.weight.shape)}"
            raise UserError(f"teacher states {shapes} do not fit {tokens} tokens; give ({tokens}, D) and (V, D)")
        if vocab is None and size != entries:
            raise UserError(f"student and teacher have {entries} and {size} entries; give vocab, the number that is not padding")
    if vocab is not None and not 1 <= vocab <= min(entries, size):
        raise UserError(f"vocab is {vocab}; it must be in [1, {min(entries, size)}], the rows that student and teacher both have")
    if isinstance(teacher, TopK):
        ids, log_probs = teacher.ids, teacher.log_probs
        if ids.dim() != 2 or len(ids) != tokens or ids.shape != log_probs.shape or teacher.tail.shape != (tokens,):
            shapes = ", ".join(str(tuple(x.shape)) for x in (ids, log_probs, teacher.tail))
            raise UserError(f"top-k ids, log-probabilities and tail have shapes {shapes}; give ({tokens}, k) twice and ({tokens},)")
        if teacher.temperature != temperature:
            raise UserError(f"the top-k distributions are of temperature {teacher.temperature}, the loss of {temperature}; they must agree")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < (vocab or entries):
            raise UserError(f"top-k ids reach from {int(ids.min())} to {int(ids.max())}; they must be in [0, {vocab or entries})")
        if bool((ids.sort(1).values.diff(dim=1) == 0).any()):
            raise UserError("a token's top-k ids hold an entry twice; give each once, and the mass of what is left out in the tail")
        if bool(((log_probs.double().exp().sum(1) + teacher.tail - 1).abs() > 0.05).any()):
            raise UserError("the top-k probabilities and the tail of a token do not add up to 1; give log-probabilities, not logits")
