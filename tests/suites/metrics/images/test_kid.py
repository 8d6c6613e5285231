import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distillbench.errors import UserError
from distillbench.suites.metrics.images.kid import kid, polynomial_mmd2
from tests.oracles import image_metrics as oracle


def normal(count, seed, dimension=6):
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_equals_the_sum_over_pairs():
    x, y = normal(7, 0), normal(5, 1) + 0.3
    assert polynomial_mmd2(x, y) == pytest.approx(oracle.polynomial_mmd2(x.numpy(), y.numpy()), rel=1e-10)


@pytest.mark.parametrize(("subsets", "size"), [(1, 60), (5, 60), (20, 25)])
def test_equals_torchmetrics_on_the_same_subsets(subsets, size):
    from torchmetrics.image.kid import KernelInceptionDistance

    class Features(torch.nn.Module):
        num_features = 6

        def forward(self, x):
            return x

    x, y = normal(60, 0), normal(80, 1) + 0.2
    theirs = KernelInceptionDistance(feature=Features(), subsets=subsets, subset_size=size)
    theirs.update(y, real=True)
    theirs.update(x, real=False)
    torch.manual_seed(3)
    want = float(theirs.compute()[0])
    assert kid(x, y, subsets=subsets, subset_size=size, seed=3) == pytest.approx(want, rel=1e-9)


def test_equals_clean_fid_on_whole_sets():
    from cleanfid.fid import kernel_distance

    x, y = normal(40, 0), normal(40, 1) + 0.2
    assert kid(x, y, subsets=1, subset_size=40) == pytest.approx(kernel_distance(x.numpy(), y.numpy(), num_subsets=1), rel=1e-9)


def test_is_unbiased_over_fresh_samples_of_one_distribution():
    values = [polynomial_mmd2(normal(100, 2 * s), normal(100, 2 * s + 1)) for s in range(80)]
    assert abs(np.mean(values)) < 3 * np.std(values, ddof=1) / math.sqrt(len(values))
    assert min(values) < 0 < max(values)


def test_constant_and_random_samples_are_far_off_and_oracle_is_near():
    real = normal(1000, 0)
    floor = abs(kid(normal(1000, 1), real, subsets=10, subset_size=500))
    assert floor < 0.02
    assert kid(torch.zeros(1000, 6), real, subsets=10, subset_size=500) > 10 * floor
    assert kid(torch.full((1000, 6), 2.0), real, subsets=10, subset_size=500) > 1
    assert kid(3 * normal(1000, 2), real, subsets=10, subset_size=500) > 1


def test_constants_in_closed_form():
    """k(0, 0) = k(0, c) = 1 and k(c, c) = (|c|^2 / D + 1)^3 for vectors with |c|^2 = D."""
    assert polynomial_mmd2(torch.zeros(5, 4), torch.ones(6, 4)) == pytest.approx(1 + 8 - 2)
    assert polynomial_mmd2(torch.ones(5, 4), torch.ones(6, 4)) == pytest.approx(0, abs=1e-12)


def test_a_set_against_itself_is_below_zero_by_exactly_the_diagonal():
    """The cross term keeps its diagonal: 2 (off - all) where off and all are the kernel's means without and with it."""
    x = normal(50, 0)
    kernel = (x.numpy() @ x.numpy().T / 6 + 1) ** 3
    off = (kernel.sum() - np.trace(kernel)) / (50 * 49)
    value = kid(x, x, subsets=2, subset_size=50)
    assert value < 0
    assert value == pytest.approx(2 * (off - kernel.mean()), rel=1e-10)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_it_is_symmetric_and_blind_to_rotation(seed):
    x, y = normal(12, seed), normal(15, seed + 1) + 1
    turn = torch.linalg.qr(normal(6, seed + 2)).Q
    assert polynomial_mmd2(y, x) == pytest.approx(polynomial_mmd2(x, y), rel=1e-10)
    assert polynomial_mmd2(x @ turn, y @ turn) == pytest.approx(polynomial_mmd2(x, y), rel=1e-9)


def test_the_seed_fixes_the_subsets():
    x, y = normal(100, 0), normal(100, 1)
    one, again, other = (kid(x, y, subsets=3, subset_size=20, seed=s) for s in (0, 0, 1))
    assert one == again != other


def test_too_few_and_broken_features_are_refused():
    x = normal(30, 0)
    with pytest.raises(UserError, match="30 features are too few: at least 31"):
        kid(x, normal(40, 1), subset_size=31)
    with pytest.raises(UserError, match="20 reference features are too few: at least 25"):
        kid(x, x[:20], subset_size=25)
    with pytest.raises(UserError, match="1 features are too few: at least 2"):
        kid(x[:1], x, subset_size=1)
    with pytest.raises(UserError, match="not finite"):
        kid(x, x / 0, subset_size=10)
