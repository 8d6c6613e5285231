"""Two kinds of text in one batch: denominators of each kind, whatever the padding and however the batch is split."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from distillbench.problems.language_modeling.mixed_texts import beside
from distillbench.problems.language_modeling.texts import Prompts, TokenBatch
from tests.keyed import reduced


def batch(seed, rows, longest, prompts=((5, 6, 7), (8,), (9, 4))):
    """Responses of 1 to ``longest`` tokens to prompts of unequal lengths, behind columns of their own width."""
    generator = torch.Generator().manual_seed(seed)
    pool = Prompts.of(prompts, "t", 0)
    length = torch.randint(1, longest + 1, (rows, 1), generator=generator)
    ids = torch.randint(1, 9, (rows, longest), generator=generator)
    return TokenBatch.fresh(pool, torch.arange(rows) % len(prompts), ids, torch.arange(longest)[None] < length)


def responses(x):
    return [row[mask].tolist() for row, mask in zip(x.ids, x.response, strict=True)]


def prompts_of(x):
    return [row[seen & ~mask].tolist() for row, seen, mask in zip(x.ids, x.attention, x.response, strict=True)]


def test_rows_of_both_kinds_keep_their_texts_and_responses_begin_at_one_position():
    ours, others = batch(0, 5, 4), batch(1, 3, 9, prompts=((1, 2, 3, 4, 5, 6), (7,)))
    mixed = beside(ours, others)
    assert responses(mixed) == responses(ours) + responses(others)
    assert prompts_of(mixed) == prompts_of(ours) + prompts_of(others)
    assert len({int(m.long().argmax()) for m in mixed.response}) == 1
    assert mixed.own.tolist() == [True] * 5 + [False] * 3
    own, others = int(ours.response.sum()), int(others.response.sum())
    assert mixed.units() == {"rows": 8, "tokens": own + others, "own": own, "beside": others}


def test_fresh_text_is_known_to_no_cache():
    fresh = batch(0, 4, 3)
    assert fresh.text == "" and fresh.rows.tolist() == [-1] * 4 and fresh.index.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("cuts", [(0, 8), (0, 1, 6, 8)])
def test_each_kind_has_the_mean_over_its_own_tokens(cuts, padding):
    mixed = beside(batch(2, 5, 6), batch(3, 3, 11))
    wide = {n: torch.nn.functional.pad(getattr(mixed, n), (padding, padding)) for n in ("ids", "attention", "response")}
    mixed = dataclasses.replace(mixed, **wide)
    lengths = [len(r) for r in responses(mixed)]
    values = [np.random.default_rng(i).standard_normal(n) for i, n in enumerate(lengths)]
    for unit, rows in (("own", range(5)), ("beside", range(5, 8))):
        expected = np.concatenate([values[i] for i in rows]).mean()
        total = 0.0
        for start, stop in itertools.pairwise(cuts):
            mine = [values[i] for i in range(start, stop) if i in rows]
            flat = torch.tensor(np.concatenate(mine) if mine else np.zeros(0))
            total += float(reduced(mixed.part(start, stop), flat, unit))
        assert total == pytest.approx(expected, rel=1e-6)


def test_without_others_it_is_the_batch_itself():
    ours = batch(0, 4, 5)
    mixed = beside(ours, None)
    assert torch.equal(mixed.ids, ours.ids) and bool(mixed.own_tokens.all())
    values = torch.arange(float(ours.predicted.count))
    assert torch.equal(reduced(mixed, values, "own"), reduced(ours, values, "tokens"))
    assert float(reduced(mixed, values[:0], "beside")) == 0
