import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distillbench.errors import UserError
from distillbench.suites.metrics.images.frechet import Moments, frechet_distance, frechet_from_samples, load_reference, require_samples
from tests.oracles import image_metrics as oracle


def normal(count, seed, dimension=6):
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def features(count, seed, dimension=6, shift=0.0):
    """Correlated, of unlike scales and away from zero, as a network's features are."""
    mix = normal(dimension, 99, dimension) * torch.logspace(0, -2, dimension, dtype=torch.float64)
    return normal(count, seed, dimension) @ mix + 3 + shift


def numpy_moments(x):
    x = x.double().numpy()
    return x.mean(0), np.cov(x, rowvar=False)


# Moments


@pytest.mark.parametrize("sizes", [[500], [1, 1, 498], [7, 0, 93, 400], [100] * 5])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_one_pass_equals_two_passes(sizes, offset):
    x = features(500, 0) + offset
    moments = Moments.stream(iter(x.split(sizes)))
    mean, covariance = numpy_moments(x)
    assert moments.count == 500
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, covariance, rtol=1e-10, atol=1e-10 * np.abs(covariance).max())


def test_float32_features_are_summed_in_float64():
    x = (features(5000, 0) + 1000).float()
    moments = Moments.stream(x.split(64))
    mean, covariance = numpy_moments(x)
    assert moments.covariance.dtype == torch.float64
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, covariance, rtol=1e-9, atol=1e-10 * np.abs(covariance).max())


def test_merge_and_update_equal_one_stream():
    x = features(300, 1)
    whole = Moments.of(x)
    for joined in (Moments.of(x[:120]).merge(Moments.of(x[120:])), Moments.of(x[:1]).update(x[1:2]).update(x[2:])):
        assert joined.count == 300
        assert torch.allclose(joined.mean, whole.mean, rtol=1e-12)
        assert torch.allclose(joined.covariance, whole.covariance, rtol=1e-10)


def test_streaming_leaves_its_input_alone():
    x = features(20, 0)
    before = x.clone()
    Moments.stream(x.split(5))
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no samples"),
        ([torch.zeros(3, 4), torch.zeros(3, 5)], "5 features where those before it have 4"),
        ([torch.zeros(3)], "one row per sample"),
        ([torch.tensor([[1.0, float("nan")]])], "1 of 1 features are not finite"),
    ],
)
def test_batches_that_have_no_moments_are_refused(batches, message):
    with pytest.raises(UserError, match=message):
        Moments.stream(batches)


# The distance


def test_equal_sets_are_at_distance_zero():
    x = features(200, 0)
    assert frechet_distance(Moments.of(x), Moments.of(x)) == pytest.approx(0, abs=1e-10)
    assert frechet_from_samples(x, x[torch.randperm(200)]) == pytest.approx(0, abs=1e-10)
    assert frechet_from_samples(x[:5], x[:5], minimum=2) == pytest.approx(0, abs=1e-10)


def test_a_shift_costs_its_squared_length_and_a_scale_its_part_of_the_trace():
    """N(mu, A) against N(mu + v, s^2 A): |v|^2 + (s - 1)^2 tr A."""
    x = features(400, 0)
    v = torch.linspace(-1, 2, 6, dtype=torch.float64)
    trace = np.trace(numpy_moments(x)[1])
    assert frechet_from_samples(x + v, x) == pytest.approx(float(v @ v), rel=1e-10)
    centre = x.mean(0)
    assert frechet_from_samples(centre + 3 * (x - centre), x) == pytest.approx(4 * trace, rel=1e-10)
    assert frechet_from_samples(centre + 3 * (x - centre) + v, x) == pytest.approx(4 * trace + float(v @ v), rel=1e-10)
    few = x[:4]
    assert frechet_from_samples(few + v, few, minimum=2) == pytest.approx(float(v @ v), rel=1e-10)


def test_diagonal_gaussians_in_closed_form():
    """Covariances that commute: the sum of (sqrt a_i - sqrt b_i)^2."""
    a, b = torch.tensor([1.0, 4.0, 0.0, 9.0]), torch.tensor([4.0, 4.0, 25.0, 0.0])
    one, other = Moments(torch.zeros(4), torch.diag(a), None), Moments(torch.ones(4), torch.diag(b), None)
    assert frechet_distance(one, other) == pytest.approx(4 + 1 + 0 + 25 + 9, rel=1e-12)


def test_constant_and_random_samples_against_real_data():
    real, other = features(2000, 0), features(2000, 1)
    floor = frechet_from_samples(other, real)
    mean, covariance = numpy_moments(real)
    constant = frechet_from_samples(torch.zeros(2000, 6), real)
    assert constant == pytest.approx((mean**2).sum() + np.trace(covariance), rel=1e-9)  # no covariance: nothing is subtracted
    assert floor < 0.05
    assert frechet_from_samples(10 * normal(2000, 2), real) > 100 * floor
    assert constant > 100 * floor


@pytest.mark.parametrize("dimension", [1, 2, 17, 64])
def test_equals_the_matrix_square_root_at_full_rank(dimension):
    x, y = features(300, 0, dimension), features(400, 1, dimension, shift=0.2)
    want = oracle.frechet_distance(*(np.atleast_2d(v) if i % 2 else v for i, v in enumerate([*numpy_moments(x), *numpy_moments(y)])))
    assert frechet_from_samples(x, y) == pytest.approx(want, rel=1e-8)
    assert frechet_from_samples(x, Moments.of(y)) == pytest.approx(want, rel=1e-8)
    assert frechet_distance(Moments.of(y), Moments.of(x)) == pytest.approx(want, rel=1e-8)


@pytest.mark.parametrize(("n", "m"), [(20, 30), (20, 300), (300, 20), (2, 300), (40, 41), (300, 300)])
def test_every_form_equals_clean_fid_below_full_rank_too(n, m, capsys):
    from cleanfid.fid import frechet_distance as clean

    x, y = features(n, 0, 40), features(m, 1, 40, shift=0.2)
    want = clean(*numpy_moments(x), *numpy_moments(y))
    rel = 1e-8 if min(n, m) > 40 else 1e-6
    assert frechet_from_samples(x, y, minimum=2) == pytest.approx(want, rel=rel)
    assert frechet_from_samples(x, Moments.of(y), minimum=2) == pytest.approx(want, rel=rel)
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(want, rel=rel)


def test_equals_torchmetrics_on_the_same_features():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Features(torch.nn.Module):
        num_features = 6

        def forward(self, x):
            return x

    x, y = features(300, 0), features(200, 1, shift=0.2)
    theirs = FrechetInceptionDistance(feature=Features(), input_img_size=(6,)).set_dtype(torch.float64)
    theirs.update(y, real=True)
    theirs.update(x, real=False)
    assert frechet_from_samples(x, y) == pytest.approx(float(theirs.compute()), rel=1e-7)


def test_rank_deficient_in_closed_form():
    """Two planes of R^4 that share one axis: only what lies along it is transported, tr (A B)^(1/2) is its deviation squared."""
    a, b = torch.diag(torch.tensor([4.0, 9.0, 0, 0])), torch.diag(torch.tensor([0, 9.0, 1.0, 0]))
    turn = torch.linalg.qr(normal(4, 0, 4)).Q
    one, other = (Moments(torch.zeros(4), turn @ c.double() @ turn.T, None) for c in (a, b))
    assert frechet_distance(one, other) == pytest.approx(13 + 10 - 2 * 9, rel=1e-10)


def test_repeated_samples_of_low_rank_leave_no_rounding():
    """500 rows that are 3 points: singular in either form, and equal to the statistics of the 3 points with equal weights."""
    points = features(3, 0, 40)
    x, y = points.repeat(10, 1), features(200, 1, 40)
    covariance = np.cov(x.numpy(), rowvar=False)
    root = np.linalg.cholesky(numpy_moments(y)[1])
    values = np.linalg.eigvalsh(root.T @ covariance @ root)[-2:]  # two directions have variance
    mean, other = numpy_moments(y)
    want = ((x.numpy().mean(0) - mean) ** 2).sum() + np.trace(covariance) + np.trace(other) - 2 * np.sqrt(values).sum()
    assert frechet_from_samples(x, y, minimum=2) == pytest.approx(want, rel=1e-9)
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(want, rel=1e-9)


def test_variances_near_rounding_still_count():
    """One direction at 1 and the rest at 3e-8: the roots of the squares are lost in eigenvalues, not in singular values."""
    x = normal(30, 0, 40) * torch.tensor([1.0] + [3e-8**0.5] * 39)
    assert frechet_from_samples(x, x, minimum=2) == pytest.approx(0, abs=1e-9)


seeds = st.integers(0, 2**31)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, n=st.integers(2, 30), m=st.integers(2, 30), shift=st.floats(-100, 100))
def test_symmetry_shift_and_rotation(seed, n, m, shift):
    """Below and above full rank: d(x, y) = d(y, x) = d(x + s, y + s) = d(x Q, y Q)."""
    x, y = normal(n, seed, 8), normal(m, seed + 1, 8) * 2 + 1
    turn = torch.linalg.qr(normal(8, seed + 2, 8)).Q
    value = frechet_from_samples(x, y, minimum=2)
    assert value >= 0
    for a, b in ((y, x), (x + shift, y + shift), (x @ turn, y @ turn)):
        assert frechet_from_samples(a, b, minimum=2) == pytest.approx(value, rel=1e-7, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, scale=st.floats(0.01, 100))
def test_it_is_in_squared_units(seed, scale):
    x, y = normal(20, seed, 4), normal(20, seed + 1, 4) + 1
    assert frechet_from_samples(scale * x, scale * y) == pytest.approx(scale**2 * frechet_from_samples(x, y), rel=1e-7)


# Too few


@pytest.mark.parametrize(("count", "dimension", "minimum"), [(6, 6, None), (1, 6, 0), (49_999, 6, 50_000), (0, 6, 2)])
def test_too_few_samples_are_refused(count, dimension, minimum):
    with pytest.raises(UserError, match=f"{count} samples are too few .* in {dimension} dimensions: draw at least"):
        require_samples(count, dimension, minimum=minimum)


def test_enough_samples_pass():
    require_samples(7, 6)
    require_samples(2, 6, minimum=2)
    require_samples(None, 2048, minimum=50_000)


def test_a_distance_from_too_few_is_an_error_and_not_a_number():
    x, y = features(6, 0), features(50, 1)
    for a, b in ((x, y), (y, x), (x, Moments.of(y)), (y, Moments.of(x))):
        with pytest.raises(UserError, match="draw at least 7"):
            frechet_from_samples(a, b)
        assert frechet_from_samples(a, b, minimum=6) > 0
    with pytest.raises(UserError, match="draw at least 2"):
        frechet_distance(Moments.of(x[:1]), Moments.of(y))


def test_other_features_are_refused():
    with pytest.raises(UserError, match="6 features against 5"):
        frechet_from_samples(features(20, 0), features(20, 0, 5))
    with pytest.raises(UserError, match="6 features against 5"):
        frechet_distance(Moments.of(features(20, 0)), Moments.of(features(20, 0, 5)))


# Reference files


def test_a_reference_file_gives_the_distance_of_its_features(tmp_path):
    x, y = features(200, 0), features(300, 1, shift=0.1)
    mu, sigma = numpy_moments(y)
    np.savez(tmp_path / "ref.npz", mu=mu, sigma=sigma, arr_0=np.zeros((2, 8, 8, 3), np.uint8))  # guided-diffusion adds images
    reference = load_reference(tmp_path / "ref.npz")
    assert reference.count is None
    assert frechet_from_samples(x, reference) == pytest.approx(frechet_from_samples(x, y), rel=1e-9)
    np.savez(tmp_path / "single.npz", mu=mu.astype(np.float32), sigma=sigma.astype(np.float32))
    assert frechet_from_samples(x, load_reference(tmp_path / "single.npz")) == pytest.approx(frechet_from_samples(x, y), rel=1e-3)
    with pytest.raises(UserError, match="cannot be merged"):
        reference.merge(Moments.of(x))


EYE, ZERO = np.eye(3), np.zeros(3)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": ZERO}, r"lacks sigma \(it holds mu\)"),
        ({"mean": ZERO, "cov": EYE}, r"lacks mu and sigma \(it holds mean, cov\)"),
        ({"mu": ZERO, "sigma": np.eye(4)}, r"mu \(3,\) and sigma \(4, 4\) do not fit"),
        ({"mu": ZERO[None], "sigma": EYE}, r"mu \(1, 3\) and sigma \(3, 3\) do not fit"),
        ({"mu": ZERO, "sigma": EYE * np.nan}, "sigma holds values that are not finite"),
        ({"mu": ZERO + np.inf, "sigma": EYE}, "mu holds values that are not finite"),
        ({"mu": ZERO, "sigma": EYE + np.eye(3, k=1)}, "sigma is not symmetric"),
        ({"mu": ZERO, "sigma": -EYE}, "negative variance"),
        ({"mu": ZERO.astype(int), "sigma": EYE}, "have to be real floats, found int64"),
        ({"mu": ZERO, "sigma": EYE.astype(object)}, "Object arrays cannot be loaded"),
    ],
)
def test_a_reference_that_is_none_is_refused_in_one_line(tmp_path, arrays, message):
    path = tmp_path / "ref.npz"
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=message) as caught:
        load_reference(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_no_npz_are_refused(tmp_path):
    np.save(tmp_path / "one.npy", EYE)
    (tmp_path / "text.npz").write_text("mu,sigma\n0,1\n")
    (tmp_path / "empty.npz").touch()
    np.savez_compressed(tmp_path / "cut.npz", mu=ZERO, sigma=np.random.default_rng(0).random((3, 3)))
    whole = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    for name in ("one.npy", "text.npz", "empty.npz", "cut.npz", "absent.npz"):
        with pytest.raises(UserError, match=name) as caught:
            load_reference(tmp_path / name)
        assert "\n" not in str(caught.value)
