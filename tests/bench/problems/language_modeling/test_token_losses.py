"""Token losses fused with the projection: against a dense numpy oracle, at their limits, and in what they keep in memory."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch import Tensor

from distillbench.errors import UserError
from distillbench.problems.language_modeling.token_losses import DIVERGENCES, Projection, TopK, next_tokens, token_losses
from tests.oracles.differences import gradient
from tests.oracles.language_modeling import token_losses as oracle

N, D, V, D_TEACHER = 7, 4, 11, 3
MIXES = [{name: 1.0} for name in DIVERGENCES] + [{"forward_kl": 0.5, "tv": 0.5}, {"js": 2.0, "skew_reverse_kl": 0.3, "reverse_kl": 0.0}]
SETTINGS = {"beta": 0.3, "alpha": 0.2, "temperature": 1.7}


def named(mix):
    return "+".join(mix)


def draw(*shape, seed=0, scale=1.0, dtype=torch.float64):
    return (scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).to(dtype)


def student(dtype=torch.float64, rows=V):
    return draw(N, D, seed=1, dtype=dtype), draw(rows, D, seed=2, dtype=dtype), draw(rows, seed=3, dtype=dtype)


def teacher(dtype=torch.float64, rows=V):
    return Projection(draw(N, D_TEACHER, seed=4, dtype=dtype), draw(rows, D_TEACHER, seed=5, dtype=dtype), draw(rows, seed=6, dtype=dtype))


def distributions(temperature=SETTINGS["temperature"]):
    t = teacher()
    return softmax((t.hidden @ t.weight.T + t.bias).numpy() / temperature, axis=1)


def top_k(k, temperature=SETTINGS["temperature"]):
    p = torch.from_numpy(distributions(temperature))
    kept = p.topk(k, 1)
    return TopK(kept.indices, kept.values.log(), 1 - kept.values.sum(1), temperature)


def losses_and_gradients(teacher, mix, row_weights=None, dtype=torch.float64, **settings):
    x = [part.requires_grad_() for part in student(dtype, settings.pop("rows", V))]
    losses = token_losses(x[0], x[1], teacher, mix, bias=x[2], **{**SETTINGS, **settings})
    total = losses.mean() if row_weights is None else (losses * row_weights).sum()
    return losses.detach(), torch.autograd.grad(total, x)


def assert_equals_oracle(teacher, losses_of, mix, **settings):
    """Values, and the gradients of a mean and of a sum that weighs every token differently, by central differences of the oracle."""
    h, w, b = (x.numpy() for x in student())

    def slopes(row_weights):
        return (
            gradient(lambda x: row_weights * losses_of(x @ w.T + b), h),
            gradient(lambda x: row_weights * losses_of(h @ x.T + b), w),
            gradient(lambda x: row_weights * losses_of(h @ w.T + x), b),
        )

    for row_weights in (None, np.linspace(-1, 2, N)):
        losses, gradients = losses_and_gradients(teacher, mix, None if row_weights is None else torch.from_numpy(row_weights), **settings)
        np.testing.assert_allclose(losses, losses_of(h @ w.T + b), rtol=1e-10, atol=1e-14)
        for ours, theirs in zip(gradients, slopes(1 / N if row_weights is None else row_weights), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-8)


# --- values and gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", MIXES, ids=named)
def test_equals_the_dense_oracle(mix):
    assert_equals_oracle(teacher(), lambda z: oracle.token_losses(z, distributions(), mix, **SETTINGS), mix, chunk=3)


@pytest.mark.parametrize("mix", MIXES, ids=named)
def test_a_top_k_teacher_equals_the_oracle_of_the_lumped_distributions(mix):
    kept = top_k(4)
    expected = lambda z: oracle.top_k_losses(z, distributions(), kept.ids.numpy(), mix, **SETTINGS)  # noqa: E731
    assert_equals_oracle(kept, expected, mix, chunk=3)


@pytest.mark.parametrize("mix", MIXES, ids=named)
def test_every_chunk_and_every_form_of_the_same_teacher_agree(mix):
    t = teacher()
    logits = t.hidden @ t.weight.T + t.bias
    whole = losses_and_gradients(t, mix, chunk=N)
    for form, chunk in [(t, 1), (t, 2), (t, N + 5), (lambda rows: logits[rows], 3), (top_k(V), 3)]:
        losses, gradients = losses_and_gradients(form, mix, chunk=chunk)
        torch.testing.assert_close(losses, whole[0], rtol=1e-9, atol=1e-12)
        for ours, theirs in zip(gradients, whole[1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_central_differences_of_its_own_value(name):
    x = tuple(part.requires_grad_() for part in student())
    torch.autograd.gradcheck(
        lambda h, w, b: token_losses(h, w, teacher(), name, bias=b, chunk=3, **SETTINGS), x, nondet_tol=1e-12, fast_mode=True
    )


@pytest.mark.parametrize("name", DIVERGENCES)
def test_zero_at_match_with_zero_gradient(name):
    h, w, b = student()
    h.requires_grad_()
    p = torch.log_softmax((h.detach() @ w.T + b) / 1.7, 1)
    kept = p.topk(5, 1)
    for same in (Projection(h.detach(), w, b), TopK(kept.indices, kept.values, 1 - kept.values.exp().sum(1), 1.7)):
        losses = token_losses(h, w, same, name, bias=b, **SETTINGS)
        (slope,) = torch.autograd.grad(losses.sum(), h)
        np.testing.assert_allclose(losses.detach(), 0, atol=1e-14)
        if name != "tv":  # its gradient is undefined there
            np.testing.assert_allclose(slope, 0, atol=1e-13)


def test_fewer_kept_entries_never_raise_a_divergence():
    for name in DIVERGENCES:
        falling = [losses_and_gradients(top_k(k), name)[0] for k in (V, 7, 3, 1)]
        assert all((a >= b - 1e-12).all() and (a > b).any() for a, b in itertools.pairwise(falling))


def test_a_label_as_teacher_gives_cross_entropy():
    h, w, b = student()
    labels = torch.arange(N) % V
    label = TopK(labels[:, None], torch.zeros(N, 1), torch.zeros(N))
    ours = token_losses(h, w, label, "forward_kl", bias=b)
    torch.testing.assert_close(ours, torch.nn.functional.cross_entropy(h @ w.T + b, labels, reduction="none"))


# --- limits, scales, extremes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("end", "limit"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_js_at_its_ends(end, limit):
    value = losses_and_gradients(teacher(), limit)
    at, near = losses_and_gradients(teacher(), "js", beta=end), losses_and_gradients(teacher(), "js", beta=abs(end - 1e-6))
    torch.testing.assert_close(at[0], value[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(near[0] / 1e-6, value[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(near[1][1] / 1e-6, value[1][1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("name", "limit"), [("skew_kl", "forward_kl"), ("skew_reverse_kl", "reverse_kl")])
def test_skews_at_their_ends(name, limit):
    value = losses_and_gradients(teacher(), limit)
    for alpha, rtol in ((0.0, 1e-12), (1e-20, 1e-12), (1e-7, 1e-4)):
        ours = losses_and_gradients(teacher(), name, alpha=alpha)
        torch.testing.assert_close(ours[0], value[0], rtol=rtol, atol=0)
        torch.testing.assert_close(ours[1][1], value[1][1], rtol=rtol, atol=1e-6)
    losses, gradients = losses_and_gradients(teacher(), name, alpha=1.0)
    np.testing.assert_allclose(losses, 0, atol=1e-14)
    np.testing.assert_allclose(gradients[1], 0, atol=1e-14)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_gradient_keeps_its_size_as_the_temperature_rises_but_for_tv(name):
    sizes = [losses_and_gradients(teacher(), name, temperature=t)[1][0].norm().item() for t in (100.0, 200.0)]
    assert sizes[1] / sizes[0] == pytest.approx(2.0 if name == "tv" else 1.0, rel=0.05)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("kind", ["dense", "top_k"])
def test_extreme_logits_stay_finite(name, kind):
    z = torch.tensor([[1e4, -1e4, 0, 0], [-1e4, 1e4, 0, 0], [1e4, 1e4, 0, -1e4]]).requires_grad_()
    t = torch.tensor([[1e4, -1e4, 0, 0], [1e4, -1e4, 0, 0], [0, 0, 0, 0.0]])
    p = t.log_softmax(1)
    source = (lambda rows: t[rows]) if kind == "dense" else TopK(torch.tensor([[0, 1]] * 3), p[:, :2], p[:, 2:].exp().sum(1))
    losses = token_losses(z, torch.eye(4), source, name)
    (slope,) = torch.autograd.grad(losses.sum(), z)
    assert losses.isfinite().all() and slope.isfinite().all()
    losses = losses.detach()
    bounded = {"js": math.log(2), "skew_kl": -math.log(0.1), "skew_reverse_kl": -math.log(0.1), "tv": 1.0}
    assert losses[0] == pytest.approx(0, abs=1e-6) and losses[1] > 0.5
    assert losses[1] <= bounded.get(name, 3e4) + 1e-5
    if name == "forward_kl":
        assert losses[1] == pytest.approx(2e4)


@pytest.mark.parametrize("name", sorted(set(DIVERGENCES) - {"reverse_kl"}))
def test_what_the_teacher_excludes_costs_what_the_oracle_says(name):
    h, w, _ = student()
    logits = draw(N, V, seed=8)
    logits[:, 2:5] = -math.inf
    losses = token_losses(h, w, lambda rows: logits[rows], name, beta=0.3)
    expected = oracle.token_losses((h @ w.T).numpy(), softmax(logits.numpy(), axis=1), {name: 1.0}, temperature=1.0, beta=0.3, alpha=0.1)
    np.testing.assert_allclose(losses, expected, rtol=1e-10)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_bfloat16_inputs_are_read_as_they_are_and_accumulated_in_float32(name):
    """Equal to float32 on the same rounded inputs, so that only the gradient's own rounding to bfloat16 is left."""
    x = [part.bfloat16() for part in student()]
    t = Projection(*(part.bfloat16() for part in (teacher().hidden, teacher().weight, teacher().bias)))
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        h, w, b = (part.to(dtype).requires_grad_() for part in x)
        form = Projection(t.hidden.to(dtype), t.weight.to(dtype), t.bias.to(dtype))
        losses = token_losses(h, w, form, name, bias=b, chunk=3, **SETTINGS)
        assert losses.dtype == torch.float32
        gradients = torch.autograd.grad(losses.mean(), (h, w, b))
        assert {g.dtype for g in gradients} == {dtype}
        results.append((losses, gradients))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-6)
    for half, single in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(half.float(), single, rtol=2**-7, atol=1e-5)


def test_a_half_precision_projection_of_several_blocks():
    rows = 9001
    h, w, t = draw(3, D, seed=1).bfloat16(), draw(rows, D, seed=2).bfloat16(), draw(3, rows, seed=3, dtype=torch.float32)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        x = h.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()
        losses = token_losses(*x, lambda s: t[s], "js")
        results.append((losses.detach(), *(g.float() for g in torch.autograd.grad(losses.sum(), x))))
    for half, single in zip(*results, strict=True):
        torch.testing.assert_close(half, single, rtol=2**-7, atol=1e-5)


def test_autocast_changes_nothing():
    h, w, _ = student(torch.float32)
    plain = token_losses(h, w, teacher(torch.float32), "js")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(token_losses(h, w, teacher(torch.float32), "js"), plain, rtol=0, atol=0)


# --- padding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("filler", [0.0, 1e3, -math.inf, math.nan])
def test_padded_vocabularies_never_enter(name, filler):
    plain_losses, plain = losses_and_gradients(teacher(), name)
    h, w, b = student()
    t = teacher()

    def padded(x: Tensor, rows: int) -> Tensor:
        return torch.cat([x, torch.full((rows, *x.shape[1:]), filler, dtype=x.dtype)])

    logits = padded((t.hidden @ t.weight.T + t.bias).T, 6).T
    for form in (Projection(t.hidden, padded(t.weight, 6), padded(t.bias, 6)), lambda rows: logits[rows]):
        x = [h.clone().requires_grad_(), padded(w, 3).requires_grad_(), padded(b, 3).requires_grad_()]
        losses = token_losses(x[0], x[1], form, name, bias=x[2], vocab=V, chunk=2, **SETTINGS)
        gradients = torch.autograd.grad(losses.mean(), x)
        torch.testing.assert_close(losses.detach(), plain_losses, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(gradients[0], plain[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(gradients[1][:V], plain[1], rtol=1e-10, atol=1e-12)
        assert not gradients[1][V:].any() and not gradients[2][V:].any()


IDS = [[1, 5, 6, 7, 2], [1, 8, 9, 2, 0], [3, 0, 0, 0, 0]]
MASK = [[False, False, True, True, True], [True, True, True, True, False], [True, False, False, False, False]]


def test_the_shift_at_its_boundaries():
    """The last prompt token predicts the first response token; a first token is predicted by nothing; the last state predicts nothing."""
    tokens = next_tokens(torch.tensor(IDS), torch.tensor(MASK))
    expected = oracle.next_token_pairs(IDS, MASK)
    assert expected == [(0, 1, 6), (0, 2, 7), (0, 3, 2), (1, 0, 8), (1, 1, 9), (1, 2, 2)]
    assert list(zip((tokens.rows // 5).tolist(), (tokens.rows % 5).tolist(), tokens.labels.tolist(), strict=True)) == expected
    states = torch.arange(15.0).view(3, 5, 1)
    assert tokens.take(states).flatten().tolist() == [1, 2, 3, 5, 6, 7] and tokens.count == 6


def batch_gradient(ids, mask, hidden, weight, splits, mix):
    """Value and gradients of one optimizer step, its sequences split into micro-batches."""
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    parts = [next_tokens(i, m) for i, m in zip(ids.split(splits), mask.split(splits), strict=True)]
    total = 0.0
    for tokens, states in zip(parts, h.split(splits), strict=True):
        of_teacher = Projection(tokens.take(states.detach()).flip(-1), weight)
        loss = tokens.mean(token_losses(tokens.take(states), w, of_teacher, mix), sum(p.count for p in parts))
        loss.backward()
        total += loss.item()
    return total, h.grad, w.grad


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_tokens_change_nothing(side):
    ids, mask, hidden, weight = torch.tensor(IDS), torch.tensor(MASK), draw(3, 5, D), draw(V, D, seed=1)
    ids, mask, hidden = ids[:2], mask[:2].clone(), hidden[:2]
    mask[1, 0] = False  # a first token of the text: with padding before it, only the mask can tell
    value, of_hidden, of_weight = batch_gradient(ids, mask, hidden, weight, 2, "reverse_kl")
    wide = (50, 0) if side == "left" else (0, 50)
    pad = torch.nn.functional.pad
    garbage = pad(hidden, (0, 0, *wide), value=math.nan)
    v, h, w = batch_gradient(pad(ids, wide), pad(mask, wide), garbage, weight, 2, "reverse_kl")
    assert v == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(h[:, 50:] if side == "left" else h[:, :5], of_hidden)
    torch.testing.assert_close(w, of_weight)


@pytest.mark.parametrize("splits", [1, 2])
def test_micro_batches_of_unequal_lengths_add_up(splits):
    """The third sequence has no token that counts: alone in a micro-batch it adds nothing."""
    ids, mask, hidden, weight = torch.tensor(IDS), torch.tensor(MASK), draw(3, 5, D), draw(V, D, seed=1)
    whole, parts = (batch_gradient(ids, mask, hidden, weight, s, "forward_kl") for s in (3, splits))
    assert parts[0] == pytest.approx(whole[0], rel=1e-12)
    torch.testing.assert_close(parts[1:], whole[1:], rtol=1e-10, atol=1e-12)


# --- what is kept, and how often it may be asked ----------------------------------------------------------------


@pytest.mark.parametrize("source", ["projection", "top_k"])
def test_nothing_of_tokens_by_vocabulary_is_kept(source):
    n, vocab = 64, 1000
    kept: list[int] = []
    h, w = draw(n, D).requires_grad_(), draw(vocab, D, seed=1).requires_grad_()
    t = Projection(draw(n, D, seed=2), draw(vocab, D, seed=3))
    if source == "top_k":
        top = (t.hidden @ t.weight.T).log_softmax(1).topk(5, 1)
        t = TopK(top.indices, top.values, 1 - top.values.exp().sum(1))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):
        losses = token_losses(h, w, t, {"js": 0.5, "tv": 0.5}, chunk=8)
        dense = (h @ w.T).softmax(1)
    own = [x for x in vars(losses.grad_fn).values() if isinstance(x, Tensor)] + [x for x in losses.grad_fn.slopes if x is not None]
    assert max(kept) == dense.numel() == n * vocab  # the hook sees what the dense form keeps
    assert kept.count(n * vocab) == 1
    assert own and max(x.numel() for x in own) == vocab * D


def test_a_second_backward_gives_the_same():
    x = [part.requires_grad_() for part in student()]
    total = token_losses(x[0], x[1], teacher(), "js", bias=x[2], chunk=3).mean()
    first = [g.clone() for g in torch.autograd.grad(total, x, retain_graph=True)]
    torch.testing.assert_close([g.clone() for g in torch.autograd.grad(total, x)], first)


def test_inputs_stay_and_only_the_student_gets_gradients():
    parts = [*student(), *vars(teacher()).values()]
    before = [x.clone() for x in parts]
    for x in parts:
        x.requires_grad_()
    mix = dict.fromkeys(DIVERGENCES, 1.0)
    token_losses(parts[0], parts[1], Projection(*parts[3:]), mix, bias=parts[2], **SETTINGS).sum().backward()
    assert all(torch.equal(x, y) for x, y in zip(parts, before, strict=True))
    assert all(x.grad is not None for x in parts[:3]) and all(x.grad is None for x in parts[3:])


def test_what_is_frozen_gets_nothing_and_costs_nothing():
    h, w, b = student()
    frozen = token_losses(h.requires_grad_(), w, teacher(), "js", bias=b)
    assert frozen.grad_fn.slopes == [None, None]
    with torch.no_grad():
        torch.testing.assert_close(token_losses(h, w, teacher(), "js", bias=b), frozen.detach(), rtol=0, atol=0)


def test_no_tokens_at_all():
    h, w, _ = (x.requires_grad_() for x in student())
    losses = token_losses(h[:0], w, Projection(draw(0, 2), draw(V, 2)), "tv")
    losses.sum().backward()
    assert losses.shape == (0,) and not w.grad.any()


# --- mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mix": "foward_kl"}, "did you mean 'forward_kl'"),
        ({"mix": {}}, "empty"),
        ({"mix": {"tv": math.nan}}, "finite"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"beta": 1.5}, "beta is 1.5"),
        ({"alpha": -0.1}, "alpha is -0.1"),
        ({"chunk": 0}, "chunk is 0"),
        ({"hidden": draw(N, D + 1)}, "do not fit"),
        ({"bias": draw(V + 1)}, "bias"),
        ({"teacher": teacher(rows=V + 1)}, "give vocab"),
        ({"teacher": Projection(draw(N + 1, 2), draw(V, 2))}, f"do not fit {N} tokens"),
        ({"teacher": lambda rows: draw(rows.stop - rows.start, V + 1)}, "give vocab"),
        ({"teacher": lambda rows: draw(N, V)}, "teacher logits"),
        ({"vocab": V + 1}, "vocab is 12"),
        ({"teacher": top_k(3, 2.0)}, "temperature 2.0"),
        ({"teacher": top_k(3, 1.0), "vocab": 2}, "top-k ids"),
        ({"teacher": TopK(torch.zeros(N, 1, dtype=torch.int64), torch.ones(N, 1), torch.zeros(N))}, "add up to 1"),
        ({"teacher": TopK(torch.zeros(N, 2, dtype=torch.int64), torch.full((N, 2), -1.0), torch.full((N,), 0.26))}, "twice"),
        ({"teacher": TopK(torch.zeros(N, 1, dtype=torch.int64), torch.zeros(N, 1), torch.zeros(1))}, "shapes"),
    ],
)
def test_mistakes_are_named(change, message):
    h, w, b = student()
    arguments = {"hidden": h, "weight": w, "bias": b, "teacher": teacher(), "mix": "js", "chunk": 3, **change}
    with pytest.raises(UserError, match=message):
        token_losses(**arguments)


def test_mistakes_about_tokens_are_named():
    ids, mask = torch.tensor(IDS), torch.tensor(MASK)
    tokens = next_tokens(ids, mask)
    for mistake in (
        lambda: next_tokens(ids, mask[:, 1:]),
        lambda: next_tokens(ids, mask.long()),
        lambda: tokens.take(draw(3, 4, D)),
        lambda: tokens.mean(torch.zeros(5), 6),
        lambda: tokens.mean(torch.zeros(6), 5),
    ):
        with pytest.raises(UserError):
            mistake()
