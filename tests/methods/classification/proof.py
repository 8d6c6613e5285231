"""What the proofs of classification methods share: seeded inputs, gradients by central differences, golden numbers, a short run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from distillbench.cards.card import Budget
from distillbench.problems.classification.problem import Classification
from distillbench.runs.identities import seeds_by_role
from distillbench.runs.suite import TrainContext
from distillbench.suites import image_classification
from distillbench.training.run import Run
from distillbench.training.student import Student

GOLDENS = Path(__file__).parents[2] / "goldens"


def draw(seed: int = 0, rows: int = 5, classes: int = 7) -> dict[str, np.ndarray]:
    """Inputs by the names that objectives give them."""
    rng = np.random.default_rng(seed)
    return {
        "student_logits": 2 * rng.standard_normal((rows, classes)),
        "teacher_logits": 3 * rng.standard_normal((rows, classes)),
        "labels": rng.integers(0, classes, rows),
        "auxiliary_logits": 2 * rng.standard_normal((rows, classes)),
    }


def tensors(arrays: dict[str, np.ndarray], *wanted: str) -> dict[str, torch.Tensor]:
    """The arrays as tensors, without changing their precision."""
    return {name: torch.tensor(arrays[name]) for name in wanted or arrays}


def gradient(f: Callable[..., torch.Tensor], inputs: dict[str, torch.Tensor], wrt: str) -> np.ndarray:
    """The gradient of sum(f) by autograd."""
    x = inputs[wrt].clone().requires_grad_(True)
    return torch.autograd.grad(f(**{**inputs, wrt: x}).sum(), x)[0].numpy()


def differences(f: Callable[[np.ndarray], Any], x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """The gradient of sum(f) by central differences."""
    slope = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        slope[index] = (np.sum(f(up)) - np.sum(f(down))) / (2 * step)
    return slope


def assert_equals_oracle(
    ours: Callable[..., torch.Tensor], oracle: Callable[..., Any], wrt: str, names: tuple[str, ...], **hp: Any
) -> None:
    """Value to 1e-10 and gradient to 1e-7 on ten draws of different shapes."""
    for seed in range(10):
        arrays = draw(seed, rows=2 + seed % 4, classes=2 + seed)
        given = {n: arrays[n] for n in names}
        x = tensors(given)
        np.testing.assert_allclose(ours(**x, **hp).numpy(), oracle(**given, **hp), rtol=1e-10, atol=1e-12)
        slope = differences(lambda z, given=given: oracle(**{**given, wrt: z}, **hp), given[wrt])
        np.testing.assert_allclose(gradient(lambda **k: ours(**k, **hp), x, wrt), slope, rtol=1e-6, atol=1e-7)


def golden(slug: str) -> tuple[dict[str, np.ndarray], list[tuple[dict[str, Any], float, dict[str, np.ndarray]]]]:
    """Inputs and (hyper-parameters, value, gradients) that the authors' code gave."""
    kept = json.loads((GOLDENS / f"{slug}.json").read_text())
    rng = np.random.default_rng(kept["inputs"]["seed"])
    shape = tuple(kept["inputs"]["shape"])
    student, teacher = 2 * rng.standard_normal(shape), 3 * rng.standard_normal(shape)
    labels, auxiliary = rng.integers(0, shape[1], shape[0]), 2 * rng.standard_normal(shape)
    arrays = {"student_logits": student, "teacher_logits": teacher, "labels": labels, "auxiliary_logits": auxiliary}
    gradients = [{k: np.array(v) for k, v in g.items()} for g in kept["gradients"]]
    return arrays, list(zip(kept["cases"], kept["values"], gradients, strict=True))


def short_run(method: ModuleType, setting: str = "blobs", examples: int = 1280, **hp: Any) -> tuple[Student, Run, Classification]:
    """``distill`` with a small budget, the card's defaults and ``hp`` over them."""
    about = image_classification.CARD.settings[setting]
    seeds = seeds_by_role(0)
    problem = image_classification.SUITE.problem(TrainContext(setting, about, seeds))
    run = Run(seeds=seeds, budget=Budget(student_examples=examples), training=about.training, oracles=[problem.teacher])
    defaults = {name: h.default for name, h in method.CARD.hyperparameters.items()}
    return method.distill(problem, run, **{**defaults, **hp}), run, problem
