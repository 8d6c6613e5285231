"""Random numbers by counter: those of a row are a function of (seed, loop, learner, position, role, row), and of nothing else.

So a batch has the same noise whether it is drawn at once, in micro-batches, by several processes, or after a resume; and nobody draws
the rows of others to get at its own. A block of Philox numbers is computed from its counter (Salmon et al. 2011), so a part of a batch
begins where its first row does.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from distillbench.errors import UserError

BLOCK = 8  # numbers of 32 bits that a counter gives


@dataclass(slots=True, eq=False)  # one is made for every part of every batch, so it is a light one
class Key:
    """Where in a run something is drawn.

    Attributes:
        seed: of the role ``noise``.  loop: which loop of the run.  learner: which of its learners.
        position: in the learner's stream of batches.  row: place of the first row in the whole batch.
        asked: the roles that were drawn: each may be once, because a second draw would be the same numbers.
    """

    seed: int
    loop: int
    learner: int
    position: int
    row: int = 0
    asked: set[str] = field(default_factory=set)

    def at(self, row: int) -> Key:
        """The key of a part that begins ``row`` rows further on."""
        return Key(self.seed, self.loop, self.learner, self.position, self.row + row)

    def seed_of(self, role: str) -> int:
        """A seed of 64 bits for what is drawn once for this part."""
        return int.from_bytes(self._digest(f"{role}/{self.row}")[:8], "little") >> 1

    def _digest(self, role: str) -> bytes:
        return hashlib.sha256(f"{self.seed}/{self.loop}/{self.learner}/{self.position}/{role}".encode()).digest()

    def words(self, role: str, rows: int, count: int, *, first: int | None = None) -> np.ndarray:
        """``count`` numbers of 32 bits for each of ``rows`` rows, (rows, count) uint32; ``first`` row instead of the part's own.

        Raises:
            UserError: the role was drawn before.
        """
        if role in self.asked:
            raise UserError(
                f"the noise {role!r} is drawn twice for one batch, which gives the same numbers: name the second draw otherwise"
            )
        self.asked.add(role)
        blocks = max(1, -(-count // BLOCK))
        begin = (self.row if first is None else first) * blocks
        source = np.random.Philox(key=np.frombuffer(self._digest(role)[:16], dtype="<u8"), counter=[begin, 0, 0, 0])
        raw = source.random_raw(rows * blocks * BLOCK // 2).astype("<u8", copy=False).view("<u4")
        return raw.reshape(rows, blocks * BLOCK)[:, :count]


def uniform(words: np.ndarray) -> np.ndarray:
    """Multiples of 2^-24 in [0, 1), float32."""
    found: np.ndarray = (words >> 8).astype(np.float32) * np.float32(2**-24)
    return found


def normal(words: np.ndarray) -> np.ndarray:
    """Standard normal numbers of an even count of words a row, float32: Box and Muller's pairs, computed in float64.

    Within 6.4 of 0. Rounding to float32 hides in what digit the logarithms of two processors part.
    """
    half = words.shape[1] // 2
    radius = np.sqrt(-2 * np.log((words[:, :half] + 0.5) * 2**-32))
    angle = words[:, half:] * (2 * math.pi * 2**-32)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows that something may be drawn for: a request for a batch, or a batch. A loop stamps them with their ``key``."""

    key: Key | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu")

    def noise(self, shape: Sequence[int], role: str) -> Tensor:
        """Standard normal numbers, each row's its own.   ``shape`` (B, ...), B rows; on the batch's device, in the default type.

        Drawn in float32 on the CPU, so that every device sees the same numbers.

        Args:
            role: what they are for; once per batch.

        Raises:
            UserError: outside a loop, a role asked twice, or another number of rows.
        """
        count = math.prod(shape[1:])
        return self._tensor(normal(self._words(shape, role, count + count % 2))[:, :count], shape)

    def uniform(self, shape: Sequence[int], role: str) -> Tensor:
        """Numbers in [0, 1), multiples of 2^-24; otherwise as :meth:`noise`."""
        return self._tensor(uniform(self._words(shape, role, math.prod(shape[1:]))), shape)

    def integers(self, high: int, shape: Sequence[int], role: str) -> Tensor:
        """Whole numbers in [0, high), int64, for ``high`` below 2^32; otherwise as :meth:`noise`."""
        words = self._words(shape, role, math.prod(shape[1:])).astype(np.uint64)
        found = torch.from_numpy(((words * np.uint64(high)) >> np.uint64(32)).astype(np.int64))
        return found.reshape(tuple(shape)).to(self._device)

    def generator(self, role: str) -> torch.Generator:
        """For what is drawn once for all rows of this part together, and so changes where the batch is split: permutations."""
        return torch.Generator().manual_seed(self._known(role).seed_of(role))

    def coin(self, role: str) -> float:
        """A number in [0, 1) that is drawn once for the whole batch, and is the same in all its parts."""
        return float(uniform(self._known(role).words(role, 1, 1, first=0))[0, 0])

    def _known(self, role: str) -> Key:
        if self.key is None:
            raise UserError(
                f"the noise {role!r} is asked of a batch that no loop has handed out; outside of loops draw from run.generator(...)"
            )
        return self.key

    def _words(self, shape: Sequence[int], role: str, count: int) -> np.ndarray:
        key = self._known(role)
        if not len(shape) or shape[0] != len(self):
            raise UserError(f"the noise {role!r} has shape {tuple(shape)}; its first dimension is the batch's {len(self)} rows")
        return key.words(role, len(self), count)

    def _tensor(self, values: np.ndarray, shape: Sequence[int]) -> Tensor:
        found = torch.from_numpy(np.ascontiguousarray(values)).reshape(tuple(shape))
        return found.to(self._device, torch.get_default_dtype())
