"""The teachers and students of the CIFAR-100 distillation benchmark (RepDistiller, mdistiller), written anew.

Structure, widths, initial distributions and parameter names are those of ``models/`` in HobbitLong/RepDistiller@b84f547
(mdistiller@a08d46f has the same nets), so a published checkpoint loads after conversion to safetensors.
``tests/goldens/cifar_nets.json`` holds numbers that the authors' code gave, and the test compares.

Every net maps ``(B, 3, H, W)`` float to logits ``(B, num_classes)``; the benchmark uses 32 x 32. It carries

- ``stage_names``: submodules whose *output* is a feature map ``(B, C, H, W)``; index 0 is the stem, as in the authors' list
  of hint features. In ResNet, VGG and ShuffleNet these maps are after the ReLU. In WRN (pre-activation blocks) they are the
  bare stem convolution and the residual sums *before* the next batch norm and ReLU, and in MobileNetV2 the stem after its ReLU
  and the linear outputs of inverted residuals 1, 2, 4 and 6: both as in the authors' code, and both may be negative.
- ``head_name``: the last ``nn.Linear``, whose input is the pooled embedding ``(B, D)``.

No ReLU works in place, so a forward hook on any submodule keeps what that submodule returned. This costs memory, never accuracy.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CIFAR_PAIRS", "NETS", "CifarNet", "Pair"]


class CifarNet(nn.Module):
    """Stem, stages, tail, global average pooling, linear head. Subclasses register the parts and say their names.

    Attributes:
        stage_names: submodules to hook for features, from stem to last stage.
        head_name: the linear classifier.
    """

    stage_names: tuple[str, ...]
    head_name: str
    conv1: nn.Module
    bn1: nn.Module
    relu: nn.Module

    def __init__(self, body: Sequence[str], stage_names: Sequence[str], head_name: str) -> None:
        super().__init__()
        self._body = tuple(body)  # run in this order after the stem
        self.stage_names = tuple(stage_names)
        self.head_name = head_name

    def stem(self, x: Tensor) -> Tensor:
        """What comes before the first stage: here convolution, batch norm and ReLU."""
        return _tensor(self.relu(self.bn1(self.conv1(x))))

    def tail(self, x: Tensor) -> Tensor:
        """What comes between the last stage and the pooling: here nothing."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, num_classes)`` of images ``(B, 3, H, W)``."""
        x = self.stem(x)
        for name in self._body:
            x = self.get_submodule(name)(x)
        x = F.adaptive_avg_pool2d(self.tail(x), 1).flatten(1)
        return _tensor(self.get_submodule(self.head_name)(x))


def _tensor(x: Any) -> Tensor:
    # nn.Module.__call__ is typed Any; this states what it is without a cast at every call.
    assert isinstance(x, Tensor)
    return x


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=bias)


def _conv_bn_relu(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = False) -> list[nn.Module]:
    return [_conv(inputs, outputs, kernel, stride, groups, bias), nn.BatchNorm2d(outputs), nn.ReLU()]


def _initialise(net: nn.Module, *, linear_std: float | None = None, zero_bias: bool = False) -> None:
    """Normal(0, 2 / (k * k * outputs)) convolutions; linear layers stay at torch's default unless told otherwise."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            if linear_std is not None:
                nn.init.normal_(module.weight, 0, linear_std)
            if zero_bias:
                nn.init.zeros_(module.bias)


# --- residual networks ------------------------------------------------------------------------------------------


class _Residual(nn.Module):
    """relu(branch(x) + shortcut(x)): 3x3-3x3, or 1x1-3x3-1x1 with four times the width at its end.

    ``shortcut`` is the name the projection has in the state dict; it is a projection only where shapes differ.
    """

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool, shortcut: str) -> None:
        super().__init__()
        outputs = 4 * width if bottleneck else width
        self.bottleneck, self.shortcut_name = bottleneck, shortcut
        self.conv1 = _conv(inputs, width, 1) if bottleneck else _conv(inputs, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride if bottleneck else 1)
        self.bn2 = nn.BatchNorm2d(width)
        if bottleneck:
            self.conv3 = _conv(width, outputs, 1)
            self.bn3 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        projection = [] if same else [_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)]
        self.add_module(shortcut, nn.Sequential(*projection))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.bottleneck:
            out = self.bn3(self.conv3(F.relu(out)))
        return F.relu(out + self.get_submodule(self.shortcut_name)(x))


class _ResNet(CifarNet):
    """Stem of ``widths[0]`` channels, then one stage per further width; every stage but the first halves the side."""

    def __init__(
        self, widths: Sequence[int], depths: Sequence[int], num_classes: int, *, bottleneck: bool, shortcut: str, head: str
    ) -> None:
        stages = [f"layer{i}" for i in range(1, len(depths) + 1)]
        super().__init__(stages, ["relu", *stages], head)
        self.conv1 = _conv(3, widths[0], 3)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        inputs = widths[0]
        for name, width, depth in zip(stages, widths[1:], depths, strict=True):
            blocks = []
            for i in range(depth):
                stride = 2 if i == 0 and name != "layer1" else 1
                blocks.append(_Residual(inputs, width, stride, bottleneck, shortcut))
                inputs = 4 * width if bottleneck else width
            self.add_module(name, nn.Sequential(*blocks))
        self.add_module(head, nn.Linear(inputs, num_classes))
        _initialise(self)


def _resnet(depth: int, *widths: int) -> Callable[[int], CifarNet]:
    """A ResNet of ``depth`` = 6n + 2 layers in three stages of n basic blocks."""
    blocks = [(depth - 2) // 6] * 3
    return lambda num_classes: _ResNet(widths, blocks, num_classes, bottleneck=False, shortcut="downsample", head="fc")


def _resnet50(num_classes: int) -> CifarNet:
    # The ImageNet net with a 3x3 stem of stride 1 and no max pooling; parameter names as in the authors' resnetv2.py.
    widths = (64, 64, 128, 256, 512)
    return _ResNet(widths, (3, 4, 6, 3), num_classes, bottleneck=True, shortcut="shortcut", head="linear")


class _WideBlock(nn.Module):
    """Pre-activation block; where the width changes, the shortcut also reads the activated input."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv(inputs, outputs, 3, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv(outputs, outputs, 3)
        self.convShortcut = None if inputs == outputs else _conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return _tensor(out + (x if self.convShortcut is None else self.convShortcut(active)))


class _WideResNet(CifarNet):
    """WRN-depth-k with depth = 6n + 4, no dropout. The stage maps are taken before the next batch norm and ReLU."""

    def __init__(self, depth: int, k: int, num_classes: int) -> None:
        stages = ["block1", "block2", "block3"]
        super().__init__(stages, ["conv1", *stages], "fc")
        self.conv1 = _conv(3, 16, 3)
        inputs = 16
        for name, outputs, stride in zip(stages, (16 * k, 32 * k, 64 * k), (1, 2, 2), strict=True):
            rest = [_WideBlock(outputs, outputs, 1) for _ in range((depth - 4) // 6 - 1)]
            layer = nn.Sequential(_WideBlock(inputs, outputs, stride), *rest)
            self.add_module(name, nn.Sequential(OrderedDict(layer=layer)))
            inputs = outputs
        self.bn1 = nn.BatchNorm2d(inputs)
        self.fc = nn.Linear(inputs, num_classes)
        _initialise(self, zero_bias=True)

    def stem(self, x: Tensor) -> Tensor:
        return _tensor(self.conv1(x))

    def tail(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(x))


def _wrn(depth: int, k: int) -> Callable[[int], CifarNet]:
    return lambda num_classes: _WideResNet(depth, k, num_classes)


# --- plain networks ---------------------------------------------------------------------------------------------


class _VGG(CifarNet):
    """Five blocks of ``depth`` 3x3 convolutions with bias and batch norm; max pooling after the first three blocks only."""

    def __init__(self, depth: int, num_classes: int) -> None:
        stages = [f"block{i}" for i in range(5)]
        super().__init__(stages, stages, "classifier")
        inputs = 3
        for name, outputs in zip(stages, (64, 128, 256, 512, 512), strict=True):
            layers: list[nn.Module] = []
            for _ in range(depth):
                layers += _conv_bn_relu(inputs, outputs, 3, bias=True)
                inputs = outputs
            self.add_module(name, nn.Sequential(*layers))
        self.classifier = nn.Linear(inputs, num_classes)
        _initialise(self, linear_std=0.01, zero_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        for name in self._body:
            x = self.get_submodule(name)(x)
            if name in ("block0", "block1", "block2"):
                x = F.max_pool2d(x, 2)
        return _tensor(self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1)))


def _vgg(depth: int) -> Callable[[int], CifarNet]:
    return lambda num_classes: _VGG(depth, num_classes)


# --- mobile networks --------------------------------------------------------------------------------------------


class _InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3, linear 1x1; an identity shortcut where shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.identity = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            *_conv_bn_relu(inputs, hidden, 1),
            *_conv_bn_relu(hidden, hidden, 3, stride, groups=hidden),
            _conv(hidden, outputs, 1),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return _tensor(x + self.conv(x) if self.identity else self.conv(x))


class _MobileNetV2(CifarNet):
    """MobileNetV2 with expansion ``t`` and all widths but the last scaled by ``width``; the stem already halves the side."""

    def __init__(self, t: int, width: float, num_classes: int) -> None:
        stages = ["conv1", "blocks.1", "blocks.2", "blocks.4", "blocks.6"]
        super().__init__([f"blocks.{i}" for i in range(7)], stages, "classifier.0")
        # (expansion, channels at width 1, blocks, stride); stride 1 in the second row is for small images
        table = ((1, 16, 1, 1), (t, 24, 2, 1), (t, 32, 3, 2), (t, 64, 4, 2), (t, 96, 3, 1), (t, 160, 3, 2), (t, 320, 1, 1))
        inputs = int(32 * width)
        self.conv1 = nn.Sequential(*_conv_bn_relu(3, inputs, 3, stride=2))
        self.blocks = nn.ModuleList()
        for expansion, channels, depth, stride in table:
            outputs = int(channels * width)
            rest = [_InvertedResidual(outputs, outputs, 1, expansion) for _ in range(depth - 1)]
            self.blocks.append(nn.Sequential(_InvertedResidual(inputs, outputs, stride, expansion), *rest))
            inputs = outputs
        last = int(1280 * max(1.0, width))
        self.conv2 = nn.Sequential(*_conv_bn_relu(inputs, last, 1))
        self.classifier = nn.Sequential(nn.Linear(last, num_classes))
        _initialise(self, linear_std=0.01, zero_bias=True)

    def stem(self, x: Tensor) -> Tensor:
        return _tensor(self.conv1(x))

    def tail(self, x: Tensor) -> Tensor:
        return _tensor(self.conv2(x))


class _Shuffle1(nn.Module):
    """ShuffleNet unit; with stride 2 the pooled input is concatenated, otherwise the input is added."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        width = outputs // 4
        self.stride = stride
        self.groups = 1 if inputs == 24 else groups  # the unit behind the stem has too few channels to group
        self.conv1 = _conv(inputs, width, 1, groups=self.groups)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride, groups=width)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, outputs, 1, groups=groups)
        self.bn3 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.channel_shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        if self.stride == 2:
            return F.relu(torch.cat([out, F.avg_pool2d(x, 3, stride=2, padding=1)], 1))
        return F.relu(out + x)


class _Shuffle2(nn.Module):
    """ShuffleNet-V2 unit: the first half of the channels passes, the second is transformed, then both are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = _conv(half, half, 1)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = _conv(half, half, 3, groups=half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = _conv(half, half, 1)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        kept, out = x.chunk(2, 1)
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(out)))))
        return torch.channel_shuffle(torch.cat([kept, F.relu(self.bn3(self.conv3(out)))], 1), 2)


class _Shuffle2Down(nn.Module):
    """ShuffleNet-V2 unit of stride 2: both branches read the whole input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.conv1 = _conv(inputs, inputs, 3, 2, groups=inputs)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv2 = _conv(inputs, half, 1)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = _conv(inputs, half, 1)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = _conv(half, half, 3, 2, groups=half)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = _conv(half, half, 1)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)))))
        right = F.relu(self.bn5(self.conv5(right)))
        return torch.channel_shuffle(torch.cat([left, right], 1), 2)


class _ShuffleNet(CifarNet):
    """Both ShuffleNets: 1x1 stem of 24 channels, three stages of 4, 8 and 4 units, the first of each with stride 2.

    They keep torch's default initial distributions, as the authors' do.
    """

    def __init__(self, version: int, num_classes: int) -> None:
        stages = ["layer1", "layer2", "layer3"]
        super().__init__(stages, ["relu", *stages], "linear")
        self.version = version
        self.conv1 = _conv(3, 24, 1)
        self.bn1 = nn.BatchNorm2d(24)
        self.relu = nn.ReLU()
        inputs = 24
        for name, outputs, depth in zip(stages, (240, 480, 960) if version == 1 else (116, 232, 464), (4, 8, 4), strict=True):
            units: list[nn.Module] = []
            if version == 1:
                units = [_Shuffle1(inputs, outputs - inputs, 2, groups=3)]
                units += [_Shuffle1(outputs, outputs, 1, groups=3) for _ in range(depth - 1)]
            else:
                units = [_Shuffle2Down(inputs, outputs)]
                units += [_Shuffle2(outputs) for _ in range(depth - 1)]
            self.add_module(name, nn.Sequential(*units))
            inputs = outputs
        if version == 2:
            self.conv2 = _conv(inputs, 1024, 1)
            self.bn2 = nn.BatchNorm2d(1024)
            inputs = 1024
        self.linear = nn.Linear(inputs, num_classes)

    def tail(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(x))) if self.version == 2 else x


# --- tables -----------------------------------------------------------------------------------------------------

NETS: dict[str, Callable[[int], nn.Module]] = {
    "resnet20": _resnet(20, 16, 16, 32, 64),
    "resnet32": _resnet(32, 16, 16, 32, 64),
    "resnet44": _resnet(44, 16, 16, 32, 64),
    "resnet56": _resnet(56, 16, 16, 32, 64),
    "resnet110": _resnet(110, 16, 16, 32, 64),
    "resnet8x4": _resnet(8, 32, 64, 128, 256),
    "resnet32x4": _resnet(32, 32, 64, 128, 256),
    "ResNet50": _resnet50,
    "wrn_16_1": _wrn(16, 1),
    "wrn_16_2": _wrn(16, 2),
    "wrn_40_1": _wrn(40, 1),
    "wrn_40_2": _wrn(40, 2),
    "vgg8": _vgg(1),
    "vgg13": _vgg(2),
    "MobileNetV2": lambda num_classes: _MobileNetV2(6, 0.5, num_classes),
    "ShuffleV1": lambda num_classes: _ShuffleNet(1, num_classes),
    "ShuffleV2": lambda num_classes: _ShuffleNet(2, num_classes),
}
"""Name -> builder; the argument is the number of classes. Names are the keys of RepDistiller's ``model_dict``."""


@dataclass(frozen=True)
class Pair:
    """A teacher and a student (keys of :data:`NETS`) with the published CIFAR-100 top-1 accuracies, as fractions.

    ``teacher_top1`` and ``student_top1`` are trained on labels alone; ``kd_top1`` is the student with plain KD (T = 4, 0.1 / 0.9,
    240 epochs). The authors keep the epoch that is best on the test set, so their numbers flatter; this harness reports the last.
    """

    teacher: str
    student: str
    teacher_top1: float
    student_top1: float
    kd_top1: float

    @property
    def learning_rate(self) -> float:
        """The benchmark's initial SGD rate: 0.01 for MobileNetV2 and ShuffleNet students, 0.05 for all others."""
        return 0.01 if self.student in ("MobileNetV2", "ShuffleV1", "ShuffleV2") else 0.05


# Source: README of HobbitLong/RepDistiller@b84f547, tables 1 (same style) and 2 (different styles).
CIFAR_PAIRS: tuple[Pair, ...] = (
    Pair("wrn_40_2", "wrn_16_2", 0.7561, 0.7326, 0.7492),
    Pair("wrn_40_2", "wrn_40_1", 0.7561, 0.7198, 0.7354),
    Pair("resnet56", "resnet20", 0.7234, 0.6906, 0.7066),
    Pair("resnet110", "resnet20", 0.7431, 0.6906, 0.7067),
    Pair("resnet110", "resnet32", 0.7431, 0.7114, 0.7308),
    Pair("resnet32x4", "resnet8x4", 0.7942, 0.7250, 0.7333),
    Pair("vgg13", "vgg8", 0.7464, 0.7036, 0.7298),
    Pair("vgg13", "MobileNetV2", 0.7464, 0.6460, 0.6737),
    Pair("ResNet50", "MobileNetV2", 0.7934, 0.6460, 0.6735),
    Pair("ResNet50", "vgg8", 0.7934, 0.7036, 0.7381),
    Pair("resnet32x4", "ShuffleV1", 0.7942, 0.7050, 0.7407),
    Pair("resnet32x4", "ShuffleV2", 0.7942, 0.7182, 0.7445),
    Pair("wrn_40_2", "ShuffleV1", 0.7561, 0.7050, 0.7483),
)
"""The thirteen classic pairs: seven of one architectural style, six across styles."""
