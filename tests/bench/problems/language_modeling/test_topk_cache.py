"""The packed top-k distributions: what packing loses, how much room it takes, and files that are damaged, shared or killed."""

from __future__ import annotations

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp

from distillbench.errors import UserError
from distillbench.problems.language_modeling.texts import Prompts
from distillbench.problems.language_modeling.token_losses import TopK
from distillbench.problems.language_modeling.topk_cache import Layout, TopKTable, examples, top_k

SIZES = [(50, 49152), (1, 2), (3, 4), (5, 50), (7, 8), (16, 1000), (50, 151936), (1, 49152)]


def logits_of(count, vocab, seed=0, kind="zipf"):
    rng = np.random.default_rng(seed)
    if kind == "zipf":
        x = -rng.uniform(0.8, 4, (count, 1)) * np.log(np.arange(vocab) + 1) + 0.7 * rng.standard_normal((count, vocab))
        return rng.permuted(x, axis=1)
    return rng.uniform(1, 4, (count, 1)) * rng.standard_normal((count, vocab))


def packed(logits, k):
    layout = Layout(k, logits.shape[1])
    rows = layout.pack(*top_k(torch.from_numpy(logits), k))
    assert rows.dtype == np.uint8 and rows.shape == (len(logits), layout.width)
    return layout.unpack(rows)


def test_a_token_takes_114_bytes_at_50_of_49152():
    assert Layout(50, 49152).width <= 114


@pytest.mark.parametrize(("k", "vocab"), SIZES)
def test_ids_tail_and_normaliser_survive_packing(k, vocab):
    logits = logits_of(9, vocab)
    distribution, lse = packed(logits, k)
    kept = np.sort(np.argsort(-logits, axis=1, kind="stable")[:, :k], axis=1)
    np.testing.assert_array_equal(distribution.ids, kept)
    logs = log_softmax(logits, axis=1)
    rest = np.exp(logs)
    np.put_along_axis(rest, kept, 0, axis=1)
    np.testing.assert_allclose(distribution.tail, rest.sum(1), rtol=1e-4)
    np.testing.assert_allclose(lse, logsumexp(logits, axis=1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(distribution.log_probs.double().exp().sum(1), 1 - distribution.tail.double(), rtol=1e-5)
    if k == 1 and vocab == 2:
        np.testing.assert_allclose(distribution.log_probs[:, 0], logs.max(1), atol=1e-4)  # nothing is left to round


@pytest.mark.parametrize("kind", ["zipf", "normal"])
def test_what_rounding_the_values_costs(kind):
    logits = logits_of(100, 20000, seed=1, kind=kind)
    distribution, _ = packed(logits, 50)
    logs = np.take_along_axis(log_softmax(logits, axis=1), distribution.ids.numpy(), 1)
    p, tail = np.exp(logs), 1 - np.exp(logs).sum(1)
    lost = (p * (logs - distribution.log_probs.numpy())).sum(1) + tail * np.log(
        np.maximum(tail, 1e-12) / np.maximum(distribution.tail.numpy(), 1e-12)
    )
    assert lost.mean() < 1e-3 and lost.max() < 4e-3
    assert lost.min() > -1e-6
    assert lost.mean() > 1e-6  # or this test measures nothing


def test_the_ends_of_the_range():
    ids = torch.tensor([[0, 1, 2], [997, 998, 999], [0, 500, 999], [999, 3, 0]])
    even = torch.full((4, 3), 1 / 3).log()
    distribution, _ = Layout(3, 1000).unpack(Layout(3, 1000).pack(TopK(ids, even, torch.tensor([0.0, 0.0, 1e-30, 0.0])), torch.zeros(4)))
    np.testing.assert_array_equal(distribution.ids, ids.sort(1).values)
    np.testing.assert_allclose(distribution.log_probs, even, atol=1e-6)
    np.testing.assert_allclose(distribution.tail, [0, 0, 1e-30, 0], rtol=1e-4)


def test_fewer_possible_tokens_than_are_kept():
    logits = np.full((2, 100), -np.inf)
    logits[0, 7] = 3.0
    logits[1, [4, 90]] = np.log([0.25, 0.75])
    distribution, _ = packed(logits, 10)
    probability = np.zeros((2, 100))
    np.put_along_axis(probability, distribution.ids.numpy(), distribution.log_probs.double().exp().numpy(), 1)
    np.testing.assert_allclose(probability[0, 7], 1, atol=1e-6)
    np.testing.assert_allclose(probability[1, [4, 90]], [0.25, 0.75], atol=0.01)
    assert (distribution.tail == 0).all() and bool(torch.isfinite(distribution.log_probs).all())


def test_a_flat_distribution_of_a_large_vocabulary_keeps_some_mass():
    distribution, _ = packed(np.zeros((1, 151936)), 1)
    assert bool(torch.isfinite(distribution.log_probs).all()) and 0 < float(distribution.log_probs.exp()) < 2e-5 + 2**-17


def test_the_order_of_the_entries_is_nothing():
    distribution, lse = top_k(torch.from_numpy(logits_of(5, 60)), 6)
    turned = TopK(distribution.ids.flip(1), distribution.log_probs.flip(1), distribution.tail)
    np.testing.assert_array_equal(Layout(6, 60).pack(distribution, lse), Layout(6, 60).pack(turned, lse))


@pytest.mark.parametrize(("k", "vocab"), [(0, 10), (10, 10), (-1, 10), (11, 10)])
def test_k_is_below_the_vocabulary(k, vocab):
    with pytest.raises(UserError, match=r"top-k is .*; it must be in \[1, 10\)"):
        Layout(k, vocab)


def test_unpacking_a_batch_takes_milliseconds():
    layout = Layout(50, 49152)
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(np.stack([rng.choice(49152, 50, replace=False) for _ in range(400)]))
    logs = torch.from_numpy(rng.standard_normal((400, 50))).log_softmax(1) - 0.1
    rows = layout.pack(TopK(ids, logs, 1 - logs.exp().sum(1)), torch.zeros(400))
    times = []
    for _ in range(10):
        start = time.process_time()
        layout.unpack(rows)
        times.append(time.process_time() - start)
    assert min(times) < 0.01


# --- examples and files -----------------------------------------------------------------------------------------


def some_texts(count=70, seed=0, vocab=40):
    rng = np.random.default_rng(seed)
    lists = [[rng.integers(1, vocab, rng.integers(1, 5)).tolist() for _ in range(count)] for _ in range(2)]
    return Prompts.of(lists[0], "abc", 0).with_responses(lists[1], pad=0)


def distributions_by_token(batch):
    """Distributions that depend on the last token only."""
    table = torch.from_numpy(logits_of(40, 40, seed=3))
    return top_k(table[batch.predicted.take(batch.ids)], 4)


class Counting:
    def __init__(self, fail_at=None, pause=0.0):
        self.calls, self.fail_at, self.pause = 0, fail_at, pause

    def __call__(self, batch):
        time.sleep(self.pause)
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        self.calls += 1
        return distributions_by_token(batch)


def table(texts, folder, ask=None, teacher="t", k=4):
    return TopKTable(texts, Layout(k, 40), ask or Counting(), teacher=teacher, folder=folder)


def assert_right(found, batch):
    distribution, _ = distributions_by_token(batch)
    order = distribution.ids.sort(1)
    np.testing.assert_array_equal(found.ids, order.values)
    np.testing.assert_allclose(found.log_probs, distribution.log_probs.gather(1, order.indices), atol=0.25)
    np.testing.assert_allclose(found.tail, distribution.tail, rtol=1e-4)


@pytest.mark.parametrize("kept", [True, False])
def test_every_token_finds_its_own_distribution(tmp_path, kept):
    texts = some_texts()
    cache = table(texts, tmp_path if kept else None)
    for rows in ([0], [69, 3, 64, 3], list(range(70))):
        batch = texts.take(torch.tensor(rows))
        assert_right(cache.find(batch), batch)


def test_examples_are_known_by_their_bytes_not_by_row_or_padding(tmp_path):
    texts = some_texts()
    cache = table(texts, tmp_path)
    batch = texts.take(torch.tensor([5, 9]))
    alone = texts.take(torch.tensor([5]))
    assert examples(alone) == examples(batch)[:1]
    moved = texts.take(torch.tensor([9, 5]))
    object.__setattr__(moved, "rows", torch.tensor([5, 9]))
    assert_right(cache.find(moved), moved)
    position = batch.response[0].nonzero()[0]
    other = batch.ids.clone()
    other[0, position] = 1 + (other[0, position] + 1) % 39
    assert cache.find(dataclasses.replace(batch, ids=other)) is None


def test_a_batch_may_count_fewer_tokens_than_the_texts_do_and_no_others(tmp_path):
    texts = some_texts()
    cache = table(texts, tmp_path)
    batch = texts.take(torch.tensor([5, 9]))
    counted = batch.response.nonzero()
    fewer, more = batch.response.clone(), batch.response.clone()
    fewer[tuple(counted[::2].T)] = False
    more[0, int(counted[0, 1]) - 1] = True
    some = dataclasses.replace(batch, response=fewer)
    assert 0 < some.predicted.count < batch.predicted.count
    assert_right(cache.find(some), some)
    assert cache.find(dataclasses.replace(batch, response=more)) is None


def test_parts_are_computed_once_and_survive_a_kill(tmp_path):
    texts = some_texts(150)
    with pytest.raises(KeyboardInterrupt):
        table(texts, tmp_path, Counting(fail_at=2)).fill()
    second = Counting()
    cache = table(texts, tmp_path, second)
    cache.fill()
    cache.fill()
    assert second.calls == 1
    third = Counting()
    assert_right(table(texts, tmp_path, third).find(texts.take(torch.arange(150))), texts.take(torch.arange(150)))
    assert third.calls == 0


def test_two_at_once_compute_no_part_twice(tmp_path):
    texts, ask = some_texts(300), Counting(pause=0.02)
    tables = [table(texts, tmp_path, ask) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(t.fill) for t in tables]:
            done.result()
    assert ask.calls == 5
    batch = texts.take(torch.arange(100))
    assert torch.equal(*(t.find(batch).log_probs for t in tables))


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "longer", "header"])
def test_a_damaged_part_is_computed_anew(tmp_path, damage):
    texts = some_texts(20)
    table(texts, tmp_path).fill()
    [path] = tmp_path.glob("*.topk")
    whole = path.read_bytes()
    assert len(whole) < 200 + Layout(4, 40).width * int(texts.response.sum())
    broken = bytearray(whole)
    broken[120 if damage == "header" else -5] ^= 1
    path.write_bytes({"cut": whole[:-3], "empty": b"", "longer": whole + b"x"}.get(damage, bytes(broken)))
    again = Counting()
    cache = table(texts, tmp_path, again)
    batch = texts.take(torch.arange(20))
    assert_right(cache.find(batch), batch)
    assert again.calls == 1 and path.read_bytes() == whole


def test_another_teacher_or_k_or_text_shares_nothing(tmp_path):
    texts = some_texts(20)
    table(texts, tmp_path).fill()
    for other in (table(texts, tmp_path, Counting(), teacher="u"), table(some_texts(20, seed=1), tmp_path, Counting())):
        other.fill()
        assert other._ask.calls == 1
    wide = TopKTable(texts, Layout(5, 40), lambda b: top_k(torch.zeros(b.predicted.count, 40), 5), teacher="t", folder=tmp_path)
    assert wide.find(texts.take(torch.arange(3))).ids.shape[1] == 5
    assert len(list(tmp_path.glob("*.topk"))) == 4


def test_a_teacher_that_is_not_finite_is_refused(tmp_path):
    cache = table(some_texts(3), tmp_path, lambda b: top_k(torch.full((b.predicted.count, 40), float("nan")), 4))
    with pytest.raises(UserError, match="not finite"):
        cache.fill()
    assert not list(tmp_path.glob("*.topk"))
