"""Node classification: the teacher sees a graph, the student the features of a node alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distillbench.problems.classification.oracle import ClassifierOracle
from distillbench.problems.classification.problem import Classification
from distillbench.training.data import Batch
from distillbench.training.nets import Outputs, outputs_of


@dataclass(frozen=True)
class Graph:
    """Nodes and what joins them.

    Attributes:
        features: (N, D) float.  edges: (2, E) int64, each edge both ways, without loops.
    """

    features: Tensor
    edges: Tensor


class NodeOracle(ClassifierOracle):
    """A graph network as a teacher: it sees the whole graph once, and answers about nodes by their index.

    Args:
        module: gives logits (N, C) for the features (N, D) of all nodes.
    """

    def __init__(self, module: nn.Module, features: Tensor) -> None:
        super().__init__(module)
        self._features = features
        self._seen: Outputs | None = None

    def logits(self, batch: Batch) -> Tensor:
        """Teacher logits (B, C)."""
        return self._rows_of(batch).logits

    def outputs(self, batch: Batch) -> Outputs:
        """Logits (B, C), embedding (B, D) and stages of the nodes of a batch."""
        return self._rows_of(batch)

    def retaught(self, module: nn.Module) -> NodeOracle:
        """An oracle over another network on the same graph, with the same meter."""
        other = NodeOracle(module, self._features)
        other.meter = self.meter
        return other

    def _rows_of(self, batch: Batch) -> Outputs:
        self._asked(len(batch), computed=False)
        if self._seen is None:
            with torch.no_grad():
                self._seen = outputs_of(self._module, self._features.to(batch.inputs.device)).detach()
            self.meter.add("teacher_forwards", len(self._features))
        seen, rows = self._seen, batch.index
        return Outputs(seen.logits[rows], seen.embedding[rows], tuple(stage[rows] for stage in seen.stages))


@dataclass(frozen=True, kw_only=True)
class NodeClassification(Classification):
    """Nodes of a graph to classify; an example is a node, and its index in a batch is its index in the graph.

    Transductive: every node is seen, and a label is there where it was observed; elsewhere it is the teacher's decision.

    Attributes:
        graph: for methods that look at edges.
    """

    graph: Graph
