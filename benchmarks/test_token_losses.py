"""Token losses fused with the projection beside the dense form of TRL's GKD loss, in one process, on the same hidden states.

At SmolLM2's vocabulary and at Qwen2.5's: at least 5 times less memory above the inputs, not slower, equal gradients. The large one
runs half of the 1,024 tokens unless ``BENCH_FULL=1``, to stay below a minute.

Memory is the process's resident peak (Linux can set it back between two measurements) above what is resident before the step; both
forms' gradients are part of it. Seconds are CPU seconds, so that neighbours on the machine do not count.
TRL comes with the extra ``bench``.
"""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distillbench.problems.language_modeling.token_losses import Projection, token_losses

FULL = 1024 if os.environ.get("BENCH_FULL") else 512
LEAST = 5.0  # times less memory
MOST = 1.05  # of the dense form's seconds; a twentieth is noise
RESET = Path("/proc/self/clear_refs")

Step = Callable[[Tensor, Tensor, Projection, float], Tensor]


def dense(hidden: Tensor, weight: Tensor, teacher: Projection, beta: float) -> Tensor:
    from trl.experimental.gkd import GKDTrainer

    with torch.no_grad():
        teacher_logits = F.linear(teacher.hidden, teacher.weight)[None]
    total: Tensor = GKDTrainer.generalized_jsd_loss(F.linear(hidden, weight)[None], teacher_logits, beta=beta, reduction="sum")
    return total / len(hidden)


def fused(hidden: Tensor, weight: Tensor, teacher: Projection, beta: float) -> Tensor:
    return token_losses(hidden, weight, teacher, "js", beta=beta).mean()


def resident(which: str) -> float:
    """MiB: VmRSS now, or VmHWM, its highest since it was last set back."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(which))
    return int(line.split()[1]) / 1024


def measure(step: Step, inputs: tuple[Tensor, Tensor], teacher: Projection, beta: float) -> tuple[float, float, float, list[Tensor]]:
    """MiB above the inputs, CPU seconds, loss, gradients."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    RESET.write_text("5")
    before, start = resident("VmRSS"), time.process_time()
    loss = step(*inputs, teacher, beta)
    gradients = torch.autograd.grad(loss, inputs)
    return resident("VmHWM") - before, time.process_time() - start, loss.item(), list(gradients)


def draw(vocab: int, width: int, tokens: int) -> tuple[tuple[Tensor, Tensor], Projection]:
    """A student, and a teacher that mostly agrees with it: where they have nothing in common, the dense form's mixture loses digits."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(tokens, width, generator=generator), torch.randn(vocab, width, generator=generator).mul_(3 / width**0.5)
    noise = torch.randn(tokens, width, generator=generator)
    return (hidden.requires_grad_(), weight.requires_grad_()), Projection(hidden.detach() + 0.3 * noise, weight.detach().clone())


@pytest.mark.parametrize(
    ("vocab", "width", "tokens", "beta"), [(49_152, 576, 1024, 0.5), (49_152, 576, 1024, 0.0), (151_936, 896, FULL, 0.5)]
)
def test_a_fifth_of_the_memory_at_no_less_speed(vocab: int, width: int, tokens: int, beta: float) -> None:
    pytest.importorskip("trl.experimental.gkd", reason="pip install distillbench[bench]")
    if not RESET.exists():
        pytest.skip("only Linux lets a process set its peak memory back")
    for step in (dense, fused):  # what the first call loads is nobody's cost
        measure(step, *draw(100, 8, 4), beta)
    inputs, teacher = draw(vocab, width, tokens)
    theirs, ours = (measure(step, inputs, teacher, beta) for step in (dense, fused))
    print(
        f"\nV {vocab}, D {width}, {tokens} tokens, beta {beta}: dense {theirs[0]:.0f} MiB, {theirs[1]:.1f} s; fused {ours[0]:.0f} MiB, "
        f"{ours[1]:.1f} s: {theirs[0] / ours[0]:.1f} times less memory, {theirs[1] / ours[1]:.2f} times as fast"
    )
    assert ours[2] == pytest.approx(theirs[2], rel=1e-5)
    for mine, other in zip(ours[3], theirs[3], strict=True):
        assert (mine - other).norm() / other.norm() <= 1e-5
    assert theirs[0] / ours[0] >= LEAST
    assert ours[1] <= MOST * theirs[1]
