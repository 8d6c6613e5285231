"""Chunks of two tokenizations: against the definition on random texts and cuts, and what batches make of them."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distillbench.errors import UserError
from distillbench.problems.language_modeling.alignment import align, chunks
from distillbench.problems.language_modeling.texts import Prompts
from distillbench.problems.language_modeling.tokenizers import Alphabet
from tests.keyed import reduced


def cut(text, positions):
    edges = [0, *sorted(p for p in positions if 0 < p < len(text)), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)] if text else []


TEXTS = st.text("ab \n", max_size=25).map(str.encode)
CUTS = st.sets(st.integers(1, 24))


def joined(tokens, positions):
    """The text of every chunk, in order."""
    found = {}
    for token, position in zip(tokens, positions, strict=True):
        found[position] = found.get(position, b"") + token
    return [found[i] for i in range(len(found))]


def edges(tokens):
    return set(itertools.accumulate(map(len, tokens)))


@given(TEXTS, CUTS, CUTS)
def test_chunks_are_the_shortest_stretches_with_the_same_bytes(text, one, other):
    left, right = cut(text, one), cut(text, other)
    a, b = chunks(left, right)
    assert len(a) == len(left) and len(b) == len(right)
    assert joined(left, a) == joined(right, b)
    # shortest: a chunk ends wherever both have an edge, and nowhere else
    assert set(itertools.accumulate(map(len, joined(left, a)))) == edges(left) & edges(right)


@given(TEXTS, CUTS, CUTS)
def test_space_chunks_end_before_white_space(text, one, other):
    left, right = cut(text, one), cut(text, other)
    a, b = chunks(left, right, space=True)
    assert joined(left, a) == joined(right, b)
    wanted = {e for e in edges(left) & edges(right) if e == len(text) or text[e : e + 1].isspace()}
    assert set(itertools.accumulate(map(len, joined(left, a)))) == wanted


@given(TEXTS, CUTS, st.booleans())
def test_one_tokenization_has_one_token_a_chunk(text, one, ended):
    tokens = cut(text, one) + [b""] * ended
    assert chunks(tokens, tokens) == (list(range(len(tokens))),) * 2


@given(TEXTS, CUTS, CUTS, st.booleans())
def test_the_end_of_sequence_is_a_chunk_of_its_own(text, one, other, space):
    plain = chunks(cut(text, one), cut(text, other), space=space)
    ended = chunks([*cut(text, one), b""], [*cut(text, other), b""], space=space)
    for before, after in zip(plain, ended, strict=True):
        assert after == [*before, before[-1] + 1 if before else 0]


def test_what_cannot_be_aligned_is_refused():
    with pytest.raises(UserError, match="same text"):
        chunks([b"ab"], [b"a", b"c"])
    for one, other in (([b"ab", b""], [b"ab"]), ([b"", b"ab"], [b"a", b"b"]), ([b"a", b"", b"b"], [b"ab"])):
        for pair in ((one, other), (other, one)):
            with pytest.raises(UserError, match="spells nothing"):
                chunks(*pair)


SYMBOLS = Alphabet([b"", b"a", b"ba", b"bb"], eos=0)
LETTERS = Alphabet([b"", b"a", b"b"], eos=0)


def pair(rows=((1, 2, 0), (3,), (2, 2, 3, 1), (0,))):
    """Responses in symbols (teacher) and letters (student) to prompts of two lengths."""
    index = torch.arange(len(rows))
    batches = []
    for one in (LETTERS, SYMBOLS):
        prompts = Prompts.of([one.encode("a" * (1 + i % 2)) for i in range(len(rows))], one.digest, 0)
        written = [one.encode(b"".join(SYMBOLS.spell(r))) + [0] * (r[-1] == 0) for r in rows]
        batches.append(prompts.with_responses(written, index, pad=0).take(index))
    return align(*batches, LETTERS.spell, SYMBOLS.spell)


def test_sums_over_chunks_are_those_of_each_row():
    batch = pair()
    assert batch.counts.tolist() == [3, 1, 4, 1]
    assert batch.student_chunks.tolist()[2] == [0, 0, 1, 1, 2, 2, 3]
    letters = torch.arange(1.0, batch.predicted.count + 1)  # 4 + 2 + 7 + 1 of them
    assert batch.of_student(letters).tolist() == [1, 2 + 3, 4, 5 + 6, 7 + 8, 9 + 10, 11 + 12, 13, 14]
    assert batch.of_teacher(torch.arange(1.0, 10)).tolist() == list(range(1, 10))
    with pytest.raises(UserError, match="one per response token"):
        batch.of_student(letters[1:])


@pytest.mark.parametrize("sizes", [(1, 3), (2, 2), (1, 1, 1, 1), (4,)])
def test_the_mean_over_the_chunks_of_the_whole_batch_survives_its_parts(sizes):
    batch, values = pair(), torch.rand(9, dtype=torch.float64)
    assert batch.units() == {"rows": 4, "tokens": 14, "chunks": 9}
    assert reduced(batch, values, "chunks").item() == pytest.approx(values.mean().item(), rel=1e-12)
    total, row, chunk = 0.0, 0, 0
    for size in sizes:
        part = batch.part(row, row + size)
        assert len(part.teacher) == size and part.teacher.ids.shape[1] == batch.teacher.ids.shape[1]
        mine = int(part.counts.sum())
        total += reduced(part, values[chunk : chunk + mine], "chunks").item()
        row, chunk = row + size, chunk + mine
    assert total == pytest.approx(values.mean().item(), rel=1e-12)
