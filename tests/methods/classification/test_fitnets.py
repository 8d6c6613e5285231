"""FitNets: the sheet's identities, the benchmark's regressor, parity with its code, and the algorithm on a short run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from distillbench.errors import UserError
from distillbench.methods.classification.fitnets import CARD, hint_loss, pick, regressor
from distillbench.problems.classification.losses import cross_entropy
from tests.methods.classification.tracks import distilled, track
from tests.oracles.classification import fitnets as oracle
from tests.oracles.differences import gradient

GOLDEN = Path(__file__).parents[2] / "goldens" / "fitnets.json"


def pair(shape: tuple[int, ...] = (3, 2, 4, 4), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape), rng.standard_normal(shape)


@pytest.mark.parametrize("shape", [(3, 2, 4, 4), (5, 7)])
def test_value_and_gradient_against_the_oracle(shape: tuple[int, ...]) -> None:
    s, t = pair(shape)
    ours = torch.tensor(s, requires_grad=True)
    loss = hint_loss(ours, torch.tensor(t))
    np.testing.assert_allclose(loss.detach(), oracle.hint_loss(s, t), rtol=1e-10)
    loss.sum().backward()
    np.testing.assert_allclose(ours.grad, gradient(lambda x: oracle.hint_loss(x, t), s), rtol=1e-6, atol=1e-9)


def test_1_zero_with_zero_gradient_at_match() -> None:
    s = torch.tensor(pair()[0], requires_grad=True)
    loss = hint_loss(s, s.detach().clone())
    loss.sum().backward()
    assert loss.tolist() == [0, 0, 0]
    assert s.grad is not None
    assert not s.grad.any()


def test_2_relation_to_the_papers_half_squared_distance() -> None:
    s, t = (torch.tensor(x) for x in pair())
    elements = s[0].numel()
    paper = 0.5 * (s - t).flatten(1).norm(dim=1) ** 2
    torch.testing.assert_close(hint_loss(s, t) * elements / 2, paper, rtol=1e-12, atol=0)
    torch.testing.assert_close(100 * hint_loss(s, t), 200 / elements * paper, rtol=1e-12, atol=0)


def test_3_a_relu_regressor_cannot_pass_the_floor_of_a_signed_target() -> None:
    target = torch.tensor(pair((4, 3, 4, 4))[1])
    best = target.clamp(min=0)  # the best non-negative prediction there is
    floor = target.clamp(max=0).square().flatten(1).mean(1)
    torch.testing.assert_close(hint_loss(best, target), floor, rtol=1e-12, atol=0)
    made = regressor(torch.Size((2, 4, 4)), torch.Size((3, 4, 4))).double()(torch.randn(4, 2, 4, 4, dtype=torch.float64))
    assert (hint_loss(made, target) >= floor).all()
    vector = regressor(torch.Size((8,)), torch.Size((5,)))(torch.randn(64, 8))
    assert (vector < 0).any(), "vectors get a linear regressor, which has no floor"


def test_4_scaling_the_student_feature_changes_nothing_behind_the_batch_norm() -> None:
    torch.manual_seed(0)
    regress = regressor(torch.Size((2, 4, 4)), torch.Size((3, 4, 4))).double().train()
    nn.init.zeros_(regress[0].bias)
    s, t = torch.randn(8, 2, 4, 4, dtype=torch.float64), torch.randn(8, 3, 4, 4, dtype=torch.float64)
    for factor in (3.0, 50.0):
        torch.testing.assert_close(hint_loss(regress(factor * s), t), hint_loss(regress(s), t), rtol=1e-4, atol=1e-4)


def test_5_without_the_hint_it_is_plain_training_bit_for_bit() -> None:
    student, _, _ = distilled("fitnets", hint_weight=0)
    problem, run = track()
    plain = run.fit(problem.student, lambda b: run.loss(b, ce=cross_entropy(problem.student(b.inputs), b.labels)), problem.batches)
    for name, value in plain.weights.items():
        assert torch.equal(student.weights[name], value), name


def test_6_the_linear_minimiser_is_least_squares() -> None:
    rng = np.random.default_rng(6)
    v, u = rng.standard_normal((40, 5)), rng.standard_normal((40, 3))
    best, *_ = np.linalg.lstsq(v, u, rcond=None)
    weights = torch.tensor(best, requires_grad=True)
    loss = hint_loss(torch.tensor(v) @ weights, torch.tensor(u)).mean()
    loss.backward()
    assert loss.item() == pytest.approx(float(np.mean((u - v @ best) ** 2)), rel=1e-12)
    assert weights.grad is not None
    assert weights.grad.abs().max() < 1e-15


def test_the_regressor_and_the_loss_are_those_of_the_benchmark() -> None:
    golden = json.loads(GOLDEN.read_text())
    for case, value, slope in zip(golden["cases"], golden["values"], golden["gradients"], strict=True):
        rng = np.random.default_rng(case["seed"])
        s, t = rng.standard_normal((3, 2, 4, 4)), rng.standard_normal((3, 3, *case["teacher"]))
        regress = regressor(torch.Size((2, 4, 4)), torch.Size((3, *case["teacher"]))).double().train()
        assert list(regress[0].weight.shape) == case["kernel"]
        for parameter in regress.parameters():
            parameter.data = torch.tensor(rng.standard_normal(tuple(parameter.shape)))
        ours = torch.tensor(s, requires_grad=True)
        loss = hint_loss(regress(ours), torch.tensor(t)).mean()
        loss.backward()
        assert loss.item() == pytest.approx(value, rel=1e-12)
        assert ours.grad is not None
        np.testing.assert_allclose(ours.grad.flatten(), slope, rtol=1e-8, atol=1e-12)


def test_shapes_without_a_regressor_are_told() -> None:
    with pytest.raises(UserError, match="4x4 map to a 9x9"):
        regressor(torch.Size((2, 4, 4)), torch.Size((3, 9, 9)))
    with pytest.raises(UserError, match="vector to a map"):
        regressor(torch.Size((7,)), torch.Size((3, 9, 9)))


def test_the_hint_index_counts_from_the_stem_and_stops_at_the_last_stage() -> None:
    stages = tuple(torch.tensor(float(i)) for i in range(4))
    assert [float(pick(stages, i)) for i in (0, 2, 3, 9)] == [0, 2, 3, 3]


@pytest.mark.parametrize("setting", ["blobs", "digits"])
def test_two_stages_share_one_budget(setting: str) -> None:
    student, problem, run = distilled("fitnets", setting, examples=640, two_stage=True)
    assert run.meter.counts["student_examples"] == 640
    assert {n: b["student_examples"] for n, b in run.phases.items() if b["student_examples"]}["hint"] == 320
    assert set(student.weights) == set(problem.student.state_dict()), "the regressor stays behind"
    assert set(run.trace) == {"hint/hint", "fit/ce", "fit/kd"}


def test_the_regressor_starts_alike_whatever_ran_before() -> None:
    torch.manual_seed(1)
    first, _, _ = distilled("fitnets", examples=256)
    torch.manual_seed(2)
    second, _, _ = distilled("fitnets", examples=256)
    assert all(torch.equal(first.weights[n], second.weights[n]) for n in first.weights)
    assert CARD.hyperparameters["hint_weight"].default == 100
