"""Proof of tvd_draft: numpy oracle, the identities of Goel et al. 2024, and what batches may not change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from torch import Tensor, nn

from distillbench.methods.language_modeling import scratch, tvd_draft
from distillbench.methods.language_modeling.tvd_draft import exact_loss, reward_deviation, reward_mean, sampled_loss
from distillbench.problems.language_modeling.models import LanguageModel
from distillbench.runs.suite import JudgeContext
from distillbench.suites import language_modeling
from tests.keyed import stream
from tests.methods.language_modeling.policy import MARKOV, by_logits, captured, logits, short_run
from tests.oracles.differences import gradient
from tests.oracles.language_modeling import tvd_draft as oracle

VOCAB = 7


class Identity(LanguageModel):
    """States are logits."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(VOCAB), requires_grad=False)

    @property
    def head(self) -> tuple[Tensor, Tensor | None]:
        return self.weight, None


def draw(rows: int = 70, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """More rows than a chunk."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, VOCAB)), 2 * rng.standard_normal((rows, VOCAB))


def tensor(x: np.ndarray) -> Tensor:
    return torch.tensor(x, dtype=torch.float32)


def exact(s: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses, rewards, and the gradient of each loss in its row."""
    x = tensor(s).requires_grad_(True)
    loss, reward = exact_loss(Identity(), Identity(), x, tensor(t), VOCAB)
    return loss.detach().numpy(), reward.numpy(), torch.autograd.grad(loss.sum(), x)[0].numpy()


def test_value_rewards_and_gradient_equal_the_oracle() -> None:
    s, t = draw()
    value, reward, slope = exact(s, t)
    np.testing.assert_allclose(value, oracle.tvd(s, t), atol=1e-6)
    np.testing.assert_allclose(reward, (softmax(s, axis=1) * oracle.rewards(s, t)).sum(1), atol=1e-6)
    np.testing.assert_allclose(slope, gradient(lambda z: oracle.tvd(z, t), s), atol=1e-6)


def test_1_the_gradient_of_tvd_is_the_policy_gradient_with_reward_where_q_is_below_p() -> None:
    s, t = draw()
    np.testing.assert_allclose(exact(s, t)[2], oracle.policy_gradient(s, t, 0.0, 1.0), atol=1e-6)


def test_2_and_3_tvd_plus_with_the_exact_expectation_is_the_gradient_of_tvd_over_one_sigma() -> None:
    s, t = draw()
    mean, deviation = oracle.moments(s, t)
    _, reward, slope = exact(s, t)
    assert reward.mean() == pytest.approx(mean, rel=1e-5)
    assert reward_deviation(mean) == pytest.approx(deviation, rel=1e-12)
    np.testing.assert_allclose(slope / reward_deviation(mean), oracle.policy_gradient(s, t, mean, deviation), atol=1e-5)
    np.testing.assert_allclose(oracle.policy_gradient(s, t, mean, 1.0), oracle.policy_gradient(s, t, 0.9, 1.0), atol=1e-12)


def test_the_surrogate_of_the_sheet_has_the_same_gradient() -> None:
    s, t = draw(5)
    mean, deviation = oracle.moments(s, t)
    x = torch.tensor(s, requires_grad=True)
    log_q, r = x.log_softmax(1), torch.tensor(oracle.rewards(s, t))
    surrogate = -((log_q.exp() * (r - mean) / deviation).detach() * log_q).sum()
    found = torch.autograd.grad(surrogate, x)[0].numpy()
    np.testing.assert_allclose(exact(s, t)[2] / reward_deviation(mean), found, atol=1e-5)


def sampled_gradients(s: np.ndarray, t: np.ndarray, mean: float) -> tuple[np.ndarray, np.ndarray]:
    """The gradient for every draw v of a row, (V, N, V), and the chances of the draws (N, V)."""
    q = softmax(s, axis=1)
    middle = q.cumsum(1) - q / 2
    found = []
    for v in range(VOCAB):
        x = tensor(s).requires_grad_(True)
        loss, reward = sampled_loss(Identity(), Identity(), x, tensor(t), torch.tensor(middle[:, v]), mean, VOCAB)
        np.testing.assert_array_equal(reward.numpy(), oracle.rewards(s, t)[:, v])
        found.append(torch.autograd.grad(loss.sum(), x)[0].numpy())
    return np.array(found), q


@pytest.mark.parametrize("mean", [0.0, 0.4])
def test_one_draw_a_token_has_the_exact_gradient_on_average(mean: float) -> None:
    s, t = draw()
    found, q = sampled_gradients(s, t, mean)
    np.testing.assert_allclose(np.einsum("vnk,nv->nk", found, q), exact(s, t)[2], atol=1e-6)


def test_the_mean_reward_lowers_the_variance_of_one_draw() -> None:
    s, t = draw(300)
    mean = oracle.moments(s, t)[0]
    with_mean, without = (
        float(np.einsum("vnk,nv->", found**2, q)) for found, q in (sampled_gradients(s, t, mean), sampled_gradients(s, t, 0.0))
    )
    assert with_mean < 0.8 * without


def test_4_and_6_tvd_is_1_minus_acceptance_and_below_the_root_of_half_of_either_kl() -> None:
    s, t = draw(200)
    p, q = softmax(t, axis=1), softmax(s, axis=1)
    value = by_logits(torch.tensor(s), torch.tensor(t), "tv").numpy()
    accepted = (q * np.minimum(1, p / q)).sum(1)
    np.testing.assert_allclose(value, 1 - accepted, atol=1e-12)
    assert ((value >= 0) & (value <= 1)).all()
    for kl in (rel_entr(p, q).sum(1), rel_entr(q, p).sum(1)):
        assert (value <= np.sqrt(kl / 2)).all()


def test_5_at_match_there_is_no_reward_no_gradient_and_no_division_by_zero() -> None:
    s, _ = draw()
    value, reward, slope = exact(s, s)
    assert not value.any()
    assert not reward.any()
    assert not slope.any()
    assert reward_deviation(0.0) == reward_deviation(1.0) == tvd_draft.FLOOR


def test_the_sigma_of_an_update_is_that_of_the_whole_batch_before() -> None:
    problem, run, loss, batches = captured(tvd_draft)
    drawn = stream(batches)
    batch = next(drawn)
    s, t, _ = logits(problem, batch)
    terms = loss(batch)
    assert terms["tvd_plus"].item() == pytest.approx(oracle.tvd(s, t).mean() / 0.5, rel=1e-5)
    assert terms["reward"].item() == pytest.approx(oracle.moments(s, t)[0], rel=1e-5)
    run.state["reward"] = oracle.moments(s, t)[0]
    assert loss(batch)["tvd_plus"].item() == pytest.approx(oracle.tvd(s, t).mean() / oracle.moments(s, t)[1], rel=1e-5)


def test_training_keeps_the_reward_of_its_last_batch() -> None:
    _, run, _ = short_run(tvd_draft, examples=64)
    assert run.state["reward"] == pytest.approx(run.trace["fit/reward"][-1], rel=1e-4)
    assert 0 < run.state["reward"] < 1


@pytest.mark.parametrize("objective", ["tvd_plus", "tvd_plus_sampled"])
def test_micro_batches_change_nothing(objective: str) -> None:
    whole, parts = (short_run(tvd_draft, examples=128, micro_batches=n, objective=objective)[0].weights for n in (1, 4))
    for name, weight in whole.items():
        torch.testing.assert_close(weight, parts[name], rtol=1e-3, atol=1e-4)


def test_plain_tvd_and_no_pretraining_by_default() -> None:
    problem, _, loss, batches = captured(tvd_draft, objective="tvd")
    batch = next(stream(batches))
    s, t, _ = logits(problem, batch)
    assert loss(batch)["tvd"].item() == pytest.approx(oracle.tvd(s, t).mean(), rel=1e-5)
    assert "pretraining" not in short_run(tvd_draft, examples=64)[1].cost()["phases"]


def test_pretraining_spends_its_share_of_the_budget_on_the_references() -> None:
    _, run, _ = short_run(tvd_draft, examples=640, pretraining=0.3)
    cost = run.cost()
    assert cost["phases"]["pretraining"]["student_examples"] == 192
    assert cost["phases"]["pretraining"]["teacher_examples"] == 0
    assert cost["total"]["student_examples"] == 640


def test_mean_of_probabilities_is_a_chance() -> None:
    s, t = draw()
    mean = reward_mean(torch.tensor(s), torch.tensor(t))
    assert ((mean >= 0) & (mean < 1)).all()


def test_training_is_accepted_more_often_than_training_on_references() -> None:
    def acceptance(method: object) -> float:
        student, run, _ = short_run(method, examples=6400)  # type: ignore[arg-type]
        scores = language_modeling.SUITE.evaluate(student, JudgeContext("markov", MARKOV, run.seeds, split="tune")).measurements
        return next(m.value for m in scores if m.metric == "acceptance")

    assert acceptance(tvd_draft) > acceptance(scratch) + 0.03
