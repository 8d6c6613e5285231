"""The k most probable next tokens of a language model, kept on disk in a few bytes per token.

A token's distribution takes :attr:`Layout.width` bytes, 114 at k = 50 and a vocabulary of 49,152:

    ids    sorted, in Elias-Fano coding (Elias 1974, Fano 1971): the low floor(log2(V / k)) bits of each as they are, the rest as gaps
           in unary; 595 bits where the 50 ids alone need 565
    values 5 bits each: how far a log-probability d lies below the largest, as round(31 (d / D) ** (1 / g)). The exponent g, out of
           1, 1.5, 2 and 3, and the span D share a byte and are chosen to lose least. The largest itself follows from the mass
    tail   3 bytes, relative error 2 ** -17: the mass of all other tokens
    lse    float32, exact: the logarithm of the sum of exp(logits), which turns log-probabilities back into logits

Ids, tail and lse lose nothing that matters; values are rounded.

Measured at k = 50, V = 49,152, against the distributions before packing, mean and largest of about 400 tokens each, in nats:
KL(before || packed) of the k + 1 outcomes; and the change that packing makes in the top-k forward_kl to a student whose logits are off by
N(0, 0.7^2), with its mean with sign, beside that divergence itself and that of the full distributions (the difference of the two is what
any top-k cache gives up).

    distributions                          tail (median)  KL mean  largest  change: mean  largest  signed   top-k   full
    Zipf, exponent 0.8 to 2.5              0.11           0.0006   0.0016   0.0036        0.022    0.0010   0.159   0.217
    Zipf, exponent 2.5 to 5                7e-6           0.0004   0.0016   0.0032        0.024    0.0005   0.0653  0.0654
    normal logits, deviation 1.5 to 4      0.65           0.0002   0.0007   0.0010        0.008    0.0001   0.081   0.238
    SmolLM2-135M-Instruct, its own answers 0.03           0.0005   0.0016   0.0034        0.019    0.0005   0.134   0.153

Unpacking 400 tokens takes 1 ms on one core, packing 15 to 45.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor

from distillbench.errors import UserError
from distillbench.files import write_atomic
from distillbench.identity import sha256
from distillbench.problems.language_modeling.texts import Texts, TokenBatch
from distillbench.problems.language_modeling.token_losses import TopK

MAGIC = b"distillbench-topk-1\n"
PART = 64  # texts in a file, and the most that a kill can lose
LEVELS = 31  # the largest code of a value
BITS = 5
SHAPES = (1.0, 1.5, 2.0, 3.0)
MOST = (0x3F800000 >> 7) - 1  # the code of the largest tail below 1: something is left for the k
SPANS = 64.0 * (np.arange(1, 65) / 64) ** 2  # nats

Bytes = NDArray[np.uint8]
Ask = Callable[[TokenBatch], tuple[TopK, Tensor]]


@dataclass(frozen=True)
class Layout:
    """How a token's distribution is packed.   k: entries kept.  vocab: V > k, entries there are.

    Raises:
        UserError: k is not in [1, V).
    """

    k: int
    vocab: int

    def __post_init__(self) -> None:
        if not 1 <= self.k < self.vocab:
            raise UserError(f"top-k is {self.k}; it must be in [1, {self.vocab}), below the entries of the vocabulary")

    @property
    def low(self) -> int:
        """Bits of an id that are stored as they are."""
        return (self.vocab // self.k).bit_length() - 1

    @property
    def high(self) -> int:
        """Bits of the unary part: a one for each id, a zero for each step of 2 ** low."""
        return self.k + ((self.vocab - 1) >> self.low)

    @property
    def packed(self) -> int:
        """Bytes of ids and values."""
        return -(-(self.k * (self.low + BITS) + self.high) // 8)

    @property
    def width(self) -> int:
        """Bytes a token."""
        return self.packed + 8

    def pack(self, distribution: TopK, lse: Tensor) -> Bytes:
        """Distributions of N tokens with the logarithms of their normalisers (N,), nats -> (N, width) bytes."""
        order = distribution.ids.sort(1).indices
        ids = distribution.ids.gather(1, order).cpu().numpy()
        logs = distribution.log_probs.gather(1, order).double().cpu().numpy()
        codes, shape = _encode(logs)
        bits = np.zeros((len(ids), self.packed * 8), np.uint8)
        parts = np.split(bits, np.cumsum([self.k * self.low, self.high, self.k * BITS]), axis=1)
        parts[0][:] = _bits(ids, self.low)
        np.put_along_axis(parts[1], (ids >> self.low) + np.arange(self.k), 1, axis=1)
        parts[2][:] = _bits(codes, BITS)
        tail = distribution.tail.float().cpu().numpy().view(np.uint32).astype(np.int64)  # no sign, 8 bits of exponent, 16 of mantissa
        rounded = np.minimum((tail + 64) >> 7, MOST).astype("<u4")[:, None].view(np.uint8)[:, :3]
        exact = lse.float().cpu().numpy().astype("<f4")[:, None].view(np.uint8)
        return np.concatenate([np.packbits(bits, axis=1), shape[:, None], rounded, exact], axis=1)

    def unpack(self, rows: Bytes) -> tuple[TopK, Tensor]:
        """What :meth:`pack` packed, ids in ascending order; log-probabilities and tail make a distribution exactly."""
        rows, count = np.ascontiguousarray(rows), len(rows)
        bits = np.unpackbits(rows[:, : self.packed], axis=1)
        low, high, codes, _ = np.split(bits, np.cumsum([self.k * self.low, self.high, self.k * BITS]), axis=1)
        ids = np.nonzero(high)[1].reshape(count, self.k) - np.arange(self.k) << self.low
        ids |= _numbers(low, self.k, self.low)
        tail = np.zeros((count, 4), np.uint8)
        tail[:, :3] = rows[:, self.packed + 1 : self.packed + 4]
        mass = (tail.view("<u4")[:, 0] << 7).astype(np.uint32).view(np.float32)
        logs = _decode(_numbers(codes, self.k, BITS), rows[:, self.packed])
        logs += np.log1p(-mass.astype(np.float64))[:, None] - _logsumexp(logs)
        lse = np.ascontiguousarray(rows[:, self.packed + 4 :]).view("<f4")[:, 0].astype(np.float32)
        distribution = TopK(torch.from_numpy(ids), torch.from_numpy(logs.astype(np.float32)), torch.from_numpy(mass.copy()))
        return distribution, torch.from_numpy(lse)


def top_k(logits: Tensor, k: int) -> tuple[TopK, Tensor]:
    """The k most probable entries of logits (N, V), and their logsumexp (N,): float32, temperature 1.

    The tail is summed over what is left out, not taken from 1, so a small one keeps its precision.
    """
    logits = logits.float()
    kept = logits.topk(k, 1)
    lse = logits.logsumexp(1)
    rest = logits.scatter(1, kept.indices, -math.inf).logsumexp(1)
    return TopK(kept.indices, kept.values - lse[:, None], (rest - lse).exp()), lse


class TopKTable:
    """The packed distributions of every token of a :class:`Texts`, found by the bytes of each example: ids, attention and response.

    Computed at the first use, part by part; parts lie in files that are mapped, and checked when they are opened.
    Two processes may fill one folder; a damaged file is computed anew.

    Args:
        ask: gives distributions and normalisers of the tokens of a batch that count.
        teacher: identity of what computes them.  folder: for the parts, or None to keep them in memory.
    """

    def __init__(self, texts: Texts, layout: Layout, ask: Ask, *, teacher: str, folder: Path | None) -> None:
        self._texts, self._layout, self._ask = texts, layout, ask
        self._teacher, self._folder = teacher, folder
        self._by_text: dict[str, tuple[NDArray[np.int64], Bytes]] = {}

    def find(self, batch: TokenBatch) -> TopK | None:
        """The distributions of the N tokens that count in ``batch``, or None where one of its examples is not of these texts.

        An example is its tokens; a batch may count fewer of them than the texts do.
        """
        self.fill()
        found = []
        for text, counted in _counted(batch):
            positions, table = self._by_text.get(text, (None, None))
            if positions is None or table is None or not np.isin(counted, positions).all():
                return None
            found.append(table[np.searchsorted(positions, counted)])
        if not found:
            return None
        distribution, _ = self._layout.unpack(np.concatenate(found))
        device = batch.ids.device
        return TopK(distribution.ids.to(device), distribution.log_probs.to(device), distribution.tail.to(device))

    def fill(self) -> None:
        """Compute what is not there yet."""
        if self._by_text:
            return
        by_text: dict[str, tuple[NDArray[np.int64], Bytes]] = {}
        for rows in torch.arange(len(self._texts)).split(PART):
            batch = self._texts.take(rows)
            keys = examples(batch)
            ends = [0, *itertools.accumulate(batch.response[:, 1:].sum(1).tolist())]
            table = self._part(batch, keys, ends[-1])
            for i, (text, counted) in enumerate(_counted(batch)):  # the first of equal examples, whoever asks
                by_text.setdefault(text, (counted, table[ends[i] : ends[i + 1]]))
        self._by_text = by_text

    def _part(self, batch: TokenBatch, keys: list[str], tokens: int) -> Bytes:
        """The distributions (tokens, width) of one part, from its file where there is a sound one."""
        about = {"teacher": self._teacher, "k": self._layout.k, "vocab": self._layout.vocab, "tokens": tokens, "examples": keys}
        header = sha256(json.dumps(about, sort_keys=True).encode()).encode()
        if self._folder is None:
            return self._compute(batch)
        path = self._folder / f"{header.decode()}.topk"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            table = _open(path, header, tokens, self._layout.width)
            if table is None:
                body = header + self._compute(batch).tobytes()
                write_atomic(path, MAGIC + sha256(body).encode() + body)
                table = _open(path, header, tokens, self._layout.width)
        if table is None:
            raise UserError(f"{path}: what was written there cannot be read back; check the disk")
        return table

    def _compute(self, batch: TokenBatch) -> Bytes:
        distribution, lse = self._ask(batch)
        if not bool(torch.isfinite(lse).all()):
            raise UserError("the teacher's outputs are not finite; check its weights file")
        return self._layout.pack(distribution, lse)


def examples(batch: TokenBatch) -> list[str]:
    """The digest of each example: token ids, attention and response, from its first real token to its last, so that padding is nothing."""
    ids, attention, response = (x.cpu().numpy() for x in (batch.ids, batch.attention, batch.response))
    ids = np.where(attention, ids, 0)
    found = []
    for i, real in enumerate(attention):
        first, last = real.argmax(), len(real) - real[::-1].argmax()
        found.append(sha256(b"".join(np.ascontiguousarray(x[i, first:last]).tobytes() for x in (ids, attention, response))))
    return found


def _counted(batch: TokenBatch) -> list[tuple[str, NDArray[np.int64]]]:
    """The digest of each example's tokens, without padding, and the positions in it of those that count and have one before them."""
    ids, attention, response = (x.cpu().numpy() for x in (batch.ids, batch.attention, batch.response))
    found = []
    for tokens, real, counts in zip(ids, attention, response, strict=True):
        positions = counts[1:].nonzero()[0] + 1  # a first token has no state before it
        found.append((sha256(np.ascontiguousarray(tokens[real]).tobytes()), positions - real.argmax()))
    return found


def _open(path: Path, header: bytes, tokens: int, width: int) -> Bytes | None:
    """The table in a file, mapped; None where it is missing, damaged, or about something else."""
    start = len(MAGIC) + 64
    try:
        data: Bytes = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError):  # numpy maps no empty file
        return None
    if len(data) != start + len(header) + tokens * width or data[:start].tobytes() != MAGIC + sha256(data[start:].tobytes()).encode():
        return None
    if data[start : start + len(header)].tobytes() != header:
        return None
    return data[start + len(header) :].reshape(tokens, width)


# --- bits -------------------------------------------------------------------------------------------------------


def _bits(numbers: NDArray[np.int64], width: int) -> Bytes:
    """The ``width`` low bits of each of (N, k) numbers, most significant first: (N, k * width)."""
    return (numbers[:, :, None] >> np.arange(width)[::-1] & 1).astype(np.uint8).reshape(len(numbers), -1)


def _numbers(bits: Bytes, k: int, width: int) -> NDArray[np.int64]:
    """The inverse of :func:`_bits`."""
    parts = bits.reshape(len(bits), k, width)
    found = np.zeros(parts.shape[:2], np.int64)
    for i in range(width):
        found = found << 1 | parts[:, :, i]
    return found


def _encode(logs: NDArray[np.float64]) -> tuple[NDArray[np.int64], Bytes]:
    """Codes (N, k) of log-probabilities, and the byte of span and exponent (N,): of the exponents, the one that loses least."""
    below = np.minimum(logs.max(1, keepdims=True) - logs, SPANS[-1])
    span = np.searchsorted(SPANS, below.max(1)).clip(max=len(SPANS) - 1)
    distribution = np.exp(logs - _logsumexp(logs))
    best, codes, shape = np.full(len(logs), np.inf), np.zeros(logs.shape, np.int64), np.zeros(len(logs), np.uint8)
    for i, g in enumerate(SHAPES):
        tried = np.rint(LEVELS * (below / SPANS[span][:, None]) ** (1 / g)).astype(np.int64)
        byte = (span * len(SHAPES) + i).astype(np.uint8)
        back = _decode(tried, byte)
        loss = (distribution * (_logsumexp(back) - back - below)).sum(1)  # the divergence, but for what does not depend on the codes
        better = loss < best
        best[better], codes[better], shape[better] = loss[better], tried[better], byte[better]
    return codes, shape


def _decode(codes: NDArray[np.int64], shape: Bytes) -> NDArray[np.float64]:
    """Log-probabilities (N, k) up to a constant of each row."""
    table = np.power(np.arange(LEVELS + 1) / LEVELS, np.asarray(SHAPES)[:, None])
    exponent, span = shape % len(SHAPES), shape // len(SHAPES)
    return np.asarray(-SPANS[span][:, None] * table[exponent[:, None], codes])


def _logsumexp(logs: NDArray[np.float64]) -> NDArray[np.float64]:
    top = logs.max(1, keepdims=True)
    return np.asarray(top + np.log(np.exp(logs - top).sum(1, keepdims=True)))
