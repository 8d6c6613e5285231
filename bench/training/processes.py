"""The processes that one run is spread over, as a launcher started them; one of them is the usual case."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn


class Processes:
    """What a run asks of its processes.

    Attributes:
        count: how many there are.  rank: this one's number.  main: whether it is the one that writes.
        device: where its networks and batches are.
    """

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        self._accelerator: Any = accelerator or Accelerator(cpu=not torch.cuda.is_available())
        # Read at every step, and slow to ask the accelerator for.
        self.count: int = self._accelerator.num_processes
        self.rank: int = self._accelerator.process_index
        self.main: bool = self._accelerator.is_main_process
        self.device: torch.device = self._accelerator.device

    def sum(self, value: Tensor) -> Tensor:
        """The sum over processes of a tensor that each has."""
        return self._accelerator.reduce(value, reduction="sum") if self.count > 1 else value

    def mean(self, value: Tensor) -> Tensor:
        """The mean over processes of a tensor that each has."""
        return self._accelerator.reduce(value, reduction="mean") if self.count > 1 else value

    def total(self, values: Sequence[float]) -> list[float]:
        """The sums over processes of numbers that each has."""
        summed: list[float] = self.sum(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()
        return summed

    def gather(self, mine: Tensor) -> tuple[Tensor, int]:
        """The rows of all processes, one process after the other, and where one's own begin. They may have different numbers of rows."""
        sizes = self._accelerator.gather(torch.tensor([len(mine)], device=self.device)).tolist()
        padded = self._accelerator.pad_across_processes(mine, dim=0)
        every = self._accelerator.gather(padded).split(len(padded))
        return torch.cat([rows[:size] for rows, size in zip(every, sizes, strict=True)]), sum(sizes[: self.rank])

    def clip(self, parameters: Sequence[nn.Parameter], norm: float) -> None:
        """Scale gradients down to ``norm`` where their norm exceeds it."""
        self._accelerator.clip_grad_norm_(parameters, norm)

    def synchronise(self, module: nn.Module) -> None:
        """Let batch normalisation see the rows of all processes, on GPUs. On CPUs torch cannot, and a warning says so."""
        found = [(parent, name) for parent in module.modules() for name, child in parent.named_children() if _normalises(child)]
        if self.count == 1 or not found:
            return
        if self.device.type != "cuda":
            warnings.warn(
                f"batch normalisation ({len(found)} layers) sees the rows of each process alone on CPUs: not what one process trains",
                stacklevel=2,
            )
            return
        for parent, name in found:  # the layer is another one, its parameters and buffers are the same
            setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(getattr(parent, name)))

    def seed(self, seed: int) -> None:
        """Seed torch's global random numbers, of this process's devices alone; torch.manual_seed is slow where there is no GPU."""
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)


def _normalises(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm)
