"""The CIFAR nets against numbers that the authors' code gave (``tests/goldens/cifar_nets.json`` says how)."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distillbench.suites.image_classification.cifar_nets import CIFAR_PAIRS, NETS

GOLDEN = json.loads((Path(__file__).parents[2] / "goldens" / "cifar_nets.json").read_text())


def uniform(k: int, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Stream ``k`` of numbers in [0, 1) by an integer hash (murmur3's finalizer over k * 2654435761 + j), the same everywhere."""
    h = np.arange(math.prod(shape), dtype=np.uint64) + np.uint64(k * 2654435761 % 2**32)
    mask = np.uint64(0xFFFFFFFF)
    h &= mask
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h ^= h >> np.uint64(shift)
        h = (h * np.uint64(factor)) & mask
    h ^= h >> np.uint64(16)
    return (h / 2.0**32).reshape(shape)


def fill(net: nn.Module) -> nn.Module:
    """Give the k-th state dict entry (k from 0) the values that the golden's ``fill`` states, in float64."""
    net.double()
    with torch.no_grad():
        for k, (name, value) in enumerate(net.state_dict().items()):
            u = torch.from_numpy(uniform(k, tuple(value.shape)))
            if name.endswith("num_batches_tracked"):
                value.zero_()
            elif value.ndim > 1:
                value.copy_((2 * u - 1) * math.sqrt(6 / math.prod(value.shape[1:])))
            elif name.endswith(("running_mean", "bias")):
                value.copy_(0.4 * u - 0.2)
            else:  # batch norm's weight and running_var
                value.copy_(u + 0.5)
    return net


def images() -> Tensor:
    """The input: stream 10**6, in [-2, 2)."""
    return torch.from_numpy(4 * uniform(10**6, (4, 3, 32, 32)) - 2)


def signature(net: nn.Module) -> str:
    """SHA-256 of the lines ``name shape`` of the state dict, in order."""
    lines = [f"{k} {tuple(v.shape)}\n" for k, v in net.state_dict().items()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def run(net: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """Logits and hooked maps (stages, then the head's input), read after the whole pass."""
    seen: dict[str, Tensor] = {}
    handles = [
        net.get_submodule(name).register_forward_hook(lambda _m, _x, y, name=name: seen.__setitem__(name, y)) for name in net.stage_names
    ]
    handles.append(net.get_submodule(net.head_name).register_forward_hook(lambda _m, x, _y: seen.__setitem__("pooled", x[0])))
    with torch.no_grad():
        logits = net(images())
    for handle in handles:
        handle.remove()
    return logits, [*(seen[n] for n in net.stage_names), seen["pooled"]]


def test_the_golden_covers_every_net() -> None:
    assert set(GOLDEN["nets"]) == set(NETS)


@pytest.mark.parametrize("name", NETS)
def test_equals_the_authors_code(name: str) -> None:
    golden = GOLDEN["nets"][name]
    net = NETS[name](100)
    assert sum(p.numel() for p in net.parameters()) == golden["parameters"]
    assert signature(net) == golden["state_dict_sha256"]  # so a published checkpoint loads
    fill(net)
    for mode in ("eval", "train"):
        net.train(mode == "train")
        logits, maps = run(net)
        np.testing.assert_allclose(logits[:2, :4].numpy(), golden[mode]["logits"], rtol=1e-8, atol=1e-9)
        assert [list(m.shape) for m in maps] == golden[mode]["shapes"]
        np.testing.assert_allclose([float(m.mean()) for m in maps], golden[mode]["means"], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", NETS)
def test_hooks_see_what_the_module_returned(name: str) -> None:
    """Nothing downstream writes into a hooked output: a copy taken in the hook equals the tensor after the pass."""
    net = NETS[name](7).eval()
    kept: list[tuple[Tensor, Tensor]] = []
    for module in net.modules():
        if module is not net:
            module.register_forward_hook(lambda _m, _x, y: kept.append((y, y.clone())))
    with torch.no_grad():
        assert net(images()[:1].float()).shape == (1, 7)
    assert len(kept) > 5
    assert all(torch.equal(a, b) for a, b in kept)


@pytest.mark.parametrize("name", NETS)
def test_taps_and_copies(name: str) -> None:
    net = NETS[name](7)
    assert len(net.stage_names) in (4, 5)
    head = net.get_submodule(net.head_name)
    assert isinstance(head, nn.Linear)
    assert head.out_features == 7
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert (other.stage_names, other.head_name) == (net.stage_names, net.head_name)
        x = images()[:2].float()
        assert torch.equal(other.eval()(x), net.eval()(x))


def test_relu_stages_are_not_negative_and_the_documented_ones_are() -> None:
    for name in ("resnet8x4", "vgg8", "ShuffleV1", "ShuffleV2", "wrn_16_1", "MobileNetV2"):
        net = fill(NETS[name](10)).eval()
        negative = [bool(m.min() < 0) for m in run(net)[1][:-1]]
        linear = {"wrn_16_1": [True] * 4, "MobileNetV2": [False, True, True, True, True]}
        assert negative == linear.get(name, [False] * len(negative)), name


def test_pairs() -> None:
    assert len(CIFAR_PAIRS) == 13
    assert len({(p.teacher, p.student) for p in CIFAR_PAIRS}) == 13
    for pair in CIFAR_PAIRS:
        assert {pair.teacher, pair.student} <= set(NETS)
        assert 0.6 < pair.student_top1 < pair.teacher_top1 < 0.8
        assert pair.student_top1 < pair.kd_top1 < 0.8
    assert {p.student for p in CIFAR_PAIRS if p.learning_rate == 0.01} == {"MobileNetV2", "ShuffleV1", "ShuffleV2"}
