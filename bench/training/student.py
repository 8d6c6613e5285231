"""The student as it leaves a method: plain weights and how to rebuild them. No code of the method travels along."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from distillbench.errors import UserError
from distillbench.identity import sha256
from distillbench.training.nets import Architecture

Network = TypeVar("Network", bound=nn.Module)

AVERAGE = "average"  # the name of an average that says no more
FIXED = re.compile(r"average|ema [0-9.e+-]+")  # averages that a file marks with ``true``: their bytes stand in published records


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
        averaged: what average of the trained weights these are (``ema 0.999``), or empty where they are the weights themselves. A file
            says of an average with a fixed decay only that it is one, which reads as ``average``.
    """

    weights: dict[str, Tensor]
    architecture: Architecture
    recipe: dict[str, Any] = field(default_factory=dict)
    averaged: str = ""

    @staticmethod
    def of(module: nn.Module, recipe: dict[str, Any] | None = None, averaged: str = "") -> Student:
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
        scheduled = self.averaged and not FIXED.fullmatch(self.averaged)
        averaged = self.averaged if scheduled else bool(self.averaged)
        about = {"name": self.architecture.name, "arguments": self.architecture.arguments, "recipe": self.recipe, "averaged": averaged}
        return save(self.weights, metadata={"distillbench": json.dumps(about, sort_keys=True)})

    @staticmethod
    def from_bytes(blob: bytes, where: str = "student") -> Student:
        """The student in a safetensors file. Raises UserError where the bytes are not one."""
        try:
            size = int.from_bytes(blob[:8], "little")
            about = json.loads(json.loads(blob[8 : 8 + size])["__metadata__"]["distillbench"])
            said = about["averaged"]
            if not isinstance(said, bool | str):
                raise TypeError("averaged")
            averaged = said if isinstance(said, str) else AVERAGE if said else ""
            return Student(load(blob), Architecture(about["name"], about["arguments"]), about["recipe"], averaged)
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{where}: not a distillbench student (safetensors with its metadata)") from error

    @staticmethod
    def read(path: Path) -> Student:
        """The student in the file at ``path``. Raises UserError as :meth:`from_bytes`, or where the file cannot be read."""
        try:
            return Student.from_bytes(path.read_bytes(), str(path))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def rebuild(student: Student, build: Callable[[Architecture, int], Network]) -> Network:
    """The network of an exported student, in evaluation mode.

    Args:
        build: the suite's ``build(architecture, seed)``, which gives a network with fresh weights.

    Raises:
        UserError: the architecture cannot be built, or the weights do not fit it.
    """
    about = student.architecture
    try:
        net = build(about, 0)
    except (TypeError, ValueError, KeyError, IndexError, RuntimeError) as error:  # arguments come from files, and may be anything
        why = " ".join(str(error).split())
        raise UserError(f"architecture {about.name} cannot be built from {about.arguments}: {type(error).__name__}: {why}") from error
    try:
        net.load_state_dict(student.weights)
    except RuntimeError as error:
        raise UserError(f"the weights do not fit architecture {about.name}: {str(error).splitlines()[-1].strip()}") from error
    return net.eval()
