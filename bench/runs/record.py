"""The record: what one run leaves behind.

``id`` is the SHA-256 of its identity (:mod:`.identities`); ``digest`` that of everything in the record but the two, so an edited or
truncated file is noticed. A file ``*.record`` is the record's JSON, compressed; the JSON itself, with every value spelled out, is what
``distillbench show --json`` prints. :meth:`Record.read` takes both.
"""

from __future__ import annotations

import base64
import datetime
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from distillbench.cards.card import Card, Metric, Setting, SuiteCard
from distillbench.cards.reading import from_data
from distillbench.errors import UserError
from distillbench.identity import canonical, sha256
from distillbench.runs.identities import fits, seeds_by_role
from distillbench.runs.packing import MAGIC, average, is_binary, open_up, pack, sound, squeeze, unpack

SCHEMA = 2
SUFFIX = ".record"
PNG = b"\x89PNG\r\n\x1a\n"
DIGEST = re.compile("[0-9a-f]{64}")

ROUNDING = 5.1e-7  # half a unit of the last of the seven digits that an example keeps, relative, and room for float64
AHEAD = datetime.timedelta(days=1)  # clocks and time zones differ

Status = Literal["ok", "failed", "skipped", "over_budget"]


@dataclass(frozen=True)
class Measurement:
    """One metric of one student.

    Attributes:
        examples: the values whose mean is ``value``, in the test split's order, packed; :attr:`per_example` reads them.
    """

    metric: str
    value: float
    n: int
    examples: str | None = None

    @property
    def per_example(self) -> tuple[float, ...] | None:
        """The values of the examples (or draws), or None where there are none to keep."""
        return None if self.examples is None else unpack(self.examples)

    @property
    def binary(self) -> bool:
        """Whether every example's value is 0 or 1."""
        return self.examples is not None and is_binary(self.examples)

    @staticmethod
    def of(metric: str, value: float, values: Sequence[float]) -> Measurement:
        """A value that was computed in another way than by averaging, and is the mean of ``values`` all the same, but for their rounding
        to seven significant digits. Raises ValueError where it is not."""
        made = Measurement(metric, value, len(values), pack([float(f"{v:.7g}") for v in values]))
        for fault in _mean(made):
            raise ValueError(fault)
        return made

    @staticmethod
    def mean(metric: str, values: Sequence[float]) -> Measurement:
        """The mean of per-example ``values``. Raises ValueError for no values: unscored is not zero."""
        if not len(values):
            raise ValueError(f"{metric}: nothing was scored")
        listed = [float(f"{v:.7g}") for v in values]
        return Measurement(metric, math.fsum(listed) / len(listed), len(listed), pack(listed))


@dataclass(frozen=True)
class Record:
    """What one run left. Immutable; a correction is a new record.

    Attributes:
        identity: what determines the result; see :mod:`.identities`.
        setting_name: what the suite calls the setting.
        cards: ``method`` and ``suite`` (at that setting) as they were, as plain data: the prose.
        code: ``digest`` of the abstract syntax of method, suite and all they import; ``fingerprint`` of those that held it to its
            versions, or None; ``loose``: module -> SHA-256 of the bytes of those whose versions are nobody's word; ``oracle``: see
            :class:`.code_of.CodeOf`.
        sources: the text of the method's own file, and of the loose modules that no package and no commit gives again: module -> text.
            Records made before these were kept have none.
        cost: ``total`` and ``phases`` (name -> the same meters): student_examples, student_steps, teacher_examples (asked),
            teacher_forwards (computed, less what a cache held), teacher_flops, auxiliary_examples, training_flops, wall_seconds,
            peak_memory_bytes, parameters, student_bytes (of the exported file; None where there is none).
        student: how to rebuild it: architecture, arguments, sha256 of its file; of a student of several parts these by ``parts``.
        before: of a record that was migrated: its ``schema`` and ``id`` before, and ``sources``, the digests it had then.
        picture: a sheet of a generator's samples, a PNG in base64.
        artifacts: what judging gave to look at, name -> ``sha256`` of its bytes, under which the store keeps them, and ``kind``.
        digest: that of the file it was read from, or None.
    """

    identity: dict[str, Any]
    setting_name: str
    cards: dict[str, Any]
    code: dict[str, Any]
    status: Status
    reason: str | None
    measurements: tuple[Measurement, ...]
    cost: dict[str, Any]
    student: dict[str, Any] | None
    environment: dict[str, Any]
    created: str
    trace: dict[str, list[float]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    before: dict[str, Any] | None = None
    picture: str | None = None
    artifacts: dict[str, dict[str, str]] = field(default_factory=dict)
    digest: str | None = field(default=None, compare=False)

    @property
    def id(self) -> str:
        """The SHA-256 of the identity (64 hexadecimal digits)."""
        return sha256(canonical(self.identity))

    @property
    def method(self) -> Card:
        """The method's card as it was when the run was made."""
        card: Card = from_data(self.cards["method"])
        return card

    @property
    def suite(self) -> SuiteCard:
        """The suite's card as it was, with the one setting that was run."""
        card: SuiteCard = from_data(self.cards["suite"])
        return card

    @property
    def setting(self) -> Setting:
        """The setting's card as it was."""
        return self.suite.settings[self.setting_name]

    @property
    def track(self) -> str:
        """``suite/setting``."""
        return f"{self.identity['suite']['slug']}/{self.setting_name}"

    @property
    def slug(self) -> str:
        """The method's slug."""
        return str(self.identity["method"]["slug"])

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The method's hyper-parameters, all of them."""
        return dict(self.identity["method"]["hyperparameters"])

    @property
    def split(self) -> str:
        """``test``, or ``tune`` for a trial."""
        return str(self.identity["split"])

    @property
    def seed(self) -> int:
        """The run's seed; the seeds by role follow from it."""
        return int(self.identity["seed"])

    @property
    def finished(self) -> bool:
        """Whether it was scored: counted from the measurements, never from a file's existence."""
        return self.status in ("ok", "over_budget") and bool(self.measurements)

    def value(self, metric: str) -> float | None:
        """The measured value, or None where the metric was not scored."""
        return next((m.value for m in self.measurements if m.metric == metric), None)

    # --- in and out of files ------------------------------------------------------------------------------------------

    def _body(self) -> dict[str, Any]:
        """The fields of the file, those left out that a record does without."""
        left_out = dict.fromkeys(("before", "picture")) | {"sources": {}, "artifacts": {}}
        shown = {k: v for k, v in vars(self).items() if k != "digest" and not (k in left_out and v == left_out[k])}
        return {"schema": SCHEMA, **shown, "measurements": [_plain(m) for m in self.measurements]}

    def to_bytes(self) -> bytes:
        """The bytes of its file."""
        body = self._body()
        whole = {"id": self.id, "digest": sha256(canonical(body)), **body}
        return squeeze(json.dumps(whole, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode())

    def to_json(self) -> str:
        """The record for people and other programs: JSON, a line for each field, per-example values spelled out."""
        body = self._body()
        spelled = [{**_plain(m), "examples": m.per_example} if m.examples is not None else _plain(m) for m in self.measurements]
        whole = {"id": self.id, "digest": sha256(canonical(body)), **body, "measurements": spelled}
        lines = (f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'), allow_nan=False)}" for k, v in whole.items())
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @staticmethod
    def from_bytes(content: bytes | str, where: str = "record") -> Record:
        """The record in the content of a file, compressed or JSON.

        Raises:
            UserError: truncated, edited, of another schema, or not a record; ``where`` is named in the message.
        """
        try:
            raw = content.encode() if isinstance(content, str) else content
            data = json.loads(open_up(raw) if raw.startswith(MAGIC) else raw)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: corrupt or truncated record ({error}); delete it and run again") from error
        if not isinstance(data, dict) or "schema" not in data:
            raise UserError(f"{where}: not a distillbench record")
        if data["schema"] != SCHEMA:
            old = isinstance(data["schema"], int) and data["schema"] < SCHEMA
            how = "'distillbench records migrate' brings its folder up to date" if old else "upgrade distillbench"
            raise UserError(f"{where}: record of schema {data['schema']!r}, this version reads {SCHEMA}; {how}")
        try:
            stated, digest = data.pop("id"), data.pop("digest")
            for m in data["measurements"]:
                if isinstance(m.get("examples"), list):
                    m["examples"] = pack(m["examples"])
                if m.get("examples") is not None and not sound(m["examples"]):
                    raise ValueError(f"examples of {m['metric']}")
            same = sha256(canonical(data)) == digest
            del data["schema"]
            measured = tuple(Measurement(m["metric"], m["value"], m["n"], m.get("examples")) for m in data.pop("measurements"))
            record = Record(**data, measurements=measured, digest=digest)
            if record.picture is not None and not base64.b64decode(record.picture, validate=True).startswith(PNG):
                raise ValueError("picture")
            if not all(set(a) == {"sha256", "kind"} and DIGEST.fullmatch(a["sha256"]) for a in record.artifacts.values()):
                raise ValueError("artifacts")  # a digest names a file
            same = same and record.id == stated
            suite = record.suite
            whole = same and fits(record.identity, record.method, suite, record.setting_name)
            odd = next(_faults(record, suite), None) if whole else None
            texts = {**record.sources}
            loose, _ = {**record.code["loose"]}, {**record.environment.get("packages", {})}
            if not all(isinstance(t, str) for t in texts.values()):
                raise ValueError("sources")
            same = same and all("\ufffd" in t or loose.get(name, sha256(t.encode())) == sha256(t.encode()) for name, t in texts.items())
            _ = (record.track, record.slug, record.seed)  # an identity without its parts is damage too, met here and not in a table
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{where}: not a whole record (missing or odd {error}); delete it and run again") from error
        except UserError as error:
            raise UserError(f"{where}: {' '.join(str(error).split())}") from error
        if not same:
            raise UserError(f"{where}: its content does not match its digest: it was edited or damaged; restore it or run again")
        if not whole:
            raise UserError(f"{where}: its cards are not those of its identity: it was put together from two records; run it again")
        if odd is not None:
            raise UserError(f"{where}: {odd}: no run can have left that; delete it and run again")
        return record

    @staticmethod
    def read(path: Path) -> Record:
        """The record in the file at ``path``. Raises UserError as :meth:`from_bytes`, or where the file cannot be read."""
        try:
            return Record.from_bytes(path.read_bytes(), str(path))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _faults(record: Record, suite: SuiteCard) -> Iterator[str]:
    """What a whole record says that no run can have left, each as the end of a sentence that begins with where it lies.

    Met where it is read, so that a bad file costs its own row and nothing else. ``suite``: its card, at the setting that was run.
    """
    identity = record.identity
    if dict(identity["seeds"]) != seeds_by_role(identity["seed"]):
        yield f"its seeds by role are not those of seed {identity['seed']}"
    if record.status not in get_args(Status):
        yield f"its status is {record.status!r}, which is none of {', '.join(get_args(Status))}"
    if not (record.reason is None or isinstance(record.reason, str)):
        yield "its reason is no text"
    if not all(part["distribution"] is None or isinstance(part["distribution"], str) for part in (identity["method"], identity["suite"])):
        yield "its distribution is no text"
    pinned = {role: asset.sha256 for role, asset in suite.settings[record.setting_name].assets.items()}
    digests = identity["setting"]["digests"]
    if set(digests) != set(pinned) or any(pin not in (None, digests[role]) for role, pin in pinned.items()):
        yield f"its digests ({', '.join(sorted(digests)) or 'none'}) are not those that its card pins"
    yield from _date(record.created)
    yield from _measured(record, suite)
    for name, count in record.cost["total"].items():
        if count is not None and not (_number(count) and count >= 0):
            yield f"its cost {name} is {count!r}"
    if record.student is not None and not DIGEST.fullmatch(str(record.student.get("sha256", ""))):
        yield "its student has no SHA-256"
    for term, values in record.trace.items():
        if not (isinstance(values, list | tuple) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)):
            yield f"its loss curve {term} is no list of numbers"


def _measured(record: Record, suite: SuiteCard) -> Iterator[str]:
    known: dict[str, Metric] = {m.name: m for m in (*suite.metrics, *suite.shown)}
    names = [m.metric for m in record.measurements]
    yield from (f"it measures {name} twice" for name in sorted({n for n in names if names.count(n) > 1}))
    for m in record.measurements:
        yield from _value(m, known.get(m.metric))  # a suite may show more than its card says
    if record.status == "ok":
        wanted: Iterable[str] = [suite.primary] if record.split == "tune" else [m.name for m in suite.metrics]
        yield from (f"it is ok, and {name} was not measured" for name in wanted if name not in names)


def _value(m: Measurement, metric: Metric | None) -> Iterator[str]:
    if not _number(m.value):
        yield f"{m.metric} is {m.value!r}, no finite number"
        return
    low, high = (metric and metric.range) or (None, None)
    if (low is not None and m.value < low) or (high is not None and m.value > high):
        yield f"{m.metric} = {m.value} is outside its range, {low} to {high}"
    if type(m.n) is not int or m.n < 1:
        yield f"{m.metric} stands for {m.n!r} examples"
    elif m.examples is not None and int(m.examples.partition(":")[0][1:]) != m.n:
        yield f"{m.metric} stands for {m.n} examples and carries {m.examples.partition(':')[0][1:]}"
    else:
        yield from _mean(m)


def _mean(m: Measurement) -> Iterator[str]:
    """Whether a value is the mean of its own examples, as far as the digits go that they keep."""
    if m.examples is not None:
        mean, size = average(m.examples)
        if not abs(mean - m.value) <= ROUNDING * size < math.inf:
            yield f"{m.metric} = {m.value} is not the mean of its examples, which is {mean:.7g}"


def _date(text: Any) -> Iterator[str]:
    try:
        made = datetime.datetime.fromisoformat(text)
        if made.tzinfo is None:
            raise ValueError("no time zone")
    except (TypeError, ValueError) as error:
        yield f"it was made at {text!r}, which is no date ({error})"
        return
    if made > datetime.datetime.now(datetime.UTC) + AHEAD:
        yield f"it was made at {text}, which is not yet"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _plain(m: Measurement) -> dict[str, Any]:
    return {k: v for k, v in vars(m).items() if v is not None}


def is_record_file(path: Path) -> bool:
    """Whether a file of this name may be a record: ``*.record``, or JSON that is no marker and no half-written file."""
    return path.suffix in (SUFFIX, ".json") and path.name != "store.json" and not path.name.startswith(".tmp-")


def read_records(*folders: Path) -> tuple[list[Record], list[str]]:
    """Every record below ``folders`` (or in stores), sorted by track, method and seed, and a line for each file that is not one.

    Raises:
        UserError: a folder is missing.
    """
    records: dict[str, Record] = {}
    bad: list[str] = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder of records; 'distillbench run' makes one with --out")
        # Of a store only the records: what lies beside them (checkpoints, caches) is JSON too, and may be large.
        place = folder / "records" if (folder / "store.json").is_file() and (folder / "records").is_dir() else folder
        for path in sorted(p for p in place.rglob("*") if is_record_file(p)):
            try:
                record = Record.read(path)
            except UserError as error:
                bad.append(str(error))
                continue
            records[str(record.digest)] = record
    return sorted(records.values(), key=lambda r: (r.track, r.slug, r.seed, r.id, r.created)), bad
