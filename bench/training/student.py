"""The student as it leaves a method: plain weights and how to rebuild them. No code of the method travels along."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from distillbench.errors import UserError
from distillbench.identity import sha256
from distillbench.training.nets import Architecture


def tensor_digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes: the identity of a model or a data set in memory."""
    return sha256(save({k: v.detach().cpu().contiguous() for k, v in sorted(tensors.items())}))


@dataclass(frozen=True)
class Student:
    """Weights and the architecture they fit.

    Attributes:
        weights: the state dict, on the CPU.
        architecture: a name and arguments that the suite can build.
        recipe: how a generator is to be sampled (noise levels, step rule, guidance); empty elsewhere.
        averaged: True where these are exponential moving averages of the trained weights.
    """

    weights: dict[str, Tensor]
    architecture: Architecture
    recipe: dict[str, Any] = field(default_factory=dict)
    averaged: bool = False

    @staticmethod
    def of(module: nn.Module, recipe: dict[str, Any] | None = None, averaged: bool = False) -> Student:
        """The student that ``module`` is now.

        Raises:
            UserError: the module was not built by the problem (it has no ``architecture``), or a weight is not finite.
        """
        architecture = getattr(module, "architecture", None)
        if not isinstance(architecture, Architecture):
            raise UserError(
                "the student was not built by the problem: use problem.student or problem.new_student(...), "
                "so that it can be rebuilt without the method's code"
            )
        weights = {k: v.detach().cpu().clone().contiguous() for k, v in module.state_dict().items()}
        for name, value in weights.items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise UserError(f"the student's weight {name} is not finite")
        return Student(weights, architecture, dict(recipe or {}), averaged)

    def to_bytes(self) -> bytes:
        """safetensors, with architecture and recipe in its metadata."""
        about = {"name": self.architecture.name, "arguments": self.architecture.arguments, "recipe": self.recipe, "averaged": self.averaged}
        return save(self.weights, metadata={"distillbench": json.dumps(about, sort_keys=True)})

    @staticmethod
    def from_bytes(blob: bytes, where: str = "student") -> Student:
        """The student in a safetensors file. Raises UserError where the bytes are not one."""
        try:
            size = int.from_bytes(blob[:8], "little")
            about = json.loads(json.loads(blob[8 : 8 + size])["__metadata__"]["distillbench"])
            return Student(load(blob), Architecture(about["name"], about["arguments"]), about["recipe"], about["averaged"])
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{where}: not a distillbench student (safetensors with its metadata)") from error

    @staticmethod
    def read(path: Path) -> Student:
        """The student in the file at ``path``. Raises UserError as :meth:`from_bytes`, or where the file cannot be read."""
        try:
            return Student.from_bytes(path.read_bytes(), str(path))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
