import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distillbench.errors import UserError
from distillbench.suites.metrics.images.distances import distance_tiles, nearest
from distillbench.suites.metrics.images.precision_recall import precision_recall
from tests.oracles import image_metrics as oracle


def normal(count, seed, dimension=8):
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("tile", [3, 4096])
@pytest.mark.parametrize("k", [1, 3])
def test_equals_the_loop_over_pairs(k, tile):
    x, y = normal(23, 0, 3), normal(31, 1, 3) * 1.5 + 0.5
    want = oracle.fraction_inside(x.numpy(), y.numpy(), k), oracle.fraction_inside(y.numpy(), x.numpy(), k)
    assert min(want) > 0 and max(want) < 1  # so that the test says something
    assert precision_recall(x, y, k=k, tile=tile) == pytest.approx(want, rel=1e-12)


def test_equals_torch_fidelity():
    from torch_fidelity.metric_prc import prc_features_to_metric

    x, y = normal(300, 0) * 0.8, normal(400, 1)
    theirs = prc_features_to_metric(x, y, prc_neighborhood=3, prc_batch_size=1000, save_cpu_ram=False, verbose=False)
    assert precision_recall(x, y) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-7)


def test_self_is_perfect_and_so_are_two_draws_of_one_distribution_nearly():
    x = normal(500, 0, 3)
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x[torch.randperm(500)].float()) == (1, 1)
    assert min(precision_recall(x, normal(500, 1, 3))) > 0.9


def test_a_constant_has_precision_and_no_recall_at_the_mean_and_neither_far_off():
    real = normal(500, 0, 3)
    assert precision_recall(torch.zeros(500, 3), real) == (1, 0)
    assert precision_recall(torch.full((500, 3), 50.0), real) == (0, 0)
    assert precision_recall(torch.full((500, 3), 0.3), torch.full((400, 3), 0.3)) == (1, 1)


def test_a_collapsed_mode_loses_recall_and_noise_loses_precision():
    real = torch.cat([normal(300, 0, 3), normal(300, 1, 3) + 20])
    one_mode = normal(600, 2, 3)
    precision, recall = precision_recall(one_mode, real)
    assert precision > 0.9 and recall == pytest.approx(0.5, abs=0.05)
    wide = 30 * normal(600, 3, 3) + 10
    precision, recall = precision_recall(wide, real)
    assert precision < 0.1 and recall > 0.9


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), shift=st.floats(-1e3, 1e3), scale=st.floats(1e-3, 1e3))
def test_swapping_swaps_and_similar_figures_are_alike(seed, shift, scale):
    x, y = normal(20, seed, 4), normal(25, seed + 1, 4) + 0.5
    value = precision_recall(x, y)
    assert precision_recall(y, x) == value[::-1]
    turn = torch.linalg.qr(normal(4, seed + 2, 4)).Q
    assert precision_recall(scale * x @ turn + shift, scale * y @ turn + shift) == pytest.approx(value)


def test_too_few_and_broken_features_are_refused():
    x = normal(10, 0)
    with pytest.raises(UserError, match="3 reference features are too few: at least 4"):
        precision_recall(x, x[:3])
    with pytest.raises(UserError, match="3 features are too few"):
        precision_recall(x[:3], x)
    with pytest.raises(UserError, match="1 of 10 features are not finite"):
        precision_recall(torch.where(torch.arange(10)[:, None] == 4, torch.nan, x), x)


# The distances underneath


def test_tiles_make_the_whole_matrix_and_nearest_its_smallest():
    a, b = normal(11, 0) + 100, normal(9, 1) + 100
    whole = torch.zeros(11, 9, dtype=torch.float64)
    for i, j, tile in distance_tiles(a, b, tile=4):
        whole[i : i + len(tile), j : j + tile.shape[1]] = tile
    want = np.linalg.norm(a.numpy()[:, None] - b.numpy(), axis=-1)
    np.testing.assert_allclose(whole, want, rtol=1e-9)
    np.testing.assert_allclose(nearest(a, b, k=3, tile=4), np.sort(want, axis=1)[:, :3], rtol=1e-9)
    others = np.linalg.norm(a.numpy()[:, None] - a.numpy(), axis=-1)
    np.testing.assert_allclose(nearest(a, a, k=2, itself=True, tile=4), np.sort(others, axis=1)[:, 1:3], rtol=1e-9)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_copies_are_at_distance_zero_exactly_and_near_ones_are_not(offset):
    a = (normal(50, 0, 64) + offset).float()
    assert not nearest(a, a).any()
    near = nearest(a + 1e-2, a)
    assert math.sqrt(64) * 1e-2 == pytest.approx(float(near.median()), rel=1e-2)
