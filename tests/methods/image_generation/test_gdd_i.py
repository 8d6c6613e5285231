"""GDD and GDD-I: the numbered identities, an independent oracle, and the gradients that the authors' code gives."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import nn

from distillbench.cards.card import Budget, Training
from distillbench.errors import UserError
from distillbench.methods.image_generation import gdd_i
from distillbench.methods.image_generation.gdd_i import body, critic_loss, generator_loss, r1_penalty
from distillbench.runs.identities import seeds_by_role
from distillbench.suites import image_generation as suite
from distillbench.suites.image_generation.nets import build
from distillbench.training.nets import Architecture
from distillbench.training.run import Run
from tests.oracles import differences
from tests.oracles.image_generation import gdd_i as oracle

GOLDEN = json.loads((Path(__file__).parents[2] / "goldens" / "gdd_i.json").read_text())


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


# --- the oracle ---


def test_losses_and_their_gradients_match_the_independent_oracle():
    rng = np.random.default_rng(0)
    real, fake = 3 * rng.standard_normal((2, 5, 3))
    for ours, theirs in (
        (generator_loss, oracle.generator_loss),
        (lambda f: critic_loss(tensor(real), f), lambda f: oracle.critic_loss(real, f)),
        (lambda r: critic_loss(r, tensor(real)), lambda r: oracle.critic_loss(r, real)),
    ):
        point = tensor(fake).requires_grad_(True)
        value = ours(point)
        assert np.allclose(value.detach().numpy(), theirs(fake), rtol=1e-10)
        [slope] = torch.autograd.grad(value.sum(), point)
        assert np.allclose(slope.numpy(), differences.gradient(theirs, fake), rtol=1e-6, atol=1e-9)


def test_r1_matches_the_independent_oracle():
    rng = np.random.default_rng(1)
    y, w = tensor(rng.standard_normal((4, 2, 3))).requires_grad_(True), tensor(rng.standard_normal((3, 6)))
    logits = torch.sin(y.flatten(1)) @ w.T  # head k: sum_j w_kj sin y_j, whose slope is w_kj cos y_j
    slopes = w.numpy()[None] * np.cos(y.detach().numpy().reshape(4, 1, 6))
    assert np.allclose(r1_penalty(logits, y, gamma=0.3).detach().numpy(), oracle.r1_penalty(slopes, 0.3), rtol=1e-10)


# --- the identities ---


def test_1_where_real_and_fake_agree_every_head_counts_2_ln_2_and_ln_2():
    zero = torch.zeros(4, 3, dtype=torch.float64)
    assert torch.allclose(critic_loss(zero, zero), tensor([3 * 2 * math.log(2)] * 4))
    assert torch.allclose(generator_loss(zero), tensor([3 * math.log(2)] * 4))


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("ratio", [0.05, 1.0, 7.0])
def test_2_the_best_logit_of_each_head_is_the_log_density_ratio(ratio, heads):
    off = torch.full((1, heads), -200.0, dtype=torch.float64)

    def expected(logit):
        one = torch.full((1, heads), logit, dtype=torch.float64)
        return ratio * float(critic_loss(one, off)) + float(critic_loss(-off, one))

    best = minimize_scalar(expected, bounds=(-20, 20), method="bounded", options={"xatol": 1e-10}).x
    assert best == pytest.approx(math.log(ratio), abs=1e-5)


def test_2_the_generator_follows_the_logit_most_where_it_is_found_out():
    logits = tensor([[-3.0, 0.0, 4.0]]).requires_grad_(True)
    [slope] = torch.autograd.grad(generator_loss(logits).sum(), logits)
    assert np.allclose(slope.numpy(), -1 / (1 + np.exp([[-3.0, 0.0, 4.0]])), rtol=1e-12)


def problem_of(setting="digits", batches=3):
    found = suite.CARD.settings[setting]
    problem = suite.problem(setting, found, seeds_by_role(0))
    size = found.training.batch_size
    training = Training(batch_size=size, optimizer="adamw", learning_rate=1e-3)
    run = Run(seeds=seeds_by_role(0), budget=Budget(student_examples=size * batches), training=training, oracles=[problem.teacher])
    return problem, run


def distil(problem, run, **changed):
    hyper = {name: h.default for name, h in gdd_i.CARD.hyperparameters.items()}
    return gdd_i.distill(problem, run, **{**hyper, **changed})


def test_3_and_7_what_is_frozen_stays_the_teachers_bit_for_bit_and_no_answer_of_the_teacher_is_used(monkeypatch):
    problem, run = problem_of()
    monkeypatch.setattr(type(problem.teacher), "denoise", lambda *_, **__: pytest.fail("the teacher was asked for an answer"))
    before = problem.teacher.trainable_copy().state_dict()
    student = distil(problem, run)
    held = {name for name, value in student.weights.items() if torch.equal(value, before[name])}
    assert set(body(problem.student)) == held
    assert held == {f"blocks.{i}.{layer}.{kind}" for i in range(3) for layer in ("widen", "project") for kind in ("weight", "bias")}
    trained = sum(v.numel() for k, v in before.items() if k not in held)
    assert sum(p.numel() for p in problem.student.parameters() if p.requires_grad) == trained < sum(v.numel() for v in before.values())


def test_3_without_freezing_all_is_trained():
    problem, run = problem_of(batches=2)
    before = problem.teacher.trainable_copy().state_dict()
    student = distil(problem, run, freeze=False)
    assert not any(torch.equal(value, before[name]) for name, value in student.weights.items())


def test_3_a_network_without_such_layers_is_refused_in_one_line():
    with pytest.raises(UserError, match="freeze=false"):
        body(nn.Linear(2, 2))


def test_3_the_authors_layers_of_a_u_net_are_found():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("norm0", "conv0", "affine", "norm1", "conv1", "skip", "norm2", "qkv", "proj"):
                setattr(self, name, nn.Linear(1, 1, bias=False))

    net = nn.Module()
    net.enc = nn.ModuleDict({"8x8_conv": nn.Linear(1, 1, bias=False), "8x8_block0": Block()})
    assert body(net) == [f"enc.8x8_block0.{layer}.weight" for layer in ("conv0", "conv1", "proj")]


def test_4_r1_of_a_linear_discriminator_is_its_squared_norm_whatever_the_data():
    w = tensor([[0.5, -1.0, 2.0], [0.1, 0.2, -0.3]]).requires_grad_(True)
    y = tensor(np.random.default_rng(2).standard_normal((5, 3))).requires_grad_(True)
    penalty = r1_penalty(y @ w.T, y, gamma=0.7)
    expected = 0.35 * float((w.detach().sum(0) ** 2).sum())
    assert torch.allclose(penalty, torch.full_like(penalty, expected), rtol=1e-12)
    [slope] = torch.autograd.grad(penalty.mean(), w)
    assert torch.allclose(slope, 0.7 * w.sum(0).expand(2, 3), rtol=1e-12)


@pytest.mark.parametrize(("mean", "spread", "stationary"), [(0.4, 0.8, True), (0.5, 0.8, False), (0.4, 0.7, False)])
def test_5_a_quadratic_discriminator_rests_at_zero_where_two_moments_match_and_nowhere_else(mean, spread, stationary):
    node, weight = np.polynomial.hermite_e.hermegauss(20)
    weight, z = tensor(weight / weight.sum()), tensor(node)
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def logits(x):
        return (w[0] * x + w[1] * x**2)[:, None]

    [slope] = torch.autograd.grad((weight * critic_loss(logits(0.4 + 0.8 * z), logits(mean + spread * z))).sum(), w)
    assert (float(slope.abs().max()) < 1e-10) is stationary


def test_6_at_the_start_the_generator_gives_almost_the_mean_of_the_data():
    net = build(Architecture("gaussian-mixture", {"means": [[0.7, -0.2]], "std": 0.5}), 0)
    z = tensor(np.random.default_rng(3).standard_normal((50, 2)))
    x = net(80 * z, torch.full((50,), 80.0, dtype=torch.float64))
    m, kept = tensor([0.7, -0.2]), 0.25 / (0.25 + 6400)
    assert torch.allclose(x, m + kept * (80 * z - m), rtol=1e-12)
    assert torch.allclose(x.std(0) / z.std(0), tensor([kept * 80] * 2), rtol=1e-9)


# --- the authors' code ---


def heads(x, w, b):
    return w * torch.stack([x.mean((1, 2, 3)), (x**2).mean((1, 2, 3)), torch.sin(x).mean((1, 2, 3))], 1) + b


def setup():
    i = GOLDEN["inputs"]
    w, b = (tensor(i[k]).requires_grad_(True) for k in ("w", "b"))
    affine = tensor(i["block_affine"]).requires_grad_(True)
    made = {k: torch.tanh(i["block_conv"] * 80 * tensor(z)) + affine for k, z in i["noise"].items()}
    return tensor(i["images"]), made, w, b, affine


def test_the_generators_gradient_equals_the_authors():
    _, made, w, b, affine = setup()
    [slope] = torch.autograd.grad(generator_loss(heads(made["generator"], w, b)).mean(), affine)
    expected = GOLDEN["gradients"]["generator"]
    assert slope.item() == pytest.approx(expected["block_affine"], rel=1e-10)
    assert set(expected) == {"block_affine"}  # their freezing leaves block_conv without a gradient


def test_the_critics_gradient_equals_the_authors():
    images, made, w, b, _ = setup()
    slopes = torch.autograd.grad(critic_loss(heads(images, w, b), heads(made["critic"].detach(), w, b)).mean(), (w, b))
    for slope, name in zip(slopes, "wb", strict=True):
        assert torch.allclose(slope, tensor(GOLDEN["gradients"]["critic"][name]), rtol=1e-10)


def test_the_gradient_of_r1_equals_the_authors():
    images, _, w, b, _ = setup()
    images.requires_grad_(True)
    penalty = r1_penalty(heads(images, w, b), images, gamma=GOLDEN["inputs"]["gamma"])
    [slope] = torch.autograd.grad(penalty.mean(), w)
    assert torch.allclose(slope, tensor(GOLDEN["gradients"]["r1"]["w"]), rtol=1e-10)
    assert gdd_i.CARD.hyperparameters["gamma"].default == GOLDEN["inputs"]["gamma"]


# --- the method ---
