"""The record and its file: whole or refused in one line, compressed or spelled out, the same either way."""

from __future__ import annotations

import base64
import copy
import dataclasses
import json
import math

import pytest

from distillbench.cards.card import Beats, Budget, Card, Metric, Real, Setting, SuiteCard, Training
from distillbench.cards.reading import to_data
from distillbench.errors import UserError
from distillbench.identity import ROLES, canonical, derive_seed, sha256
from distillbench.runs import identities
from distillbench.runs.packing import MAGIC, open_up, squeeze
from distillbench.runs.record import Measurement, Record, read_records

METHOD = Card(slug="m", version=1, problem="classification", title="M", hyperparameters={"temperature": Real(0.1)}, claims=(Beats("kd"),))
SUITE = SuiteCard(
    slug="s",
    version=1,
    problem="classification",
    title="S",
    metrics=(Metric(name="top1", unit="fraction", better="higher"),),
    primary="top1",
    controls=(),
    settings={
        "tiny": Setting(
            tier="analytic",
            summary="prose",
            budget=Budget(student_examples=64),
            training=Training(batch_size=4, optimizer="sgd", learning_rate=0.25),
            options={"on": True, "n": 3},
        )
    },
)
ARENA = identities.arena(SUITE, digests={}, precision="float32", split="test", distribution="d", kind=1, loose=None)
IDENTITY = identities.whole(ARENA, identities.method_part(METHOD, {"temperature": 0.1}, distribution="d", loose=None), 0)
# Frozen: the text was written by hand and put through sha256sum, never recomputed by the code under test.
TEXT = (
    '{"engine":1,"kind":{"slug":"classification","version":1},'
    '"method":{"distribution":"d","hyperparameters":{"temperature":0.1},"slug":"m","version":1},"seed":0,'
    '"seeds":{"data":75490049762945,"evaluation":245875428146576,"init":190042824161675,"noise":125276318774122,'
    '"order":160800256903213,"teacher":239334655204521},'
    '"setting":{"budget":{"student_examples":64,"teacher_examples":null,"training_flops":null,"wall_seconds":null},"digests":{},'
    '"metrics":["top1"],"options":{"n":3,"on":true},"tier":"analytic","training":{"batch_size":4,"betas":[0.9,0.999],"clip":null,'
    '"gamma":0.1,"learning_rate":0.25,"milestones":[],"momentum":0.0,"nesterov":false,"optimizer":"sgd","precision":"float32",'
    '"schedule":"constant","warmup":0.0,"weight_decay":0.0}},"split":"test",'
    '"suite":{"distribution":"d","slug":"s","version":1}}'
)
GOLDEN = "2ac10e4c49e44016f9915e2b77d36919dc84a81da88150d218d168b46990c2b4"
SEEDS = {  # printf '<role>/0' | sha256sum, first 12 hexadecimal digits
    "teacher": 0xD9AC711B1CA9,
    "data": 0x44A86599A681,
    "init": 0xACD7CB06B98B,
    "order": 0x923F3A31482D,
    "noise": 0x71F02A7AB36A,
    "evaluation": 0xDF9F558DBD90,
}


def record(**changes):
    fields = {
        "identity": IDENTITY,
        "setting_name": "tiny",
        "cards": {"method": to_data(METHOD), "suite": to_data(SUITE)},
        "code": {"digest": "c0de", "fingerprint": None, "loose": {}},
        "status": "ok",
        "reason": None,
        "measurements": (
            Measurement.mean("top1", [1.0, 0.0, 1.0]),
            Measurement.mean("nll", [0.5, -1.25e-7, 3.0]),
            Measurement("ece", 0.1, 3),
        ),
        "cost": {"total": {"wall_seconds": 0.375}, "phases": {}},
        "student": None,
        "environment": {"device": "cpu"},
        "created": "2026-01-01T00:00:00+00:00",
        "trace": {"fit/kd": [1.0, 0.625]},
    }
    return Record(**{**fields, **changes})


def test_the_identity_is_frozen():
    assert canonical(IDENTITY).decode() == TEXT
    assert sha256(TEXT.encode()) == GOLDEN == record().id


def test_the_identity_does_not_depend_on_order_or_on_how_a_number_is_written():
    turned = json.loads(json.dumps(IDENTITY, sort_keys=True), object_pairs_hook=lambda pairs: dict(reversed(pairs)))
    assert list(turned) != list(IDENTITY) and sha256(canonical(turned)) == GOLDEN
    for text in ("0.10", "1e-1", "0.1000000000000000055", "1.0E-1"):
        again = json.loads(TEXT.replace('"temperature":0.1', f'"temperature":{text}'))
        assert sha256(canonical(again)) == GOLDEN


def test_the_identity_does_not_depend_on_what_was_found_or_is_said():
    told = dataclasses.replace(METHOD, title="Another title", notes="It gains nothing.", claims=())
    cards = {"method": to_data(told), "suite": to_data(SUITE)}
    changed = record(status="failed", reason="x", measurements=(), created="2026-03-03T00:00:00+00:00", cards=cards)
    assert changed.id == GOLDEN
    assert Record.from_bytes(changed.to_bytes()).method.title == "Another title"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_has_no_place_in_a_record(bad):
    with pytest.raises(ValueError):
        canonical({**IDENTITY, "seed": bad})
    with pytest.raises(ValueError):
        record(measurements=(Measurement("top1", bad, 3),)).to_bytes()


def test_a_record_survives_its_file_compressed_or_spelled_out(tmp_path):
    packed, spelled = tmp_path / "r.record", tmp_path / "r.json"
    packed.write_bytes(record().to_bytes())
    spelled.write_text(record().to_json())
    assert Record.read(packed) == Record.read(spelled) == record()
    assert Record.read(spelled).to_bytes() == packed.read_bytes()
    shown = json.loads(spelled.read_text())
    assert shown["id"] == GOLDEN and shown["digest"] == Record.read(packed).digest
    assert shown["measurements"][1]["examples"] == [0.5, -1.25e-7, 3.0]


def test_every_truncation_is_one_line():
    for content in (record().to_json().encode(), record().to_bytes()):
        for end in range(0, len(content) - 1, 7):  # the last byte of the text is the line's end
            with pytest.raises(UserError) as caught:
                Record.from_bytes(content[:end], "here")
            assert "\n" not in str(caught.value) and str(caught.value).startswith("here: ")


def test_every_flipped_byte_of_a_file_is_noticed():
    content = record().to_bytes()
    for place in range(0, len(content), 5):
        with pytest.raises(UserError):
            Record.from_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :], "here")


def test_every_edit_of_a_number_or_word_is_noticed():
    text = record().to_json()
    for old, new in (
        ("0.375", "0.376"),
        ('"ok"', '"failed"'),
        ('"tiny"', '"tiny2"'),
        ('"seed":0', '"seed":1'),
        ('"n":3', '"n":4'),
        ("0.625", "0.626"),
        ("[1.0,0.0,1.0]", "[1.0,1.0,1.0]"),
    ):
        assert old in text, old
        with pytest.raises(UserError, match=r"edited or damaged|not a whole record"):
            Record.from_bytes(text.replace(old, new), "here")


def test_cards_that_say_something_else_than_the_identity_are_refused():
    """Else a record could be shown as one method and ranked as another."""
    for name, card in (("method", dataclasses.replace(METHOD, version=2)), ("suite", dataclasses.replace(SUITE, version=2))):
        forged = record(cards={**record().cards, name: to_data(card)})
        with pytest.raises(UserError, match="its cards are not those of its identity"):
            Record.from_bytes(forged.to_bytes(), "here")
    easier = copy.deepcopy(record().cards)
    easier["suite"]["settings"]["tiny"]["budget"]["student_examples"] = 65
    with pytest.raises(UserError, match="its cards are not those of its identity"):
        Record.from_bytes(record(cards=easier).to_bytes(), "here")


@pytest.mark.parametrize("place", [("engine",), ("kind", "version"), ("method", "version"), ("seed",)], ids=lambda p: ".".join(p))
@pytest.mark.parametrize("odd", ["1", 1.0, True, [1]])
def test_versions_and_seeds_are_whole_numbers(place, odd):
    """A board takes the newest of them: one odd record must not end it."""
    identity = copy.deepcopy(IDENTITY)
    node = identity if len(place) == 1 else identity[place[0]]
    node[place[-1]] = odd
    with pytest.raises(UserError, match=r"its cards are not those|not a whole record") as caught:
        Record.from_bytes(record(identity=identity).to_bytes(), "here")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("odd", ["", "b6:", "d2:AAAA", "d1:A*AAA", "b99999999999:", 3, {"a": 1}])
def test_examples_that_cannot_be_unpacked_are_met_where_the_record_is_read(odd):
    bad = record(measurements=(Measurement("top1", 0.5, 2, odd),))
    with pytest.raises(UserError, match="not a whole record"):
        Record.from_bytes(bad.to_bytes(), "here")


def test_a_bomb_is_not_unpacked(monkeypatch):
    monkeypatch.setattr("distillbench.runs.packing.LIMIT", 10_000)
    with pytest.raises(UserError, match="corrupt or truncated"):
        Record.from_bytes(squeeze(b'{"schema": 2, "x": "' + b"a" * 1_000_000 + b'"}'), "here")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "corrupt or truncated"),
        (b"\x80\x02\xff\x00", "corrupt or truncated"),
        (bytes(range(256)), "corrupt or truncated"),
        ("[" * 100_000, "corrupt or truncated"),
        ("[]", "not a distillbench record"),
        ("3", "not a distillbench record"),
        ("{}", "not a distillbench record"),
        ('{"schema": 3}', "schema 3, this version reads 2; upgrade"),
        ('{"schema": 1}', "schema 1, this version reads 2; 'distillbench records migrate' brings its folder up to date"),
        ('{"schema": 2}', "not a whole record"),
        ('{"schema": 2, "id": "a", "digest": "b", "measurements": [], "identity": 3}', "not a whole record"),
        (MAGIC, "corrupt or truncated"),
        (MAGIC + b"not zlib", "corrupt or truncated"),
        (squeeze(b"[]"), "not a distillbench record"),
        (json.dumps({**json.loads(record().to_json()), "extra": 1}), "not a whole record"),
        (record().to_json().replace("0.375", "NaN"), "not a whole record"),
        (json.dumps({**json.loads(record().to_json()), "measurements": [3]}), "not a whole record"),
    ],
)
def test_what_is_no_record_is_one_line(text, says):
    with pytest.raises(UserError, match=says) as caught:
        Record.from_bytes(text, "here")
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        Record.read(tmp_path)


def test_nothing_scored_is_not_zero():
    with pytest.raises(ValueError, match="nothing was scored"):
        Measurement.mean("top1", [])
    m = Measurement.mean("top1", [1, 0, 0, 0])
    assert (m.value, m.n, m.per_example) == (0.25, 4, (1.0, 0.0, 0.0, 0.0))


@pytest.mark.parametrize(
    ("status", "scored", "finished"), [("ok", 1, True), ("over_budget", 1, True), ("ok", 0, False), ("failed", 1, False)]
)
def test_finished_is_counted_from_what_was_scored(status, scored, finished):
    assert record(status=status, measurements=(Measurement.mean("top1", [1.0]),) * scored).finished is finished


def test_seeds_of_roles_are_frozen_and_independent():
    assert {role: derive_seed(role, 0) for role in ROLES} == SEEDS
    drawn = {derive_seed(role, seed) for role in ROLES for seed in range(1000)}
    assert len(drawn) == 1000 * len(ROLES)
    assert max(drawn) < 2**48  # exact in JSON readers that know doubles only
    assert derive_seed("init", 11) != derive_seed("init/1", 1)


def test_records_are_read_from_folders_once_each(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.record").write_bytes(record().to_bytes())
    (tmp_path / "b" / "same.json").write_text(record().to_json())
    (tmp_path / "a" / "other.json").write_text(dataclasses.replace(record(), created="2026-02-02T00:00:00+00:00").to_json())
    (tmp_path / "a" / "store.json").write_text('{"schema": 1}')
    (tmp_path / "a" / ".tmp-half.record").write_text("{")
    (tmp_path / "b" / "bad.json").write_text("{")
    records, bad = read_records(tmp_path / "a", tmp_path / "b")
    assert [r.created[:10] for r in records] == ["2026-01-01", "2026-02-02"]
    assert len(bad) == 1 and "bad.json" in bad[0]
    with pytest.raises(UserError, match="no such folder"):
        read_records(tmp_path / "absent")


def test_the_digest_covers_everything_but_the_id():
    data = json.loads(open_up(record().to_bytes()))
    stated = data.pop("digest"), data.pop("id")
    assert stated == (sha256(canonical(data)), GOLDEN)


def test_a_picture_is_a_png_or_the_record_is_refused():
    png = base64.b64encode(b"\x89PNG\r\n\x1a\n and more").decode()
    assert Record.from_bytes(record(picture=png).to_bytes()).picture == png
    assert not {"picture", "before", "sources"} & set(json.loads(record().to_json()))
    for bad in (base64.b64encode(b"<svg onload=alert(1)>").decode(), "not base64!", 3):
        with pytest.raises(UserError, match="not a whole record"):
            Record.from_bytes(record(picture=bad).to_bytes())


def test_sources_travel_along():
    made = record(sources={"helper": "x = 1\n"}, before={"schema": 1, "id": "ab"})
    assert Record.from_bytes(made.to_bytes()) == Record.from_bytes(made.to_json()) == made
