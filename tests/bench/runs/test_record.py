import base64
import dataclasses
import json
import math

import pytest

from distillbench.errors import UserError
from distillbench.identity import ROLES, canonical, derive_seed, identity, sha256
from distillbench.runs.record import Measurement, Record, read_records

SPEC = {
    "schema": 1,
    "engine": 1,
    "suite": {"card": {"_": "SuiteCard", "slug": "s", "version": 1}, "source": "ab"},
    "setting": "tiny",
    "split": "test",
    "digests": {"data": None, "teacher": None},
    "method": {
        "card": {"_": "Card", "slug": "m", "version": 1},
        "source": "cd",
        "hyperparameters": {"temperature": 0.1, "n": 3, "on": True},
    },
    "seed": 0,
    "seeds": {"init": 5},
}
# Frozen identities: sha256 of the text printf'd by hand below, never recomputed by the code under test.
TEXT = (
    '{"digests":{"data":null,"teacher":null},"engine":1,"method":{"card":{"_":"Card","slug":"m","version":1},"hyperparameters":'
    '{"n":3,"on":true,"temperature":0.1},"source":"cd"},"schema":1,"seed":0,"seeds":{"init":5},"setting":"tiny","split":"test",'
    '"suite":{"card":{"_":"SuiteCard","slug":"s","version":1},"source":"ab"}}'
)
GOLDEN = "d271f91f800da7b2f9bea3061326811de8bf2a9b53152d8b8e908373017392f7"
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
        "spec": SPEC,
        "status": "ok",
        "reason": None,
        "measurements": (Measurement.mean("top1", [1.0, 0.0, 1.0]),),
        "cost": {"total": {"wall_seconds": 0.25}, "phases": {}},
        "student": None,
        "environment": {},
        "created": "2026-01-01T00:00:00+00:00",
        "trace": {"fit/kd": [1.0, 0.5]},
    }
    return Record(**{**fields, **changes})


def test_the_identity_is_frozen():
    assert canonical(SPEC).decode() == TEXT
    assert identity(SPEC) == GOLDEN
    assert record().id == GOLDEN


def test_the_identity_does_not_depend_on_order_or_on_how_a_number_is_written():
    turned = json.loads(json.dumps(SPEC, sort_keys=True), object_pairs_hook=lambda pairs: dict(reversed(pairs)))
    assert list(turned) != list(SPEC) and identity(turned) == GOLDEN
    for text in ("0.10", "1e-1", "0.1000000000000000055", "1.0E-1"):
        again = json.loads(TEXT.replace('"temperature":0.1', f'"temperature":{text}'))
        assert identity(again) == GOLDEN


def leaves(node, path=()):
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from leaves(value, (*path, key))
    else:
        yield path


@pytest.mark.parametrize("path", list(leaves(SPEC)), ids="/".join)
def test_any_change_of_the_spec_changes_the_identity(path):
    changed = json.loads(json.dumps(SPEC))
    node = changed
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = "something else"
    assert identity(changed) != GOLDEN
    del node[path[-1]]
    assert identity(changed) != GOLDEN


def test_the_identity_does_not_depend_on_what_was_found():
    assert record(status="failed", reason="x", measurements=(), created="later").id == GOLDEN


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_has_no_place_in_a_record(bad):
    with pytest.raises(ValueError):
        identity({**SPEC, "seed": bad})
    with pytest.raises(ValueError):
        record(measurements=(Measurement("top1", bad, 3),)).to_json()


def test_a_record_survives_its_file(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(record().to_json())
    assert Record.read(path) == record()
    assert json.loads(path.read_text())["id"] == GOLDEN


def test_every_truncation_is_one_line():
    text = record().to_json().encode()
    for end in range(len(text) - 1):  # the last byte is the line's end
        with pytest.raises(UserError) as caught:
            Record.from_json(text[:end], "here")
        assert "\n" not in str(caught.value) and str(caught.value).startswith("here: ")


def test_every_edit_of_a_number_or_word_is_noticed():
    text = record().to_json()
    for old, new in (
        ("0.25", "0.26"),
        ('"ok"', '"failed"'),
        ('"tiny"', '"tiny2"'),
        ('"seed":0', '"seed":1'),
        ('"n":3', '"n":4'),
        ("0.5", "0.4"),
    ):
        assert old in text, old
        with pytest.raises(UserError, match="edited or damaged"):
            Record.from_json(text.replace(old, new), "here")


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
        ('{"schema": 2}', "schema 2, this version reads 1; upgrade"),
        ('{"schema": 1}', "not a whole record"),
        ('{"schema": 1, "id": "a", "digest": "b", "spec": 3}', "not a whole record"),
        (json.dumps({**json.loads(record().to_json()), "extra": 1}), "not a whole record"),
        (record().to_json().replace("0.25", "NaN"), "not a whole record"),
        (json.dumps({**json.loads(record().to_json()), "measurements": [3]}), "not a whole record"),
    ],
)
def test_what_is_no_record_is_one_line(text, says):
    with pytest.raises(UserError, match=says) as caught:
        Record.from_json(text, "here")
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
        (tmp_path / folder / "same.json").write_text(record().to_json())
    (tmp_path / "a" / "other.json").write_text(dataclasses.replace(record(), created="2026-02-02").to_json())
    (tmp_path / "a" / "store.json").write_text('{"schema": 1}')
    (tmp_path / "a" / ".tmp-half.json").write_text("{")
    (tmp_path / "b" / "bad.json").write_text("{")
    records, bad = read_records(tmp_path / "a", tmp_path / "b")
    assert [r.created[:10] for r in records] == ["2026-01-01", "2026-02-02"]
    assert len(bad) == 1 and "bad.json" in bad[0]
    with pytest.raises(UserError, match="no such folder"):
        read_records(tmp_path / "absent")


def test_the_digest_covers_everything_but_the_id():
    data = json.loads(record().to_json())
    stated = data.pop("digest"), data.pop("id")
    assert stated == (sha256(canonical(data)), GOLDEN)


def test_a_picture_is_a_png_or_the_record_is_refused():
    png = base64.b64encode(b"\x89PNG\r\n\x1a\n and more").decode()
    back = Record.from_json(record(picture=png).to_json())
    assert back.picture == png
    assert "picture" not in json.loads(record().to_json())  # records made before there were pictures keep their digest
    for bad in (base64.b64encode(b"<svg onload=alert(1)>").decode(), "not base64!", 3):
        with pytest.raises(UserError, match="not a whole record"):
            Record.from_json(record(picture=bad).to_json())
