"""Proof of dist: numpy oracle, the identities of Huang et al. 2022, and numbers of the authors' code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distillbench.methods.classification import dist
from distillbench.methods.classification.dist import correlation, inter_class_loss, intra_class_loss
from tests.methods.classification.proof import assert_equals_oracle, draw, golden, gradient, short_run, tensors
from tests.oracles.classification import dist as oracle

PAIR = ("student_logits", "teacher_logits")


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("name", ["inter_class_loss", "intra_class_loss"])
def test_value_and_gradient_equal_the_oracle(name: str, temperature: float) -> None:
    assert_equals_oracle(getattr(dist, name), getattr(oracle, name), "student_logits", PAIR, temperature=temperature)


def test_the_oracle_is_pearsons_correlation() -> None:
    a = draw(rows=4)
    numpys = [np.corrcoef(u, v)[0, 1] for u, v in zip(a["student_logits"], a["teacher_logits"], strict=True)]
    np.testing.assert_allclose(oracle.correlation(a["student_logits"], a["teacher_logits"]), numpys, atol=1e-7)


def test_numbers_of_the_authors_code() -> None:
    arrays, cases = golden("dist")
    x = tensors(arrays, *PAIR)

    def total(beta: float, gamma: float, temperature: float, **k: torch.Tensor) -> torch.Tensor:
        return beta * inter_class_loss(**k, temperature=temperature).mean() + gamma * intra_class_loss(**k, temperature=temperature)

    for hp, value, gradients in cases:
        assert total(**hp, **x).item() == pytest.approx(value, rel=1e-12)
        ours = gradient(lambda hp=hp, **k: total(**hp, **k), x, "student_logits")
        np.testing.assert_allclose(ours, gradients["student_logits"], rtol=1e-9, atol=1e-13)


def test_1_distance_is_0_to_itself_2_to_the_opposite_and_between() -> None:
    a, b = (torch.tensor(z) for z in (draw()["student_logits"], draw()["teacher_logits"]))
    assert (1 - correlation(a, a)).abs().max() < 1e-8
    assert (1 - correlation(a, -a) - 2).abs().max() < 1e-8
    assert ((correlation(a, b) >= -1) & (correlation(a, b) <= 1)).all()


def test_2_positive_affine_maps_change_nothing() -> None:
    a, b = (torch.tensor(z) for z in (draw()["student_logits"], draw()["teacher_logits"]))
    torch.testing.assert_close(correlation(3 * a + 1, 0.5 * b - 2), correlation(a, b), rtol=0, atol=1e-7)


def test_3_scaling_logits_does_change_it() -> None:
    x = tensors(draw(), *PAIR)
    twice = {**x, "student_logits": 2 * x["student_logits"]}
    assert (inter_class_loss(**twice, temperature=1.0) - inter_class_loss(**x, temperature=1.0)).abs().max() > 1e-3


def test_4_it_is_half_the_squared_distance_of_centred_unit_vectors() -> None:
    a, b = (torch.tensor(z) for z in (draw()["student_logits"], draw()["teacher_logits"]))
    unit = [torch.nn.functional.normalize(z - z.mean(1, keepdim=True), dim=1) for z in (a, b)]
    torch.testing.assert_close(1 - correlation(a, b), ((unit[0] - unit[1]) ** 2).sum(1) / 2, rtol=0, atol=1e-8)


def test_5_with_two_classes_only_the_relation_across_the_batch_teaches() -> None:
    x = tensors(draw(classes=2), *PAIR)
    distance = inter_class_loss(**x, temperature=1.0)
    assert torch.minimum(distance, 2 - distance).abs().max() < 1e-5
    assert np.abs(gradient(lambda **k: inter_class_loss(**k, temperature=1.0), x, "student_logits")).max() < 1e-4
    assert np.abs(gradient(lambda **k: intra_class_loss(**k, temperature=1.0), x, "student_logits")).max() > 1e-2


def test_6_a_batch_of_one_has_no_relation_across_it() -> None:
    x = tensors(draw(rows=1), *PAIR)
    assert intra_class_loss(**x, temperature=2.0).item() == 4.0
    assert not gradient(lambda **k: intra_class_loss(**k, temperature=2.0), x, "student_logits").any()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_7_nearly_zero_at_match_and_1_for_a_uniform_student(temperature: float) -> None:
    teacher = torch.tensor(draw()["teacher_logits"])
    # The authors' 1e-8 beside the product of the norms leaves exactly 1e-8 / (|y - mean y|^2 + 1e-8).
    probabilities = (teacher / temperature).softmax(1)

    def rest(dim: int) -> torch.Tensor:
        norm = ((probabilities - probabilities.mean(dim, keepdim=True)) ** 2).sum(dim)
        return temperature**2 * 1e-8 / (norm + 1e-8)

    torch.testing.assert_close(inter_class_loss(teacher, teacher, temperature=temperature), rest(1), rtol=1e-6, atol=1e-14)
    torch.testing.assert_close(intra_class_loss(teacher, teacher, temperature=temperature), rest(0).mean(), rtol=1e-6, atol=1e-14)
    uniform = inter_class_loss(torch.zeros_like(teacher), teacher, temperature=temperature)
    torch.testing.assert_close(uniform, torch.full_like(uniform, temperature**2))


def test_8_without_weights_it_is_plain_cross_entropy() -> None:
    _, plain, _ = short_run(dist, beta=0.0, gamma=0.0)
    assert set(plain.trace["fit/inter"]) == set(plain.trace["fit/intra"]) == {0.0}
    assert plain.trace["fit/ce"][0] > plain.trace["fit/ce"][-1] > 0


def test_trap_inter_and_intra_are_not_swapped() -> None:
    """Reversing the classes in both networks, or the examples, changes neither; reversing one example's row changes one inter value."""
    x = tensors(draw(), *PAIR)
    torch.testing.assert_close(
        inter_class_loss(**{k: v.flip(1) for k, v in x.items()}, temperature=1.0), inter_class_loss(**x, temperature=1.0)
    )
    changed = {**x, "student_logits": torch.cat([x["student_logits"][:1].flip(1), x["student_logits"][1:]])}
    same = inter_class_loss(**changed, temperature=1.0) == inter_class_loss(**x, temperature=1.0)
    assert same.tolist() == [False, True, True, True, True]


def test_trap_saturated_logits_stay_finite() -> None:
    s = torch.tensor([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0]], requires_grad=True)
    value = inter_class_loss(s, -s.detach(), temperature=4.0).sum() + intra_class_loss(s, -s.detach(), temperature=4.0)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(s.grad).all()
