"""Noise by counter: a row's numbers are its own, however a batch is split; and they have the distributions they claim."""

import itertools
import math

import pytest
import torch

from distillbench.errors import UserError
from distillbench.training.data import Request
from distillbench.training.noise import Key

DRAWS = {
    "noise": lambda rows, shape, role: rows.noise(shape, role),
    "uniform": lambda rows, shape, role: rows.uniform(shape, role),
    "integers": lambda rows, shape, role: rows.integers(1000, shape, role),
}
every_draw = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)


def rows(count=12, key=None, **where):
    """Rows as a loop stamps them."""
    place = {"seed": 1, "loop": 0, "learner": 0, "position": 0, **where}
    return Request(torch.arange(count), 0, key=key or Key(**place))


# --- whose numbers they are --------------------------------------------------------------------------------------


@every_draw
@pytest.mark.parametrize("inner", [(), (1,), (3,), (8,), (9,), (2, 5), (3, 4, 4)], ids=str)
@pytest.mark.parametrize("cuts", [(0, 12), (0, 1, 12), (0, 5, 7, 12), tuple(range(13))], ids=str)
def test_a_rows_numbers_do_not_depend_on_how_the_batch_is_split(draw, inner, cuts):
    whole = draw(rows(), (12, *inner), "x")
    parts = [rows().part(start, stop) for start, stop in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat([draw(p, (len(p), *inner), "x") for p in parts]), whole)
    halves = rows().part(4, 10)  # a part of a part, as a micro-batch of one process is
    assert torch.equal(draw(halves.part(2, 5), (3, *inner), "x"), whole[6:9])


@every_draw
def test_a_larger_batch_begins_with_the_rows_of_a_smaller_one(draw):
    assert torch.equal(draw(rows(40), (40, 3), "x")[:7], draw(rows(7), (7, 3), "x"))


@every_draw
def test_every_place_has_its_own_numbers(draw):
    """Roles, positions, learners (and so streams), loops, seeds, and rows within a batch."""
    first = draw(rows(), (12, 6), "x")
    assert torch.equal(draw(rows(), (12, 6), "x"), first)
    others = [draw(rows(), (12, 6), "y")]
    others += [draw(rows(**{where: 1 if where != "seed" else 2}), (12, 6), "x") for where in ("seed", "loop", "learner", "position")]
    drawn = torch.cat([first, *others])
    assert len({tuple(row) for row in drawn.tolist()}) == len(drawn) == 6 * 12
    # A difference in one place is not made good by one in another, as it is where places are added up.
    diagonal = draw(rows(loop=1, position=0), (12, 6), "x"), draw(rows(loop=0, position=1), (12, 6), "x")
    assert not torch.equal(*diagonal)
    assert not torch.equal(draw(rows(loop=1, learner=11), (12, 6), "x"), draw(rows(loop=11, learner=1), (12, 6), "x"))


def test_kinds_of_draws_do_not_disturb_each_other():
    alone = rows().noise((12, 3), "b")
    after = rows()
    after.uniform((12, 50), "a")
    after.integers(7, (12,), "c")
    assert torch.equal(after.noise((12, 3), "b"), alone)


def test_a_coin_is_one_for_all_parts_and_a_seed_is_each_parts_own():
    assert len({rows().part(i, 12).coin("x") for i in range(12)}) == 1
    coins = [rows(position=p).coin("x") for p in range(200)]
    assert len(set(coins)) == 200 and all(0 <= c < 1 for c in coins) and abs(sum(coins) / 200 - 0.5) < 0.08
    seeds = {rows().part(i, 12).generator("x").initial_seed() for i in range(12)}
    assert len(seeds) == 12
    assert rows().generator("x").initial_seed() == rows().generator("x").initial_seed()


@pytest.mark.parametrize("seed", [1, 2**63 - 1])
def test_no_process_has_state_in_between(seed):
    """Nothing of torch's or numpy's own streams goes in, or is moved on."""
    torch.manual_seed(0)
    first, after = rows(seed=seed).noise((12, 2), "x"), torch.rand(3)
    torch.manual_seed(0)
    untouched = torch.rand(3)
    torch.manual_seed(99)
    assert torch.equal(rows(seed=seed).noise((12, 2), "x"), first) and torch.equal(after, untouched)


# --- what is refused ---------------------------------------------------------------------------------------------


@every_draw
def test_the_same_role_twice_is_refused(draw):
    batch = rows()
    draw(batch, (12, 3), "x")
    with pytest.raises(UserError, match=r"the noise 'x' is drawn twice for one batch.*name the second draw otherwise"):
        DRAWS["noise"](batch, (12, 3), "x")
    draw(batch, (12, 3), "y")
    draw(batch.part(0, 6), (6, 3), "x")  # a part is a batch of its own


@every_draw
def test_a_batch_that_no_loop_has_handed_out_has_no_noise(draw):
    with pytest.raises(UserError, match=r"the noise 'x' is asked of a batch that no loop has handed out; .* run\.generator"):
        draw(Request(torch.arange(3), 0), (3,), "x")


@every_draw
@pytest.mark.parametrize("shape", [(), (1, 12), (11, 3), (13,)], ids=str)
def test_the_first_dimension_is_the_batchs_rows(draw, shape):
    with pytest.raises(UserError, match=r"the noise 'x' has shape .*; its first dimension is the batch's 12 rows"):
        draw(rows(), shape, "x")


# --- what is drawn -----------------------------------------------------------------------------------------------

MANY = 100_000


def test_noise_has_the_moments_of_the_normal_distribution():
    """Within 4 standard errors: 1, 2, 15 - 9 and 105 - 9 are the variances of x, x^2, x^3 - 3 x and x^4 of a standard normal x."""
    drawn = rows(MANY).noise((MANY, 3), "x").double()
    flat, n = drawn.flatten(), drawn.numel()
    assert abs(float(flat.mean())) < 4 * math.sqrt(1 / n)
    assert abs(float(flat.square().mean()) - 1) < 4 * math.sqrt(2 / n)
    assert abs(float((flat**3 - 3 * flat).mean())) < 4 * math.sqrt(6 / n)
    assert abs(float((flat**4).mean()) - 3) < 4 * math.sqrt(96 / n)
    assert float(flat.abs().max()) < 6.5
    # Neither the numbers of a row are alike nor those of neighbouring rows.
    for a, b in ((drawn[:, 0], drawn[:, 1]), (drawn[:, 1], drawn[:, 2]), (drawn[:-1, 0], drawn[1:, 0])):
        assert abs(float((a * b).mean())) < 4 / math.sqrt(MANY)


def test_noise_is_below_every_bound_as_often_as_the_normal_distribution():
    """The largest distance of the distribution functions, below Kolmogorov's bound of 1 in 1,000."""
    drawn = rows(MANY).noise((MANY,), "x").double().sort().values
    chance = torch.distributions.Normal(0.0, 1.0).cdf(drawn)
    places = torch.arange(1, MANY + 1) / MANY
    assert float(torch.maximum((places - chance).abs(), (places - 1 / MANY - chance).abs()).max()) < 1.95 / math.sqrt(MANY)


def chi_squared(counts, expected):
    return float(((counts.double() - expected) ** 2 / expected).sum())


def test_uniform_numbers_are_even_in_one_and_in_two_dimensions():
    drawn = rows(MANY).uniform((MANY, 2), "x")
    assert float(drawn.min()) >= 0 and float(drawn.max()) < 1
    cells = (drawn * 10).long()
    assert chi_squared(torch.bincount(cells[:, 0], minlength=10), MANY / 10) < 27.9  # 9 degrees of freedom: 1 in 1,000
    assert chi_squared(torch.bincount(cells @ torch.tensor([10, 1]), minlength=100), MANY / 100) < 148.2  # 99 of them
    assert torch.equal((drawn.double() * 2**24) % 1, torch.zeros(MANY, 2, dtype=torch.float64))


@pytest.mark.parametrize(("high", "bound"), [(1, 0.1), (2, 10.8), (7, 22.5), (100, 148.2)])
def test_integers_are_even_and_below_high(high, bound):
    """Chi squared with high - 1 degrees of freedom: 1 in 1,000."""
    drawn = rows(MANY).integers(high, (MANY,), "x")
    assert drawn.dtype == torch.int64 and int(drawn.min()) == 0 and int(drawn.max()) == high - 1
    assert chi_squared(torch.bincount(drawn, minlength=high), MANY / high) < bound


def test_large_integers_reach_the_whole_range():
    high = 2**32 - 1
    drawn = rows(MANY).integers(high, (MANY,), "x")
    assert 0 <= int(drawn.min()) < high // 1000 and high - high // 1000 < int(drawn.max()) < high


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_are_in_the_default_type_and_the_same_in_both(dtype):
    plain = rows().noise((12, 5), "x"), rows().uniform((12, 5), "x")
    torch.set_default_dtype(dtype)
    try:
        drawn = rows().noise((12, 5), "x"), rows().uniform((12, 5), "x")
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(drawn, plain, strict=True):
        assert ours.dtype == dtype and torch.equal(ours, theirs.to(dtype))


def test_known_numbers():
    """Every machine draws these: a change of the generator, its counter or the key moves every stochastic result."""
    assert rows(3).integers(10**6, (3, 2), "known").tolist() == [[839188, 306495], [297191, 966297], [996548, 755189]]
    assert rows(3).uniform((3,), "known").tolist() == pytest.approx([0.83918864, 0.29719150, 0.99654847], abs=1e-7)
    assert rows(3).noise((3,), "known").tolist() == pytest.approx([-0.20580776, 1.52300727, 0.00271106], abs=1e-6)
