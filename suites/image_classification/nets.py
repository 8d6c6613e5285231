"""Small networks of the embedded and analytic settings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distillbench.errors import unknown
from distillbench.training import student as students
from distillbench.training.nets import Architecture, Marginalized
from distillbench.training.student import Student


class SmallCNN(nn.Module):
    """Convolutions of 3x3 with batch normalisation and ReLU, the second and later ones of stride 2, then pooling and a linear layer.

    ``forward``: (B, 1, 8, 8) -> (B, outputs). Stages are the ReLU outputs of the blocks.
    """

    def __init__(self, widths: list[int], outputs: int, strides: list[int] | None = None) -> None:
        super().__init__()
        strides = strides or [1] + [2] * (len(widths) - 1)
        blocks = []
        for before, width, stride in zip([1, *widths], widths, strides, strict=False):
            conv = nn.Conv2d(before, width, 3, stride, 1, bias=False)
            blocks.append(nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU()))
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(widths[-1], outputs)
        self.head_name = "head"
        self.stage_names = tuple(f"blocks.{i}" for i in range(len(widths)))

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (B, outputs)."""
        for block in self.blocks:
            inputs = block(inputs)
        logits: Tensor = self.head(inputs.mean((2, 3)))
        return logits


class MLP(nn.Module):
    """Linear layers with ReLU.   ``forward``: (B, inputs) -> (B, outputs). Stages are the ReLU outputs."""

    def __init__(self, inputs: int, widths: list[int], outputs: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in zip([inputs, *widths], widths, strict=False))
        self.head = nn.Linear(widths[-1], outputs)
        self.head_name = "head"
        self.stage_names = tuple(f"blocks.{i}" for i in range(len(widths)))

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (B, outputs)."""
        for block in self.blocks:
            inputs = block(inputs)
        logits: Tensor = self.head(inputs)
        return logits


class GaussianBayes(nn.Module):
    """The exact posterior of Gaussian classes N(mean_c, spread_c^2 I) with equal priors, as logits.

    log p(c|x) is linear in the features (x, |x|^2), so the teacher has an embedding and a linear head like any other:
    weight_c = (mean_c / s_c^2, -1 / (2 s_c^2)), bias_c = -|mean_c|^2 / (2 s_c^2) - d log s_c.
    """

    def __init__(self, means: Tensor, spreads: Tensor) -> None:
        super().__init__()
        classes, dimension = means.shape
        precision = 1 / spreads.double() ** 2
        centre = means.double()
        self.features = _Quadratic()
        self.head = nn.Linear(dimension + 1, classes)
        with torch.no_grad():
            self.head.weight.copy_(torch.cat([centre * precision[:, None], -precision[:, None] / 2], dim=1))
            self.head.bias.copy_(-(centre**2).sum(1) * precision / 2 + dimension * precision.log() / 2)
        self.head_name = "head"
        self.stage_names = ("features",)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (B, C) whose softmax is the exact posterior."""
        logits: Tensor = self.head(self.features(inputs))
        return logits


class _Quadratic(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cat([inputs, (inputs**2).sum(1, keepdim=True)], dim=1)


def build(architecture: Architecture, seed: int) -> nn.Module:
    """The network an :class:`Architecture` names, freshly initialised from ``seed`` and tagged for export.

    ``groups=S`` in its arguments gives S logits per class and their logsumexp as the class logit.

    Raises:
        UserError: an unknown name.
    """
    from distillbench.suites.image_classification.cifar_nets import NETS

    arguments: dict[str, Any] = dict(architecture.arguments)
    groups = int(arguments.pop("groups", 1))
    outputs = int(arguments.pop("outputs", 0)) * groups
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the GPUs, whose state is not put back
        if architecture.name == "small-cnn":
            net: nn.Module = SmallCNN(outputs=outputs, **arguments)
        elif architecture.name == "mlp":
            net = MLP(outputs=outputs, **arguments)
        elif architecture.name == "gaussian-bayes":
            net = GaussianBayes(torch.tensor(arguments["means"]), torch.tensor(arguments["spreads"]))
        elif architecture.name.startswith("torchvision:"):
            net = _torchvision(architecture.name.partition(":")[2], outputs)
        elif architecture.name in NETS:
            net = NETS[architecture.name](outputs)
        else:
            raise unknown("architecture", architecture.name, ["small-cnn", "mlp", "gaussian-bayes", "torchvision:<name>", *NETS])
        if groups > 1:
            net = Marginalized(net, groups)
    net.architecture = architecture  # type: ignore[assignment]
    return net


def _torchvision(name: str, outputs: int) -> nn.Module:
    from torchvision.models import get_model

    net: nn.Module = get_model(name, weights=None, num_classes=outputs)
    net.stage_names = ("maxpool", "layer1", "layer2", "layer3", "layer4")  # type: ignore[assignment]
    net.head_name = "fc"  # type: ignore[assignment]
    return net


def rebuild(student: Student) -> nn.Module:
    """The network of an exported student, in evaluation mode. Raises UserError where weights and architecture do not fit."""
    return students.rebuild(student, build)
