import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distillbench.errors import UserError
from distillbench.suites.metrics.images.inception_score import inception_score
from tests.oracles import image_metrics as oracle


def random_logits(count, classes, seed, scale=2.0):
    return scale * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("splits", [1, 3, 10])
def test_equals_the_mutual_information(splits):
    p = random_logits(47, 7, 0).softmax(1)
    assert inception_score(p, splits=splits) == pytest.approx(oracle.inception_score(p.numpy(), splits), rel=1e-12)


@pytest.mark.parametrize("splits", [1, 10])
def test_equals_torchmetrics_in_its_order(splits):
    from torchmetrics.image.inception import InceptionScore

    logits = random_logits(200, 12, 1)
    theirs = InceptionScore(feature=torch.nn.Identity(), splits=splits)
    theirs.update(logits)
    torch.manual_seed(5)
    want = float(theirs.compute()[0])
    torch.manual_seed(5)
    assert inception_score(logits[torch.randperm(200)].softmax(1), splits=splits) == pytest.approx(want, rel=1e-9)


def test_certain_and_even_is_the_number_of_classes_and_unsure_or_constant_is_one():
    certain = torch.eye(10).repeat(20, 1)
    assert inception_score(certain, splits=10) == pytest.approx(10, rel=1e-12)
    assert inception_score(torch.full((100, 10), 0.1)) == pytest.approx(1, rel=1e-6)
    assert inception_score(certain[:1].expand(100, 10)) == pytest.approx(1, rel=1e-12)  # one image a hundred times


def test_two_of_ten_classes_score_two_and_noise_scores_near_one():
    assert inception_score(torch.eye(10)[[0, 7]].repeat(50, 1)) == pytest.approx(2, rel=1e-12)
    assert inception_score(random_logits(1000, 10, 0, scale=0.1).softmax(1)) == pytest.approx(1, abs=0.02)


def test_samples_in_class_order_score_less_than_shuffled_ones():
    """The documented trap: a split of one class has no diversity."""
    ordered = torch.eye(10).repeat_interleave(20, 0)
    assert inception_score(ordered) == pytest.approx(1)
    assert inception_score(ordered[torch.randperm(200, generator=torch.Generator().manual_seed(0))]) > 6


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), classes=st.integers(2, 12))
def test_it_lies_between_one_and_the_number_of_classes(seed, classes):
    p = random_logits(30, classes, seed, scale=5).softmax(1)
    score = inception_score(p, splits=1)
    assert 1 - 1e-12 <= score <= classes + 1e-9
    turned = p[:, torch.randperm(classes, generator=torch.Generator().manual_seed(seed))]
    assert inception_score(turned, splits=1) == pytest.approx(score, rel=1e-12)


def test_float32_is_summed_in_float64():
    p = random_logits(100, 20, 0).softmax(1).float()
    assert inception_score(p) == pytest.approx(oracle.inception_score(p.double().numpy(), 10), rel=1e-12)


@pytest.mark.parametrize(
    ("p", "message"),
    [
        (torch.full((19, 4), 0.25), "19 class probabilities are too few: at least 20"),
        (torch.full((20, 4), 0.5), "a softmax, not logits"),
        (torch.tensor([[1.5, -0.5]]).expand(20, 2), "a softmax, not logits"),
        (torch.full((20, 4), np.nan), "20 of 20 class probabilities are not finite"),
        (torch.full((20,), 0.25), "one row per sample"),
    ],
)
def test_what_are_no_probabilities_is_refused(p, message):
    with pytest.raises(UserError, match=message):
        inception_score(p)
