"""Tokenizers as maps between bytes and token ids, so that texts can pass from one to another without a byte lost."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from distillbench.errors import UserError
from distillbench.identity import sha256


class Tokenizer(Protocol):
    """What passing texts between tokenizers needs.

    Attributes:
        digest: of its definition; token ids of different digests never meet.
        vocab: entries that are no padding.  eos: the end-of-sequence token, which spells nothing.
    """

    @property
    def digest(self) -> str: ...  # noqa: D102

    @property
    def vocab(self) -> int: ...  # noqa: D102

    @property
    def eos(self) -> int: ...  # noqa: D102

    def spell(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes of each token; b"" for one that stands for no text."""
        ...

    def encode(self, text: bytes | str) -> list[int]:
        """Tokens whose spellings join to ``text``, no special one among them.

        Raises:
            UserError: the tokenizer cannot write these bytes.
        """
        ...


def _bytes(text: bytes | str) -> bytes:
    return text.encode() if isinstance(text, str) else text


class Bytes:
    """One token per byte, 0 to 255, and the end of sequence, 256."""

    digest = sha256(b"bytes and 256 for the end")
    vocab = 257
    eos = 256

    def spell(self, ids: Sequence[int]) -> list[bytes]:
        """As :meth:`Tokenizer.spell`."""
        return [b"" if i == self.eos else bytes([i]) for i in ids]

    def encode(self, text: bytes | str) -> list[int]:
        """As :meth:`Tokenizer.encode`; every text can be written."""
        return list(_bytes(text))


class Alphabet:
    """Symbols that are spelled with bytes. No spelling begins another one, so a text has one reading at most.

    Args:
        spellings: of tokens 0, 1, ...; that of ``eos`` is b"".

    Raises:
        UserError: a spelling is empty or begins another one.
    """

    def __init__(self, spellings: Sequence[bytes], eos: int) -> None:
        self.spellings, self.eos, self.vocab = tuple(spellings), eos, len(spellings)
        self.digest = sha256(json.dumps([eos, *(s.hex() for s in spellings)]).encode())
        self._symbols = {s: i for i, s in enumerate(spellings) if i != eos}
        ordered = sorted(s for i, s in enumerate(spellings) if i != eos)
        for one, two in itertools.pairwise(ordered):  # a beginning of others stands right before one of them
            if two.startswith(one):
                raise UserError(f"spelling {one!r} begins {two!r}: a text would have two readings; give spellings that begin no other")
        if ordered[:1] == [b""] or spellings[eos] != b"":
            raise UserError(f"the end of sequence, token {eos}, and no other token has the empty spelling b''")

    def spell(self, ids: Sequence[int]) -> list[bytes]:
        """As :meth:`Tokenizer.spell`."""
        return [self.spellings[i] for i in ids]

    def encode(self, text: bytes | str) -> list[int]:
        """As :meth:`Tokenizer.encode`. Raises UserError where the text is no row of symbols."""
        found, begin, whole = [], 0, _bytes(text)
        for end in range(1, len(whole) + 1):
            symbol = self._symbols.get(whole[begin:end])
            if symbol is not None:
                found.append(symbol)
                begin = end
        if begin < len(whole):
            raise UserError(f"{whole[begin : begin + 20]!r} at byte {begin} is spelled by no symbol of the alphabet")
        return found


class ByteLevelBPE:
    """A byte-level BPE of the tokenizers library (GPT-2, Llama 3, SmolLM2, Qwen): every token spells the bytes it stands for.

    Args:
        tokenizer: a ``tokenizers.Tokenizer``, or a fast tokenizer of transformers.  eos: its end-of-sequence token.
        spellings: of special tokens that stand for text; all others spell nothing.

    Raises:
        UserError: the tokenizer is not a byte-level one.
    """

    def __init__(self, tokenizer: Any, eos: int, spellings: Mapping[int, bytes] | None = None) -> None:
        from tokenizers import Tokenizer as Library

        definition = json.loads(getattr(tokenizer, "backend_tokenizer", tokenizer).to_str())
        definition |= {"truncation": None, "padding": None}
        if not any(part.get("type") == "ByteLevel" for part in _parts(definition.get("decoder"))):
            raise UserError("only byte-level tokenizers are supported: this one's decoder is not ByteLevel")
        whole = json.dumps(definition, sort_keys=True)
        self._library: Any = Library.from_str(whole)
        self._library.encode_special_tokens = True  # a text that looks like a special token is text
        self.eos, self.vocab = eos, self._library.get_vocab_size(with_added_tokens=True)
        special = {token["id"]: token for token in definition.get("added_tokens", [])}
        values = {character: value for value, character in _byte_characters().items()}
        self._spellings: dict[int, bytes] = {}
        for token, i in self._library.get_vocab(with_added_tokens=True).items():
            if i in special:
                self._spellings[i] = b"" if special[i]["special"] else token.encode()
            else:
                self._spellings[i] = bytes(values[c] for c in token)
        self._spellings |= dict(spellings or {})
        self._singles = {s[0]: i for i, s in self._spellings.items() if len(s) == 1 and i not in special}
        self.digest = sha256(f"{whole}{eos}{sorted((spellings or {}).items())}".encode())

    def spell(self, ids: Sequence[int]) -> list[bytes]:
        """As :meth:`Tokenizer.spell`."""
        return [self._spellings.get(i, b"") for i in ids]

    def encode(self, text: bytes | str) -> list[int]:
        """As :meth:`Tokenizer.encode`. Bytes that are no UTF-8 become tokens of one byte.

        Raises:
            UserError: the tokenizer changes the text (it normalises, or adds a space), or has no token for a stray byte.
        """
        whole, ids = _bytes(text), []
        for piece in re.split("([\udc80-\udcff])", whole.decode("utf-8", "surrogateescape")):
            if len(piece) == 1 and "\udc80" <= piece <= "\udcff":
                ids.append(self._singles.get(ord(piece) - 0xDC00, -1))
            elif piece:
                ids += self._library.encode(piece, add_special_tokens=False).ids
        if b"".join(self.spell(ids)) != whole:
            raise UserError(f"the tokenizer does not give {whole[:40]!r} back byte for byte, so texts cannot be aligned with it")
        return ids


def _parts(decoder: Any) -> list[dict[str, Any]]:
    return [] if decoder is None else [decoder, *(p for d in decoder.get("decoders", []) for p in _parts(d))]


def _byte_characters() -> dict[int, str]:
    """Byte -> the character that byte-level vocabularies write for it: itself where Latin-1 prints it, else the next from U+0100 on."""
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [b for b in range(256) if b not in printed]
    return {b: chr(b) for b in printed} | {b: chr(0x100 + i) for i, b in enumerate(hidden)}
