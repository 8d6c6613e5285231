"""The teacher behind one door: evaluation mode, no gradient, metered, cached by bytes."""

from __future__ import annotations

import copy

import torch
from torch import nn

from distillbench.training.student import tensor_digest


class Meter:
    """Counts what a run uses. Plain numbers, so that a checkpoint can carry them."""

    FIELDS = (
        "student_examples",
        "student_steps",
        "teacher_examples",
        "teacher_forwards",
        "generated_tokens",
        "training_flops",
        "wall_seconds",
    )

    def __init__(self) -> None:
        self.counts: dict[str, float] = dict.fromkeys(self.FIELDS, 0)

    def add(self, name: str, amount: float) -> None:
        """Count ``amount`` more of ``name``."""
        self.counts[name] += amount


class Oracle:
    """A frozen network behind one door.

    Methods never touch the network: they ask, the oracle answers without a graph. ``examples`` asked are metered
    whether or not a cache holds the answer, so cost does not depend on who ran before; forwards computed are metered too.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module.eval().requires_grad_(False)
        self.meter = Meter()
        self.digest = tensor_digest(dict(module.state_dict()))

    def _asked(self, rows: int, computed: bool = True) -> None:
        self.meter.add("teacher_examples", rows)
        if computed:
            self.meter.add("teacher_forwards", rows)

    def trainable_copy(self) -> nn.Module:
        """A copy of the teacher that may be trained (teacher-side methods); the oracle itself stays as it is."""
        return copy.deepcopy(self._module).requires_grad_(True).train()

    def to(self, device: torch.device) -> None:
        """Move the network."""
        self._module.to(device)
