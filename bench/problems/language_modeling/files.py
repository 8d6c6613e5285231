"""What a paper setting of language modelling finds in the user's folder: JSONL files, models that share a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillbench.errors import UserError
from distillbench.identity import sha256
from distillbench.problems.language_modeling.models import TransformersLM, load, load_tokenizer


def json_lines(path: Path, fields: Mapping[str, type | tuple[type, ...]]) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object a line; empty lines are passed over.

    Args:
        fields: what every object must have, and of which type.

    Raises:
        UserError: the file cannot be read, or a line is no such object; says which.
    """
    found = []
    try:
        with path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    found.append(_row(line, fields, f"{path}:{number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); a file with one JSON object a line is wanted") from error
    if not found:
        raise UserError(f"{path}: is empty; a file with one JSON object a line is wanted")
    return found


def _row(line: str, fields: Mapping[str, type | tuple[type, ...]], where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is no JSON ({error}); one object a line is wanted") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: is {type(row).__name__} and no JSON object with the fields {', '.join(fields)}")
    for name, kind in fields.items():
        if not isinstance(row.get(name), kind):
            names = [k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,))]
            seen = f"is {type(row[name]).__name__}" if name in row else f"is missing (there are: {', '.join(sorted(row)) or 'none'})"
            raise UserError(f"{where}: field {name!r} {seen}; {' or '.join(names)} is wanted")
    return row


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer with what the engine needs to know of it.

    Attributes:
        digest: of everything that decides which ids a text becomes.
        size: entries; rows of a model's projection past them are padding.  eos: end of sequence.
    """

    tokenizer: Any
    digest: str
    size: int
    eos: int

    @staticmethod
    def of(path: Path) -> Vocabulary:
        """The tokenizer that lies in a model's folder.

        Raises:
            UserError: there is none, it has no ``tokenizer.json`` form, or no end of sequence.
        """
        tokenizer = load_tokenizer(str(path))
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise UserError(f"{path}: its tokenizer cannot be read as tokenizer.json; save it in that form beside the model")
        if tokenizer.eos_token_id is None:
            raise UserError(f"{path}: its tokenizer names no end of sequence (eos_token in tokenizer_config.json)")
        return Vocabulary(tokenizer, tokenizer_digest(tokenizer), max(tokenizer.get_vocab().values()) + 1, int(tokenizer.eos_token_id))

    def ids(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text; ``special`` adds what the tokenizer puts around a text by itself, such as a beginning of sequence."""
        return [int(i) for i in self.tokenizer.encode(text, add_special_tokens=special)]

    def text(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of what decides which ids a text becomes: entries, merges, normalisation, splitting, end of sequence.

    Two copies of one tokenizer that were saved with other lengths or padding have the same digest.
    """
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = [m.split(" ") if isinstance(m, str) else m for m in whole["model"].get("merges", [])]  # both forms are in use
    about = [
        sorted(tokenizer.get_vocab().items()),
        whole["model"].get("type"),
        merges,
        whole.get("normalizer"),
        whole.get("pre_tokenizer"),
        tokenizer.eos_token_id,
    ]
    return sha256(json.dumps(about, sort_keys=True).encode())


@dataclass(frozen=True)
class Pair:
    """A teacher, the student's initial weights, and the tokenizer that both have."""

    teacher: TransformersLM
    student: TransformersLM
    vocabulary: Vocabulary


def load_pair(teacher: Path, student: Path) -> Pair:
    """The models of two folders, each in transformers' format with its tokenizer.

    A projection may have more rows than the tokenizer has entries, and the two models different numbers of them.

    Raises:
        UserError: a folder is missing or unreadable, the tokenizers differ, or a projection has fewer rows than the tokenizer entries.
    """
    folders = {"teacher": teacher, "student": student}
    vocabularies = {role: Vocabulary.of(path) for role, path in folders.items()}
    if vocabularies["teacher"].digest != vocabularies["student"].digest:
        raise UserError(
            f"{folders['student']}: its tokenizer is not that of the teacher {folders['teacher']}; "
            f"this setting compares token by token and needs one tokenizer"
        )
    vocabulary = vocabularies["teacher"]
    models = {role: load(str(path)) for role, path in folders.items()}
    for role, model in models.items():
        rows = model.head[0].shape[0]
        if rows < vocabulary.size:
            raise UserError(f"{folders[role]}: its projection has {rows} rows, but its tokenizer has {vocabulary.size} entries")
    return Pair(models["teacher"], models["student"], vocabulary)
