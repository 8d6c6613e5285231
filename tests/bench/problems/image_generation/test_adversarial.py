"""Discriminator heads and their losses against numpy."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from distillbench.problems.image_generation.adversarial import (
    Heads,
    hinge_critic_loss,
    hinge_generator_loss,
    logistic_critic_loss,
    logistic_generator_loss,
)
from tests.oracles.differences import gradient

REAL, FAKE = np.random.default_rng(0).standard_normal((2, 5, 3)) * 3


def softplus(x):
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


EXPECTED = {
    logistic_critic_loss: lambda r, f: (softplus(-r) + softplus(f)).mean(1),
    logistic_generator_loss: lambda f: softplus(-f).mean(1),
    hinge_critic_loss: lambda r, f: (np.maximum(1 - r, 0) + np.maximum(1 + f, 0)).mean(1),
    hinge_generator_loss: lambda f: -f.mean(1),
}


def tensors(*arrays):
    return [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in arrays]


@pytest.mark.parametrize("loss", EXPECTED, ids=lambda f: f.__name__)
def test_losses_are_numpys_in_value_and_gradient(loss):
    arrays = [REAL, FAKE] if "critic" in loss.__name__ else [FAKE]
    inputs = tensors(*arrays)
    value = loss(*inputs)
    assert value.shape == (5,)
    assert np.allclose(value.detach().numpy(), EXPECTED[loss](*arrays), rtol=1e-12)
    value.sum().backward()
    for i, array in enumerate(arrays):
        numeric = gradient(lambda a, i=i: EXPECTED[loss](*arrays[:i], a, *arrays[i + 1 :]), array)
        assert np.allclose(inputs[i].grad.numpy(), numeric, atol=1e-8)


def test_a_critic_that_cannot_tell_is_at_two_ln_two_and_two():
    level = torch.zeros(4, 2, dtype=torch.float64)
    assert torch.allclose(logistic_critic_loss(level, level), torch.tensor(2 * np.log(2)))
    assert torch.allclose(hinge_critic_loss(level, level), torch.tensor(2.0, dtype=torch.float64))


def test_where_real_and_fake_are_one_distribution_nothing_beats_two_ln_two():
    """softplus(-D) + softplus(D) >= 2 ln 2 for every D, with equality at 0 alone."""
    d = torch.linspace(-4, 4, 81, dtype=torch.float64)[:, None]
    loss = logistic_critic_loss(d, d)
    assert int(loss.argmin()) == 40
    assert bool((loss >= 2 * np.log(2) - 1e-12).all())


def test_the_logistic_optimum_is_the_log_ratio_and_measures_jensen_shannon():
    """With D = log p - log q the critic's loss is 2 ln 2 - 2 JSD(p, q), and any shifted or scaled D is worse."""
    x = np.linspace(-12, 12, 20001)
    p, q = norm.pdf(x, 0.7, 0.5), norm.pdf(x, 0, 1)
    middle = (p + q) / 2

    def expected(d):
        d = torch.tensor(d)[:, None]
        low = torch.full_like(d, 1e9)  # softplus(-1e9) is 0: one term at a time
        on_real, on_fake = logistic_critic_loss(d, -low).numpy(), logistic_critic_loss(low, d).numpy()
        return float((p * on_real + q * on_fake).sum() * (x[1] - x[0]))

    log_ratio = norm.logpdf(x, 0.7, 0.5) - norm.logpdf(x, 0, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        jensen = np.nansum(p * np.log(p / middle) + q * np.log(q / middle)) * (x[1] - x[0]) / 2
    assert expected(log_ratio) == pytest.approx(2 * np.log(2) - 2 * jensen, rel=1e-9)
    assert min(expected(log_ratio + 0.2), expected(1.2 * log_ratio), expected(-log_ratio)) > expected(log_ratio)


@pytest.mark.parametrize("critic", [logistic_critic_loss, hinge_critic_loss])
def test_a_descent_step_of_the_critic_raises_real_and_lowers_fake(critic):
    real, fake = tensors(np.zeros((3, 2)), np.zeros((3, 2)))
    critic(real, fake).sum().backward()
    assert bool((real.grad < 0).all())
    assert bool((fake.grad > 0).all())


@pytest.mark.parametrize("generator", [logistic_generator_loss, hinge_generator_loss])
def test_a_descent_step_of_the_generator_raises_its_logit(generator):
    [fake] = tensors(np.zeros((3, 2)))
    generator(fake).sum().backward()
    assert bool((fake.grad < 0).all())


def test_logits_far_out_stay_finite():
    far = torch.tensor([[1e4, -1e4]], dtype=torch.float32)
    assert float(logistic_critic_loss(far, -far)) == pytest.approx(1e4)
    assert float(logistic_generator_loss(far)) == pytest.approx(5e3)


# --- the heads ---


@pytest.mark.parametrize("shape", [(6, 16), (6, 16, 4, 4)])
def test_heads_give_a_logit_for_every_stage_and_row(shape):
    torch.manual_seed(0)
    stages = [torch.randn(shape), torch.randn(6, 8, *shape[2:])]
    heads = Heads(stages, width=16)
    logits = heads(stages)
    assert logits.shape == (6, 2)
    assert torch.allclose(heads([s[2:4] for s in stages]), logits[2:4], atol=1e-6)  # no row sees another
    changed = heads([stages[0], stages[1] + 1])
    assert torch.equal(changed[:, 0], logits[:, 0])
    assert not torch.allclose(changed[:, 1], logits[:, 1])


def test_a_vector_is_a_map_of_one_pixel_and_positions_are_averaged():
    torch.manual_seed(0)
    vector = torch.randn(5, 16)
    heads = Heads([vector], width=16)
    assert torch.equal(heads([vector]), heads([vector[:, :, None, None]]))
    one = torch.randn(5, 16, 2, 3)
    mirrored = one.flip(2, 3)
    assert torch.allclose(heads([one]), heads([mirrored]), atol=1e-6)


def test_every_weight_of_the_heads_and_every_stage_gets_a_gradient():
    torch.manual_seed(0)
    stages = [torch.randn(5, 16, 3, 3, requires_grad=True), torch.randn(5, 16, requires_grad=True)]
    heads = Heads(stages, width=16)
    hinge_generator_loss(heads(stages)).sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in heads.parameters())
    assert all(float(s.grad.abs().sum()) > 0 for s in stages)


def test_another_number_of_stages_is_refused():
    stages = [torch.randn(5, 16), torch.randn(5, 16)]
    with pytest.raises(ValueError, match="zip"):
        Heads(stages, width=16)(stages[:1])
