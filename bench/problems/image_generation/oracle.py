"""A diffusion model as a teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distillbench.problems.image_generation.edm import guided
from distillbench.training.nets import staged
from distillbench.training.oracle import ModuleOracle
from distillbench.training.trees import Tree


class DenoiserOracle(ModuleOracle):
    """A diffusion model as a teacher: x0 prediction at any noise level of the variance-exploding family.

    Args:
        guidance: g of classifier-free guidance, D_none + g (D_condition - D_none), with condition None for D_none: 1 is the
            conditional model alone, 0 the unconditional one. (Where a paper writes (1 + w) D_label - w D_none, g = 1 + w.)
    """

    def __init__(self, module: nn.Module, guidance: float = 1.0) -> None:
        super().__init__(module)
        self.guidance = guidance

    def denoise(self, noisy: Tensor, sigma: Tensor, condition: Tree = None, *, differentiable: bool = False) -> Tensor:
        """E[x0 | x0 + sigma eps = noisy], guided.   noisy: (B, ...), sigma: (B,) > 0, condition: of B rows or None -> (B, ...).

        Every call counts B teacher examples, 2 B where guidance is not 1: a Heun step asks twice. ``differentiable`` keeps the
        graph from ``noisy``; the weights are frozen either way.
        """
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()), self._open(differentiable):
            self._asked(noisy.shape[0])
            self._worth(noisy.shape[0], noisy, sigma, condition)
            if self.guidance == 1.0 or condition is None:
                answer: Tensor = self._module(noisy, sigma, condition)
                return answer
            self._asked(noisy.shape[0])
            self._worth(noisy.shape[0], noisy, sigma, condition)
            return guided(self._module, self.guidance)(noisy, sigma, condition)

    def stages(self, noisy: Tensor, sigma: Tensor, condition: Tree = None) -> tuple[Tensor, ...]:
        """The network's feature maps, (B, K, H, W) or (B, K) each, with the graph from ``noisy``; never guided. Counts B examples.

        Raises:
            UserError: the network declares none (an exact teacher); see :func:`start.frozen`.
        """
        self._asked(noisy.shape[0])
        self._worth(noisy.shape[0], noisy, sigma, condition)
        return staged(self._module, noisy, sigma, condition)[1]

    def over(self, module: nn.Module) -> DenoiserOracle:
        """An unguided oracle over another network, on the same meter."""
        other = DenoiserOracle(module)
        other.meter, other.watch = self.meter, self.watch
        return other
