"""Token batches: padding, the tokens that count, denominators, digests, epochs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from distillbench.errors import UserError
from distillbench.problems.language_modeling.texts import Prompts, TextBatches
from tests.keyed import reduced

PROMPTS = [[1, 2, 3], [4], [5, 6]]
RESPONSES = [[7], [8, 9, 10, 0], [11, 0]]


def texts(pad=0):
    return Prompts.of(PROMPTS, "tok", pad).with_responses(RESPONSES, pad=pad)


def test_prompts_end_and_responses_begin_at_one_position():
    t = texts(pad=99)
    np.testing.assert_array_equal(t.ids, [[1, 2, 3, 7, 99, 99, 99], [99, 99, 4, 8, 9, 10, 0], [99, 5, 6, 11, 0, 99, 99]])
    np.testing.assert_array_equal(t.attention, t.ids != 99)
    np.testing.assert_array_equal(t.response, [[0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0]])
    assert t.index.tolist() == [0, 1, 2] and t.tokenizer == "tok"


def test_batches_lose_the_padding_they_do_not_need_and_nothing_else():
    t = texts()
    batch = t.take(torch.tensor([2, 2]))
    np.testing.assert_array_equal(batch.ids, [[5, 6, 11, 0]] * 2)
    np.testing.assert_array_equal(batch.response, [[False, False, True, True]] * 2)
    assert batch.rows.tolist() == [2, 2] == batch.index.tolist() and batch.text == t.digest
    mixed = t.take(torch.tensor([0, 1]))
    assert mixed.ids.shape == (2, 7)
    for row, batch in ((0, t.take(torch.tensor([0]))), (1, t.take(torch.tensor([1])))):
        np.testing.assert_array_equal(mixed.ids[row][mixed.attention[row]], batch.ids[0])


def test_the_predictions_that_count_are_the_response_tokens():
    batch = texts().take(torch.tensor([0, 1, 2]))
    assert batch.predicted.labels.tolist() == [7, 8, 9, 10, 0, 11, 0]
    before = batch.ids.flatten()[batch.predicted.rows].tolist()
    assert before == [3, 4, 8, 9, 10, 6, 11]


def test_every_token_weighs_the_same_however_the_batch_is_split():
    batch = texts().take(torch.tensor([0, 1, 2]))
    values = torch.tensor([1.0, 2, 3, 4, 5, 6, 7])
    assert batch.units() == {"rows": 3, "tokens": 7}
    np.testing.assert_allclose(reduced(batch, values, "tokens"), values.mean())
    start = 0
    parts = []
    for low, high in ((0, 1), (1, 3)):
        part = batch.part(low, high)
        n = part.predicted.count
        assert part.units()["tokens"] == n and part.total("tokens") == 7 and part.total("rows") == 3
        parts.append(reduced(part, values[start : start + n], "tokens"))
        start += n
    np.testing.assert_allclose(sum(parts), values.mean())
    np.testing.assert_allclose(batch.per_sequence(values), [1, 3.5, 6.5])


def test_values_of_another_shape_are_refused():
    batch = texts().take(torch.tensor([0, 1]))
    with pytest.raises(UserError, match=r"one value per token that counts: \(5,\)"):
        batch.per_sequence(torch.zeros(7))
    with pytest.raises(UserError, match="one value for each of the 5 tokens"):
        reduced(batch, torch.zeros(7), "tokens")


def test_rows_without_a_response_count_for_nothing():
    t = Prompts.of([[1, 2], [3]], "tok", 0).with_responses([[], [4]], pad=0)
    batch = t.take(torch.tensor([0, 1]))
    assert float(reduced(batch, torch.tensor([3.0]), "tokens")) == 3.0
    assert batch.per_sequence(torch.tensor([3.0])).tolist() == [0, 3]
    empty = t.take(torch.tensor([0]))
    assert float(reduced(empty, torch.zeros(0), "tokens")) == 0 and empty.per_sequence(torch.zeros(0)).tolist() == [0]


def test_digests_follow_the_bytes():
    assert texts().digest == texts().digest
    others = [
        texts(pad=1).digest,
        Prompts.of(PROMPTS, "tok", 0).with_responses([[7], [8, 9, 10, 0], [12, 0]], pad=0).digest,
        texts().some(torch.tensor([0, 1])).digest,
        texts().some(torch.tensor([1, 0, 2])).digest,
    ]
    assert len({texts().digest, *others}) == 5
    assert texts().some(torch.arange(3)).digest == texts().digest


def test_responses_to_chosen_prompts():
    t = Prompts.of(PROMPTS, "tok", 0).with_responses([[7], [8]], torch.tensor([2, 0]), pad=0)
    assert t.index.tolist() == [2, 0]
    batch = t.take(torch.tensor([0]))
    np.testing.assert_array_equal(batch.ids, [[5, 6, 7]])


def test_prompts_keep_no_columns_of_padding_alone():
    some = Prompts.of(PROMPTS, "tok", 0).take(torch.tensor([1, 2]))
    np.testing.assert_array_equal(some.ids, [[0, 4], [5, 6]])
    np.testing.assert_array_equal(some.attention, [[False, True], [True, True]])


@pytest.mark.parametrize("prompts", [[], [[1], []]])
def test_empty_prompts_are_refused(prompts):
    with pytest.raises(UserError, match="prompt"):
        Prompts.of(prompts, "tok", 0)


def test_epochs_are_permutations_and_resume_anywhere():
    t = Prompts.of([[i + 1] for i in range(7)], "tok", 0).with_responses([[9]] * 7, pad=0)
    batches = TextBatches(t, 3, seed=4)
    seen = [b.rows.tolist() for b in itertools.islice(batches.stream(0), 8)]
    for epoch in range(4):
        rows = [*seen[2 * epoch], *seen[2 * epoch + 1]]
        assert len(set(rows)) == 6
    assert seen[:2] != seen[2:4]
    for start in range(6):
        assert [b.rows.tolist() for b in itertools.islice(batches.stream(start), 2)] == seen[start : start + 2]
    assert TextBatches(t, 100, seed=4).batch_size == 7


def test_no_texts_make_no_batches():
    with pytest.raises(UserError, match="no texts"):
        TextBatches(texts().some(torch.arange(0)), 3, seed=4)


def test_more_rows_than_there_are_is_one_line():
    with pytest.raises(UserError, match="row 3 of 3 texts"):
        texts().some(torch.arange(4))
