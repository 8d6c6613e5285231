"""The record: what one run leaves behind, and how it is identified.

``id`` is the SHA-256 of the canonical JSON of the resolved spec: one function computes it for planned and for
finished work. ``digest`` is the SHA-256 of everything else in the record, so an edited or truncated file is noticed.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from distillbench.cards.card import Card, Setting, SuiteCard
from distillbench.cards.reading import from_data
from distillbench.errors import UserError
from distillbench.identity import canonical, identity, sha256

SCHEMA = 1
PNG = b"\x89PNG\r\n\x1a\n"

Status = Literal["ok", "failed", "skipped", "over_budget"]


@dataclass(frozen=True)
class Measurement:
    """One metric of one student. ``per_example`` are the values whose mean is ``value``, in the test split's order."""

    metric: str
    value: float
    n: int
    per_example: tuple[float, ...] | None = None

    @staticmethod
    def mean(metric: str, values: Sequence[float]) -> Measurement:
        """The mean of per-example ``values``. Raises ValueError for no values: unscored is not zero."""
        if not len(values):
            raise ValueError(f"{metric}: nothing was scored")
        listed = tuple(float(f"{v:.7g}") for v in values)
        return Measurement(metric, math.fsum(listed) / len(listed), len(listed), listed)


@dataclass(frozen=True)
class Record:
    """What one run left. Immutable; a correction is a new record.

    ``cost`` has ``total`` and ``phases`` (name -> the same meters): student_examples, student_steps,
    teacher_examples (asked), teacher_forwards (computed, less what a cache held), training_flops, wall_seconds,
    peak_memory_bytes, parameters. ``student`` says how to rebuild it: architecture, arguments, sha256 of its weights.
    ``picture`` is a sheet of a generator's samples, a PNG in base64; records without one do not have the field.
    """

    spec: dict[str, Any]
    status: Status
    reason: str | None
    measurements: tuple[Measurement, ...]
    cost: dict[str, Any]
    student: dict[str, Any] | None
    environment: dict[str, Any]
    created: str
    trace: dict[str, list[float]] = field(default_factory=dict)
    schema: int = SCHEMA
    picture: str | None = None

    @property
    def id(self) -> str:
        """The identity of the spec."""
        return identity(self.spec)

    @property
    def method(self) -> Card:
        """The method's card as it was when the run was made."""
        card: Card = from_data(self.spec["method"]["card"])
        return card

    @property
    def suite(self) -> SuiteCard:
        """The suite's card as it was, with the one setting that was run."""
        card: SuiteCard = from_data(self.spec["suite"]["card"])
        return card

    @property
    def setting(self) -> Setting:
        """The setting's card as it was."""
        return self.suite.settings[self.spec["setting"]]

    @property
    def track(self) -> str:
        """``suite/setting``."""
        return f"{self.spec['suite']['card']['slug']}/{self.spec['setting']}"

    @property
    def slug(self) -> str:
        """The method's slug."""
        return str(self.spec["method"]["card"]["slug"])

    @property
    def seed(self) -> int:
        """The run's seed; the seeds by role follow from it."""
        return int(self.spec["seed"])

    @property
    def finished(self) -> bool:
        """Whether it was scored: counted from the measurements, never from a file's existence."""
        return self.status in ("ok", "over_budget") and bool(self.measurements)

    def value(self, metric: str) -> float | None:
        """The measured value, or None where the metric was not scored."""
        return next((m.value for m in self.measurements if m.metric == metric), None)

    def to_json(self) -> str:
        """The record's text: JSON with ``id`` and ``digest`` first and a line for each field, short because examples are many."""
        body = {k: v for k, v in asdict(self).items() if k != "picture" or v is not None}
        whole = {"id": self.id, "digest": sha256(canonical(body)), **body}
        lines = (f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'), allow_nan=False)}" for k, v in whole.items())
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @staticmethod
    def from_json(text: str | bytes, where: str = "record") -> Record:
        """The record in ``text``.

        Raises:
            UserError: truncated, edited, of a newer schema, or not a record; ``where`` is named in the message.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: corrupt or truncated record ({error}); delete it and run again") from error
        if not isinstance(data, dict) or "schema" not in data:
            raise UserError(f"{where}: not a distillbench record")
        if data["schema"] != SCHEMA:
            raise UserError(f"{where}: record of schema {data['schema']}, this version reads {SCHEMA}; upgrade distillbench")
        try:
            stated, digest = data.pop("id"), data.pop("digest")
            same = sha256(canonical(data)) == digest and identity(data["spec"]) == stated
            data["measurements"] = tuple(
                Measurement(m["metric"], m["value"], m["n"], None if m["per_example"] is None else tuple(m["per_example"]))
                for m in data["measurements"]
            )
            record = Record(**data)
            if record.picture is not None and not base64.b64decode(record.picture, validate=True).startswith(PNG):
                raise ValueError("picture")
            _ = (record.track, record.slug, record.seed)  # a spec without its parts is damage too, met here and not in a table
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{where}: not a whole record (missing or odd {error}); delete it and run again") from error
        if not same:
            raise UserError(f"{where}: its content does not match its digest: it was edited or damaged; restore it or run again")
        return record

    @staticmethod
    def read(path: Path) -> Record:
        """The record in the file at ``path``. Raises UserError as :meth:`from_json`, or where the file cannot be read."""
        try:
            return Record.from_json(path.read_bytes(), str(path))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def read_records(*folders: Path) -> tuple[list[Record], list[str]]:
    """Every record below ``folders``, sorted by id, and a line for each file that is not one.

    Raises:
        UserError: a folder is missing.
    """
    records: dict[str, Record] = {}
    bad: list[str] = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder of records; 'distillbench run' makes one with --out")
        for path in sorted(folder.rglob("*.json")):
            if path.name == "store.json" or path.name.startswith(".tmp-"):
                continue
            try:
                record = Record.read(path)
            except UserError as error:
                bad.append(str(error))
                continue
            whole = {**vars(record), "measurements": [vars(m) for m in record.measurements]}
            records[sha256(canonical(whole))] = record  # its digest; to_json is ten times slower and this is every board's loop
    return sorted(records.values(), key=lambda r: (r.track, r.slug, r.seed, r.id, r.created)), bad
