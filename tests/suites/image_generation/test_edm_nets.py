"""EDM's networks against numbers that the authors' code gave (``tests/goldens/edm_nets.json`` says how)."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distillbench.suites.image_generation.edm_nets import EDMDenoiser

GOLDEN = json.loads((Path(__file__).parents[2] / "goldens" / "edm_nets.json").read_text())
TINY, FULL = GOLDEN["tiny"], GOLDEN["full"]


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


def filled(name: str, **changes: Any) -> nn.Module:
    """The tiny network ``name`` with the weights that the golden's ``fill`` states, in float64 and evaluation mode."""
    net = EDMDenoiser(**{**TINY[name]["arguments"], **changes}).double()
    with torch.no_grad():
        for k, (entry, value) in enumerate(sorted(net.state_dict().items())):
            u = torch.from_numpy(uniform(k, tuple(value.shape)))
            if entry.endswith("freqs"):
                value.copy_(4 * u - 2)
            elif entry.endswith("bias"):
                value.copy_(0.4 * u - 0.2)
            elif value.ndim > 1 and not entry.endswith("resample_filter"):
                value.copy_((2 * u - 1) * math.sqrt(3 / math.prod(value.shape[1:])))
            elif value.ndim == 1:
                value.copy_(u + 0.5)
    return net.eval()


def inputs(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """noisy, sigma, labels of the golden."""
    about = TINY[name]["arguments"]
    sigma = torch.tensor([0.002, 0.7, 80.0], dtype=torch.float64)
    shape = (3, about["channels"], about["img_resolution"], about["img_resolution"])
    noisy = torch.from_numpy(4 * uniform(10**6, shape) - 2) * (sigma**2 + 0.25).sqrt().view(-1, 1, 1, 1)
    return noisy, sigma, torch.arange(3) % max(1, about["classes"])


def signature(net: nn.Module) -> str:
    lines = sorted(f"{k} {tuple(v.shape)}\n" for k, v in net.state_dict().items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_equals_the_authors_code(name: str) -> None:
    net, (noisy, sigma, labels) = filled(name), inputs(name)
    assert signature(net) == TINY[name]["state_dict_sha256"]
    before = noisy.clone()
    for kind, given in (("conditional", labels), ("null", None)):
        answer, golden = net(noisy, sigma, given), TINY[name][kind]
        np.testing.assert_allclose(answer[:, 0, :2, :3].reshape(3, -1).numpy(), golden["pixels"], rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(answer.mean((1, 2, 3)).numpy(), golden["mean"], rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(answer.std((1, 2, 3)).numpy(), golden["std"], rtol=1e-8, atol=1e-9)
    assert torch.equal(noisy, before)
    single = net.float()(noisy.float(), sigma.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), answer, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FULL)
def test_names_and_shapes_of_the_published_sizes(name: str) -> None:
    with torch.device("meta"):
        net = EDMDenoiser(**FULL[name]["arguments"])
    assert sum(p.numel() for p in net.parameters()) == FULL[name]["parameters"]
    assert signature(net) == FULL[name]["state_dict_sha256"]


@pytest.mark.parametrize("name", TINY)
def test_initial_distributions(name: str) -> None:
    """A student that starts from scratch starts as the authors' networks do."""
    torch.manual_seed(1)
    state = EDMDenoiser(**TINY[name]["arguments"]).state_dict()
    for entry, std in TINY[name]["initial_std"].items():
        assert float(state[entry].std()) == pytest.approx(std, rel=0.15, abs=0), entry


@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp", "adm"])
def test_forward_mode_derivative(name: str) -> None:
    """jvp along (image, sigma) equals the central difference; a wrong or missing rule would not."""
    net, (noisy, sigma, labels) = filled(name), inputs(name)
    noisy, sigma, labels = noisy[1:2], sigma[1:2], labels[1:2]
    along = torch.from_numpy(uniform(7, tuple(noisy.shape))) - 0.5, torch.tensor([0.3], dtype=torch.float64)

    def f(x: Tensor, s: Tensor) -> Tensor:
        answer: Tensor = net(x, s, labels)
        return answer

    value, slope = torch.func.jvp(f, (noisy, sigma), along)
    step = 1e-5
    with torch.no_grad():
        far, near = (f(noisy + h * along[0], sigma + h * along[1]) for h in (step, -step))
        torch.testing.assert_close(value, f(noisy, sigma))
    torch.testing.assert_close(slope, (far - near) / (2 * step), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", TINY)
def test_stages_are_maps_that_hooks_can_read(name: str) -> None:
    net, (noisy, sigma, _) = filled(name), inputs(name)
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    for part, module in net.named_modules():
        module.register_forward_hook(lambda _m, _x, y, part=part: kept.__setitem__(part, (y, y.clone())))
    with torch.no_grad():
        net(noisy, sigma)
    assert all(torch.equal(a, b) for a, b in kept.values())  # nothing downstream writes into a hooked output
    about = TINY[name]["arguments"]
    shapes = [tuple(kept[s][0].shape) for s in net.stage_names]
    widths = [about["model_channels"] * m for m in about["channel_mult"]]
    sides = [about["img_resolution"] >> i for i in range(len(widths))]
    assert shapes == [(3, w, s, s) for w, s in zip(widths, sides, strict=True)]


@pytest.mark.parametrize("name", ["ddpmpp", "adm"])
@torch.no_grad()
def test_mixed_precision(name: str) -> None:
    net, (noisy, sigma, labels) = filled(name).float(), inputs(name)
    exact = net(noisy.float(), sigma.float(), labels)
    with torch.autocast("cpu", torch.bfloat16):
        rough = net(noisy.float(), sigma.float(), labels)
    assert rough.dtype == torch.float32  # preconditioning stays exact: at sigma 0.002 nearly all of the answer is c_skip x
    assert float((rough - exact)[0].abs().max()) < 1e-3
    assert float((rough - exact).abs().max()) < 0.1 * float(exact.std())


def test_consistency_boundary_and_dropout() -> None:
    noisy, sigma, labels = inputs("ddpmpp")
    net = filled("ddpmpp", boundary=True, sigma_min=0.002)
    with torch.no_grad():
        torch.testing.assert_close(net(noisy, sigma, labels)[0], noisy[0], rtol=0, atol=1e-12)  # f(x, sigma_min) = x
        still = filled("ddpmpp", dropout=0.0).train()
        assert torch.equal(still(noisy, sigma, labels), still(noisy, sigma, labels))
        noisily = filled("ddpmpp").train()
        assert not torch.equal(noisily(noisy, sigma, labels), noisily(noisy, sigma, labels))


def test_gradients_reach_every_parameter_that_acts() -> None:
    for name in TINY:
        net, (noisy, sigma, labels) = filled(name), inputs(name)
        net(noisy, sigma, labels).square().sum().backward()
        idle = {k for k, p in net.named_parameters() if p.grad is None or not bool(p.grad.any())}
        assert idle == {k for k, _ in net.named_parameters() if "map_augment" in k}
