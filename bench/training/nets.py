"""What the engine needs to know of a network: where its features are, and how it is rebuilt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distillbench.errors import NotApplicable


@dataclass(frozen=True)
class Outputs:
    """What one forward pass of a classifier shows.

    Attributes:
        logits: (B, C).  embedding: (B, D), the input of the last linear layer.
        stages: feature maps in the order of the network's ``stage_names``, (B, K, H, W) or (B, K) each.
    """

    logits: Tensor
    embedding: Tensor
    stages: tuple[Tensor, ...]

    def detach(self) -> Outputs:
        """The same values without their graph."""
        return Outputs(self.logits.detach(), self.embedding.detach(), tuple(s.detach() for s in self.stages))


@dataclass(frozen=True)
class Architecture:
    """How to rebuild a network: a name that the suite (or bench) knows, and plain arguments."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


def head(module: nn.Module) -> nn.Linear:
    """The last linear layer, named by the network's ``head_name``. Raises NotApplicable where there is none."""
    name = getattr(module, "head_name", None)
    found = module.get_submodule(name) if isinstance(name, str) else None
    if not isinstance(found, nn.Linear):
        raise NotApplicable(f"{type(module).__name__} declares no head_name of an nn.Linear; methods that use embeddings need it")
    return found


@contextmanager
def _captured(module: nn.Module, names: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = output

        return hook

    def keep_input(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen["embedding"] = inputs[0]

    handles = [module.get_submodule(n).register_forward_hook(keep(f"stage:{n}")) for n in names]
    if hasattr(module, "head_name"):
        handles.append(head(module).register_forward_hook(keep_input))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def outputs_of(module: nn.Module, inputs: Tensor) -> Outputs:
    """One forward pass of a classifier that also shows the embedding and the stages.

    Works for any network with ``head_name`` (a linear layer) and ``stage_names`` (submodules), by forward hooks.
    """
    head(module)  # says what is missing
    names: tuple[str, ...] = getattr(module, "stage_names", ())
    with _captured(module, names) as seen:
        logits = module(inputs)
    return Outputs(logits, seen["embedding"], tuple(seen[f"stage:{n}"] for n in names))


def staged(module: nn.Module, *inputs: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One forward pass of any network that declares ``stage_names``: its output, and the output of each stage, with their graph.

    Raises:
        NotApplicable: it declares none.
    """
    names: tuple[str, ...] = getattr(module, "stage_names", ())
    if not names:
        raise NotApplicable(f"{type(module).__name__} declares no stage_names; methods that look at features need them")
    with _captured(module, names) as seen:
        output: Tensor = module(*inputs)
    return output, tuple(seen[f"stage:{n}"] for n in names)


class Marginalized(nn.Module):
    """A classifier whose body has ``groups`` logits per class; the class logit is their logsumexp.

    ``body(x)``: (B, C * groups), class-major. ``forward(x)``: (B, C), so that softmax(forward) sums the groups' mass.
    """

    def __init__(self, body: nn.Module, groups: int) -> None:
        super().__init__()
        self.body = body
        self.groups = groups

    def forward(self, inputs: Tensor) -> Tensor:
        """Class logits (B, C)."""
        logits = self.body(inputs)
        return torch.logsumexp(logits.view(logits.shape[0], -1, self.groups), dim=-1)


def parameters(module: nn.Module) -> int:
    """The number of parameters."""
    return sum(p.numel() for p in module.parameters())
