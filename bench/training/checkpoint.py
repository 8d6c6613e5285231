"""Training state in one file: safetensors for the tensors, JSON for the rest, a checksum over both. Nothing is unpickled."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from distillbench.errors import UserError
from distillbench.files import write_atomic
from distillbench.identity import sha256

MAGIC = b"distillbench-checkpoint-1\n"


def _pack(value: Any, tensors: list[Tensor]) -> Any:
    """JSON for ``value``; tensors are put aside, and keys keep their types (optimizers count parameters with integers)."""
    if isinstance(value, Tensor):
        tensors.append(value.detach().cpu().clone().contiguous())
        return {"t": len(tensors) - 1}
    if isinstance(value, dict):
        return {"d": [[k, _pack(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple | list):
        return {"l" if isinstance(value, list) else "u": [_pack(v, tensors) for v in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"v": value}
    raise TypeError(f"a checkpoint cannot hold {type(value).__name__}")


def _unpack(node: Any, tensors: dict[str, Tensor]) -> Any:
    [(kind, value)] = node.items()
    if kind == "t":
        return tensors[str(value)]
    if kind == "d":
        return {k: _unpack(v, tensors) for k, v in value}
    if kind in "lu":
        items = [_unpack(v, tensors) for v in value]
        return items if kind == "l" else tuple(items)
    return value


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (nested dicts, lists, tuples, numbers, strings, tensors) atomically.

    Raises:
        SaveError: it could not be written; the checkpoint before it is untouched.
    """
    tensors: list[Tensor] = []
    skeleton = json.dumps(_pack(state, tensors)).encode()
    blob = save({str(i): t for i, t in enumerate(tensors)})
    body = len(skeleton).to_bytes(8, "little") + skeleton + blob
    write_atomic(path, MAGIC + sha256(body).encode() + body)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state in a checkpoint.

    Raises:
        UserError: truncated, damaged, or not a checkpoint.
    """
    data = path.read_bytes()
    digest, body = data[len(MAGIC) : len(MAGIC) + 64], data[len(MAGIC) + 64 :]
    if not data.startswith(MAGIC) or sha256(body).encode() != digest:
        raise UserError(f"{path}: corrupt or truncated checkpoint")
    size = int.from_bytes(body[:8], "little")
    state: dict[str, Any] = _unpack(json.loads(body[8 : 8 + size]), load(body[8 + size :]))
    return state


def rng_state() -> dict[str, Any]:
    """The state of torch's global generators."""
    return {"cpu": torch.get_rng_state(), "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else []}


def set_rng_state(state: dict[str, Any]) -> None:
    """Put torch's global generators back."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


class Checkpoints:
    """The checkpoints of one run, by the name of the work they belong to.

    Args:
        folder: where they lie, or None where a run is not to survive.
        code: digest of the code that trains; a checkpoint of other code is never used.
        writes: whether this process writes them.
    """

    def __init__(self, folder: Path | None, code: str | None, *, writes: bool) -> None:
        self.folder = folder
        self._code, self._writes = code, writes

    def write(self, name: str, state: dict[str, Any]) -> None:
        """Write ``state``; the one before it is kept until the next one.

        Raises:
            SaveError: it could not be written.
        """
        if self.folder is None or not self._writes:
            return
        path = self.folder / f"{name}.checkpoint"
        if path.exists():
            path.replace(path.with_suffix(".previous"))
        save_checkpoint(path, {**state, "code": self._code})

    def newest(self, name: str) -> dict[str, Any] | None:
        """The newest whole state that today's code wrote, or None. What is passed over is a warning."""
        if self.folder is None:
            return None
        path = self.folder / f"{name}.checkpoint"
        for place in (path, path.with_suffix(".previous")):
            if not place.exists():
                continue
            try:
                state = load_checkpoint(place)
            except UserError as error:
                warnings.warn(f"{place.name} is not usable, going back to the one before: {error}", stacklevel=2)
                continue
            if state.get("code") == self._code:
                return state
            warnings.warn(f"{place.name} was written by other code than today's, so it is not used; its work begins anew", stacklevel=2)
        return None
