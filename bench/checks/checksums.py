"""Few numbers that stand for many, compared with a tolerance: processors differ in the last digits, and in their random numbers' too."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 1e-6  # relative
NOTHING = 1e-12  # absolute: what sums to zero leaves rounding behind
DIGITS = 10  # significant digits that are kept
KEPT = 2**17  # numbers of the pattern that are kept: small networks are asked about at every update


def brief(value: float) -> float:
    """``value`` with as many digits as are kept."""
    return float(f"{value:.{DIGITS}g}")


def checksum(tensors: Iterable[Tensor]) -> list[float]:
    """Of the finite entries x_i of all floating-point ``tensors`` in a row: how many, their norm, and sum_i x_i cos(0.1 + 1.7 i).

    The pattern tells orders apart and needs no random numbers.
    """
    parts = [t.detach().double().flatten() for t in tensors if t.is_floating_point()]
    x = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
    x = x[x.isfinite()]
    pattern = _pattern() if len(x) <= KEPT else _wave(len(x))
    return [len(x), brief(float(x.norm())), brief(float(x @ pattern[: len(x)]))]


def _wave(count: int) -> Tensor:
    return torch.cos(0.1 + 1.7 * torch.arange(count, dtype=torch.float64))


@functools.cache
def _pattern() -> Tensor:
    return _wave(KEPT)


def exact(tensor: Tensor) -> str:
    """A hash of a tensor of integers or of truth values, and of its shape."""
    about = f"{tuple(tensor.shape)}".encode() + tensor.detach().cpu().long().contiguous().numpy().tobytes()
    return hashlib.sha256(about).hexdigest()[:12]


def weights(module: nn.Module) -> list[Tensor]:
    """Copies of what a network's state dict holds, in its order."""
    return [t.detach().clone() for t in module.state_dict().values()]


def describe(value: Any) -> Any:
    """``value`` as plain data: numbers as they are, tensors and networks as their checksum, streams by their first batch, dataclasses
    and mappings by name. None for what has no numbers: text, functions, and everything unknown.
    """
    if isinstance(value, bool | int):
        return int(value)
    if isinstance(value, float):
        return brief(value) if math.isfinite(value) else None
    if isinstance(value, Tensor):
        return {"float": checksum([value])} if value.is_floating_point() else {"integer": exact(value)}
    if isinstance(value, nn.Module):
        return {"float": checksum(weights(value))}
    if hasattr(value, "stream"):
        return describe(next(iter(value.stream(0))))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        found = {str(k): describe(v) for k, v in value.items()}
        return {k: v for k, v in found.items() if v is not None} or None
    if isinstance(value, list | tuple):
        if len(value) > 2 and all(isinstance(v, float) for v in value):
            return {"float": checksum([torch.tensor(value)])}
        return [v for v in map(describe, value) if v is not None] or None
    return None


def agree(old: Any, new: Any) -> bool:
    """Whether two descriptions are of the same values. A name that is gone is sought under the new ones; what is new is no difference."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        if set(old) == {"float"} and set(new) == {"float"}:
            return same_sums(old["float"], new["float"])
        return all(agree(v, new[k]) if k in new else any(agree(v, n) for n in new.values()) for k, v in old.items())
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(agree(a, b) for a, b in zip(old, new, strict=True))
    if isinstance(old, int | float) and isinstance(new, int | float):
        return close(old, new)
    return bool(old == new)


def close(old: float, new: float, scale: float = 0.0) -> bool:
    """Whether two numbers are the same up to the tolerance; ``scale`` is the size of what they were summed from."""
    return abs(old - new) <= TOLERANCE * max(abs(old), abs(new), scale) + NOTHING


def same_sums(old: list[float], new: list[float]) -> bool:
    """Whether two checksums are of the same tensors: the sum with the pattern may cancel, so it is measured against the norm."""
    return old[0] == new[0] and close(old[1], new[1]) and close(old[2], new[2], scale=old[1])
