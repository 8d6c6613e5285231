"""Node graphs: a stochastic block model whose features alone say less than the graph does."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distillbench.cards.card import Budget, Caps, Metric, Setting, SuiteCard, Training
from distillbench.errors import NotApplicable
from distillbench.runs.record import Measurement
from distillbench.runs.suite import Context, JudgeContext, Judgement, Suite, TrainContext
from distillbench.training import student as students
from distillbench.training.data import Arrays, Shuffled
from distillbench.training.nets import Architecture, Marginalized
from distillbench.training.student import Student, tensor_digest
from outside_nodes.problem import Graph, NodeClassification, NodeOracle

CARD = SuiteCard(
    slug="node-graphs",
    version=1,
    problem="node-classification",
    accepts=["classification"],
    title="Node graphs",
    metrics=[
        Metric(name="top1", unit="fraction", better="higher", range=(0, 1), meaning="fraction of unlabelled nodes classified right"),
        Metric(name="agreement", unit="fraction", better="higher", range=(0, 1), meaning="fraction decided as the teacher decides"),
    ],
    primary="top1",
    controls=["scratch", "pseudo_label", "teacher", "shuffled_teacher"],
    settings={
        "csbm": Setting(
            tier="analytic",
            summary="600 nodes in 4 blocks with Gaussian features; a graph network teaches a network that sees no edges",
            budget=Budget(student_examples=6400),
            caps=Caps(parameters=2, flops=2, opens=["groups"]),
            training=Training(batch_size=64, optimizer="adamw", learning_rate=0.01, schedule="cosine"),
            options={"nodes": 600, "blocks": 4, "width": 8, "inside": 0.05, "outside": 0.01, "apart": 0.5, "labels": 10, "tune": 100},
        ),
    },
)


# --- networks -------------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """Sees a node's features.   forward: (B, D) -> (B, outputs)."""

    head_name = "head"
    stage_names = ("hidden",)

    def __init__(self, inputs: int, outputs: int, width: int = 32) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(inputs, width), nn.ReLU())
        self.head = nn.Linear(width, outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (B, outputs)."""
        logits: Tensor = self.head(self.hidden(inputs))
        return logits


class GCN(MLP):
    """Kipf and Welling 2017: the same network over means of neighbours.   forward: (N, D), all nodes -> (N, outputs)."""

    def __init__(self, inputs: int, outputs: int, width: int = 32) -> None:
        super().__init__(inputs, outputs, width)
        self.register_buffer("mix", torch.eye(0), persistent=False)  # the graph's, set by build

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (N, outputs). Raises NotApplicable for other nodes than all."""
        mix: Tensor = self.mix  # type: ignore[assignment]
        if len(inputs) != len(mix):
            raise NotApplicable(f"a graph network answers about all {len(mix)} nodes of its graph at once, not about {len(inputs)}")
        logits: Tensor = self.head(mix @ self.hidden(mix @ inputs))
        return logits


# --- the graph ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelledGraph:
    """A graph with its truth.

    Attributes:
        blocks: (N,) int64.  labelled, tune, test: rows of nodes.  mix: (N, N), the graph with loops, normalised on both sides.
    """

    graph: Graph
    blocks: Tensor
    labelled: Tensor
    tune: Tensor
    test: Tensor
    mix: Tensor


@functools.cache
def graph_of(nodes: int, blocks: int, width: int, inside: float, outside: float, apart: float, labels: int, tune: int) -> LabelledGraph:
    """The graph of a setting's options; there is one for all seeds."""
    draw = torch.Generator().manual_seed(0)
    block = torch.arange(nodes) % blocks
    features = apart * torch.randn(blocks, width, generator=draw)[block] + torch.randn(nodes, width, generator=draw)
    chance = torch.where(block[:, None] == block, inside, outside)
    upper = (torch.rand(nodes, nodes, generator=draw) < chance).triu(1)
    joined = upper | upper.T
    loops = joined.float() + torch.eye(nodes)
    scale = loops.sum(1).rsqrt()
    order = torch.randperm(nodes // blocks, generator=draw)[:, None] * blocks + torch.arange(blocks)  # a row has one node of each block
    labelled, others = order[:labels].flatten(), order[labels:].flatten()
    graph = Graph(features, torch.nonzero(joined).T)
    return LabelledGraph(graph, block, labelled, others[:tune], others[tune:], scale[:, None] * loops * scale)


@functools.cache
def _weights(seed: int, **options: float) -> dict[str, Tensor]:
    """The teacher's, after 60 steps on the labelled nodes."""
    about = graph_of(**options)  # type: ignore[arg-type]
    net = _build(Architecture("gcn"), seed, options)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02, weight_decay=5e-4)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(net(about.graph.features)[about.labelled], about.blocks[about.labelled]).backward()
        optimizer.step()
    return net.state_dict()


def _teacher(setting: Setting, seed: int) -> nn.Module:
    net = _build(Architecture("gcn"), seed, setting.options)
    net.load_state_dict(_weights(seed, **setting.options))
    return net.eval()


def _build(architecture: Architecture, seed: int, options: Mapping[str, float]) -> nn.Module:
    groups = int(architecture.arguments.get("groups", 1))
    about = graph_of(**options)  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = {"mlp": MLP, "gcn": GCN}[architecture.name](int(options["width"]), int(options["blocks"]) * groups)
    if isinstance(body, GCN):
        body.mix = about.mix
    net: nn.Module = Marginalized(body, groups) if groups > 1 else body
    net.architecture = architecture  # type: ignore[assignment]
    return net


def build(architecture: Architecture, seed: int) -> nn.Module:
    """The network an Architecture names, freshly initialised from ``seed`` and tagged for export."""
    return _build(architecture, seed, CARD.settings["csbm"].options)


# --- the contract ---------------------------------------------------------------------------------------------------


class NodeGraphs(Suite):
    """Judges decisions about nodes whose labels no problem contains."""

    def problem(self, ctx: TrainContext) -> NodeClassification:
        """What a method gets: the graph, the labels of a few nodes, and the teacher's decisions in place of all others."""
        setting, seeds = ctx.setting, ctx.seeds
        about, net, size = graph_of(**setting.options), _teacher(setting, seeds["teacher"]), setting.training.batch_size
        features, nodes = about.graph.features, torch.arange(len(about.blocks))
        labelled = torch.isin(nodes, about.labelled)
        with torch.no_grad():
            labels = torch.where(labelled, about.blocks, net(features).argmax(1))
        train = Arrays(features, labels, labelled, tensor_digest({"features": features, "edges": about.graph.edges}))
        return NodeClassification(
            setting=ctx.name,
            student=build(Architecture("mlp"), seeds["init"]),
            build=functools.partial(build, seed=seeds["init"]),
            classes=int(setting.options["blocks"]),
            teacher=NodeOracle(net, features),
            batches=Shuffled(train, nodes, size, seeds["order"]),
            labelled=Shuffled(train, about.labelled, size, seeds["order"]),
            train=train,
            graph=about.graph,
        )

    def rebuild(self, student: Student, ctx: Context) -> nn.Module:
        """The network of an exported student, in evaluation mode. Raises UserError where weights and architecture do not fit."""
        return students.rebuild(student, build)

    def evaluate(self, student: Student, ctx: JudgeContext) -> Judgement:
        """Judge plain weights on nodes whose labels no problem contains."""
        about, networks = graph_of(**ctx.setting.options), (self.rebuild(student, ctx), _teacher(ctx.setting, ctx.seeds["teacher"]))
        rows = about.tune if ctx.split == "tune" else about.test
        with torch.no_grad():
            decided, theirs = (net(about.graph.features).argmax(1)[rows] for net in networks)
        return Judgement(
            [
                Measurement.mean("top1", (decided == about.blocks[rows]).float().tolist()),
                Measurement.mean("agreement", (decided == theirs).float().tolist()),
            ]
        )


SUITE = NodeGraphs()
