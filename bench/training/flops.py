"""What one pass of a network costs, measured once for each shape of what it is asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

from distillbench.training.trees import Tree, each

_COSTS: WeakKeyDictionary[nn.Module, dict[object, float]] = WeakKeyDictionary()


def flops_per_row(module: nn.Module, inputs: tuple[Tree, ...], named: Mapping[str, Any] | None = None) -> float:
    """Floating-point operations of a forward pass of ``module`` for one row of ``inputs``, as torch counts them.

    Measured at the first call with inputs of such a shape and remembered: one row of ones passes, without a gradient, and no count that
    is under way sees it. Values do not matter, so nothing is drawn and nothing of the caller's is touched.

    Args:
        module: on one device, where the row is made.
        inputs, named: what the network is called with; tensors have a row per example.
    """
    known = _COSTS.setdefault(module, {})
    key = (shape_of(inputs), shape_of(tuple((named or {}).items())))
    if key not in known:
        device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
        row = [_one_row(x, device) for x in inputs]
        other = {name: _one_row(x, device) for name, x in (named or {}).items()}
        with _disable_current_modes(), torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(*row, **other)
        known[key] = float(counter.get_total_flops())
    return known[key]


def shape_of(value: Tree) -> object:
    """What tells two inputs of different cost apart: the shapes of a row of a tree's tensors, at their places. Hashable."""
    if isinstance(value, Tensor):
        return value.shape[1:]
    if isinstance(value, dict):
        value = tuple(value.items())
    return tuple([shape_of(part) for part in value]) if isinstance(value, tuple) else value


def _one_row(value: Any, device: torch.device) -> Any:
    """Ones where numbers are real (a noise level is not 0) and truth values, zeros for whole ones (a class or a token that is there)."""

    def row(x: Tensor) -> Tensor:
        whole = not x.is_floating_point() and x.dtype != torch.bool
        return torch.full((1, *x.shape[1:]), 0 if whole else 1, dtype=x.dtype, device=device)

    return each(row, value) if isinstance(value, Tensor | dict | tuple) else value
