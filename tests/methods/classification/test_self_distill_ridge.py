"""Self-distillation in ridge regression: the closed forms are the oracle, the authors' toy is the golden."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from distillbench.methods.classification.self_distill_ridge import kernel_coefficients, limit, optimal_truth_weight, ridge_weights
from distillbench.suites.image_classification.nets import rebuild
from distillbench.training.nets import head, outputs_of
from tests.methods.classification.tracks import distilled, track
from tests.oracles.classification import self_distill_ridge as oracle

GOLDEN = json.loads((Path(__file__).parents[2] / "goldens" / "self_distill_ridge.json").read_text())
RIDGE = 0.2
X = torch.arange(11, dtype=torch.float64)[:, None] / 10
Y = torch.tensor(GOLDEN["y"], dtype=torch.float64)[:, None]
GRID = torch.arange(101, dtype=torch.float64)[:, None] / 100


def kernel(a: torch.Tensor, b: torch.Tensor = X) -> torch.Tensor:
    return torch.exp(-80 * (a - b.T) ** 2)


K = kernel(X)
A = K @ torch.linalg.inv(K + RIDGE * torch.eye(11, dtype=K.dtype))


def fitted(alpha: float, rounds: int) -> torch.Tensor:
    """y_t on the training inputs."""
    return K @ kernel_coefficients(K, Y, ridge=RIDGE, truth_weight=alpha, rounds=rounds)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.35, 0.9, 1.0])
@pytest.mark.parametrize("rounds", [1, 2, 5, 30])
def test_3_against_the_closed_form_in_eigenvalues(alpha: float, rounds: int) -> None:
    given = {"ridge": RIDGE, "truth_weight": alpha, "rounds": rounds}
    expected = oracle.predictions(K.numpy(), Y.numpy(), **given)  # type: ignore[arg-type]
    np.testing.assert_allclose(fitted(alpha, rounds), expected, rtol=1e-10, atol=1e-14)
    ours = kernel_coefficients(K, Y, **given)  # type: ignore[arg-type]
    np.testing.assert_allclose(ours, oracle.kernel_coefficients(K.numpy(), Y.numpy(), **given), rtol=1e-9, atol=1e-12)  # type: ignore[arg-type]


def test_1_constant_weight_in_powers_of_a_matrix() -> None:
    for alpha in (0.1, 0.35, 0.8):
        m = (1 - alpha) * A
        for t in (1, 2, 3, 7):
            series = sum((torch.linalg.matrix_power(m, s) for s in range(t - 1)), torch.zeros_like(m))
            expected = torch.linalg.matrix_power(m, t - 1) @ A @ Y + alpha * A @ series @ Y
            torch.testing.assert_close(fitted(alpha, t), expected, rtol=1e-11, atol=1e-14)


def test_2_varying_weights_compose_round_by_round() -> None:
    alphas = [None, 0.3, 0.7, 0.1]  # of rounds 1 to 4; the first does not matter
    previous = Y
    for alpha in alphas:
        mixed = Y if alpha is None else alpha * Y + (1 - alpha) * previous
        previous = K @ kernel_coefficients(K, mixed, ridge=RIDGE, truth_weight=1.0, rounds=1)
    total = len(alphas)
    left = [1 - a for a in alphas if a is not None]
    expected = float(np.prod(left)) * torch.linalg.matrix_power(A, total) @ Y
    for i in range(2, total + 1):
        after = float(np.prod([1 - a for a in alphas[i:] if a is not None]))
        weight = alphas[i - 1]
        assert weight is not None
        expected = expected + weight * after * torch.linalg.matrix_power(A, total - i + 1) @ Y
    torch.testing.assert_close(previous, expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("alpha", [0.1, 0.35, 1.0])
def test_4_the_limit_is_plain_ridge_with_more_regularisation(alpha: float) -> None:
    forever = K @ limit(K, Y, ridge=RIDGE, truth_weight=alpha)
    torch.testing.assert_close(fitted(alpha, 400), forever, rtol=1e-10, atol=1e-12)
    other = torch.linalg.solve(alpha * K + RIDGE * torch.eye(11, dtype=K.dtype), alpha * K @ Y)
    torch.testing.assert_close(forever, other, rtol=1e-10, atol=1e-13)
    assert not limit(K, Y, ridge=RIDGE, truth_weight=0.0).any()
    assert fitted(0.0, 3000).abs().max() < 1e-6


def test_5_the_error_falls_linearly() -> None:
    alpha = 0.35
    forever = K @ limit(K, Y, ridge=RIDGE, truth_weight=alpha)
    m = (1 - alpha) * A
    rate = (1 - alpha) * float(torch.linalg.eigvalsh(K).max() / (torch.linalg.eigvalsh(K).max() + RIDGE))
    for t in (1, 3, 8):
        torch.testing.assert_close(fitted(alpha, t) - forever, torch.linalg.matrix_power(m, t) @ (Y - forever), rtol=1e-9, atol=1e-13)
        assert (fitted(alpha, t) - forever).norm() <= rate**t * (Y - forever).norm()


def test_6_the_two_ends_of_the_weight() -> None:
    for t in (1, 2, 5):
        torch.testing.assert_close(fitted(0.0, t), torch.linalg.matrix_power(A, t) @ Y, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(fitted(1.0, t), A @ Y, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(fitted(0.0, 1), fitted(0.7, 1), rtol=1e-12, atol=0)  # the first round is the plain fit for any weight


def test_7_the_function_anywhere_follows_from_the_first_fit() -> None:
    inverse = torch.linalg.inv(K + RIDGE * torch.eye(11, dtype=K.dtype))
    for t in (2, 4):
        mixed = 0.35 * Y + 0.65 * fitted(0.35, t - 1)
        ours = kernel(GRID) @ kernel_coefficients(K, Y, ridge=RIDGE, truth_weight=0.35, rounds=t)
        torch.testing.assert_close(ours, kernel(GRID) @ inverse @ mixed, rtol=1e-10, atol=1e-12)


def test_8_the_best_weight_in_closed_form() -> None:
    truth = torch.sin(2 * torch.pi * GRID)

    def predicted(targets: torch.Tensor) -> torch.Tensor:
        return kernel(GRID) @ kernel_coefficients(K, targets, ridge=RIDGE, truth_weight=1.0, rounds=1)

    u, v = predicted(Y), predicted(fitted(0.35, 1))
    best = float(optimal_truth_weight(truth, u, v))
    assert best == pytest.approx(-0.6218, abs=5e-5)

    def error(alpha: float) -> float:
        return float((alpha * u + (1 - alpha) * v - truth).square().mean())

    assert error(best) < min(error(best - 1e-3), error(best + 1e-3))


def test_9_the_authors_toy() -> None:
    table = {
        "0.0": [0.16477, 0.15076, 0.14915, 0.15561, 0.16735, 0.18251, 0.49505],
        "0.35": [0.16477, 0.15424, 0.15089, 0.14983, 0.14954, 0.14948, 0.14959],
    }
    truth = torch.sin(2 * torch.pi * GRID)
    for name, golden in GOLDEN["values"].items():
        alpha = float(name)
        errors = []
        for t in range(1, 7):
            ours = kernel(GRID) @ kernel_coefficients(K, Y, ridge=RIDGE, truth_weight=alpha, rounds=t)
            np.testing.assert_allclose(ours.flatten()[::10], golden["predictions"][t - 1], rtol=1e-9, atol=1e-12)
            errors.append(float((ours - truth).square().mean()))
        forever = kernel(GRID) @ limit(K, Y, ridge=RIDGE, truth_weight=alpha)
        errors.append(float((forever - truth).square().mean()))
        assert errors == pytest.approx([*golden["errors"], golden["limit_error"]], rel=1e-9)
        if name in table:  # their README heads the second column 0.25; its numbers are those of 0.35
            assert [round(e, 5) for e in errors] == table[name]


def test_10_sparsification_is_not_monotone_with_ground_truth() -> None:
    d = np.linalg.eigvalsh(K.numpy())

    def ratios(alpha: float, rounds: int) -> list[float]:
        b = [oracle.shrinkage(d, ridge=RIDGE, truth_weight=alpha, rounds=t) for t in range(1, rounds + 1)]
        return [float(x[-1] / x[0]) for x in b]

    pure = ratios(0.0, 30)
    assert all(later > earlier for earlier, later in itertools.pairwise(pure))
    guided, weak = ratios(0.35, 200), ratios(0.1, 400)
    assert (1 + int(np.argmax(guided)), round(max(guided), 5), round(guided[-1], 5)) == (5, 2.98512, 2.95475)
    assert (1 + int(np.argmax(weak)), round(max(weak), 3), round(weak[-1], 3)) == (6, 6.444, 5.361)


def test_weight_space_is_the_same_function() -> None:
    rng = np.random.default_rng(27)
    for n, width in ((30, 7), (7, 30)):
        phi, y, x = (torch.tensor(rng.standard_normal(s)) for s in ((n, width), (n, 3), (5, width)))
        for rounds in (1, 4):
            given = {"ridge": 0.3, "truth_weight": 0.35, "rounds": rounds}
            dual = x @ phi.T @ kernel_coefficients(phi @ phi.T, y, **given)  # type: ignore[arg-type]
            torch.testing.assert_close(x @ ridge_weights(phi, y, **given), dual, rtol=1e-9, atol=1e-11)  # type: ignore[arg-type]


def test_trap_a_tiny_ridge_on_a_nearly_singular_kernel_stays_accurate() -> None:
    smooth = torch.exp(-0.5 * (X - X.T) ** 2)
    given = {"ridge": 1e-6, "truth_weight": 0.35, "rounds": 4}
    ours = smooth @ kernel_coefficients(smooth, Y, **given)  # type: ignore[arg-type]
    np.testing.assert_allclose(ours, oracle.predictions(smooth.numpy(), Y.numpy(), **given), rtol=1e-7, atol=1e-8)  # type: ignore[arg-type]


@pytest.mark.parametrize("setting", ["blobs", "digits"])
def test_the_exported_head_is_the_regression_and_the_teacher_is_never_asked(setting: str) -> None:
    student, problem, run = distilled("self_distill_ridge", setting, examples=2560, ridge=0.5, scale=7, rounds=3)
    assert run.meter.counts["teacher_examples"] == 0
    assert run.over_budget() is None
    assert problem.train is not None
    net = rebuild(student)
    own = problem.train.labelled
    seen = outputs_of(net, problem.train.inputs[own])
    phi = torch.cat([seen.embedding.double(), torch.ones(len(seen.embedding), 1, dtype=torch.float64)], dim=1).detach()
    y = torch.eye(problem.classes, dtype=torch.float64)[problem.train.labels[own]]
    fit = oracle.predictions((phi @ phi.T).numpy(), y.numpy(), ridge=0.5, truth_weight=0.35, rounds=3)
    np.testing.assert_allclose(seen.logits.detach().double(), 7 * fit, rtol=1e-3, atol=1e-4)
    before, _ = track(setting)
    assert not torch.equal(head(net).weight, head(before.student).weight)
