"""Records of schema 1 become records of schema 2: counted, told apart, and lossless."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distillbench.cli.main import main
from distillbench.errors import UserError
from distillbench.identity import canonical, sha256
from distillbench.leaderboard.table import boards
from distillbench.runs.migrate import migrate, migrated, read_old
from distillbench.runs.record import Record, read_records

ROOT = Path(__file__).parents[3]
OLD = ROOT / "tests/goldens/records_schema1"
PUBLISHED = ROOT / "leaderboard"


@pytest.fixture
def store(tmp_path):
    """A store of schema 1 as it lay on disk."""
    for path in sorted(OLD.glob("*.json")):
        spec = json.loads(path.read_text())["spec"]
        target = tmp_path / "records" / spec["suite"]["card"]["slug"] / spec["setting"] / spec["method"]["card"]["slug"]
        target.mkdir(parents=True, exist_ok=True)
        (target / path.name).write_bytes(path.read_bytes())
    (tmp_path / "store.json").write_text('{"schema": 1}\n')
    return tmp_path


def rewritten(path, **changes):
    """The content of a record of schema 1 with other values at some places, as :func:`read_old` gives it."""
    data = json.loads(path.read_bytes())
    del data["digest"]
    for place, value in changes.items():
        node = data
        *parents, last = place.split("__")
        for key in parents:
            node = node[key]
        node[last] = value
    return {**data, "id": sha256(canonical(data["spec"]))}


def test_a_store_is_migrated_whole_and_lossless(store):
    before = {(data := json.loads(p.read_text()))["id"]: data for p in OLD.glob("*.json")}
    done = migrate(store)
    assert len(done) == len(before) == 5 and not list((store / "records").rglob("*.json"))
    assert json.loads((store / "store.json").read_text()) == {"schema": 2}
    found, bad = read_records(store / "records")
    assert bad == [] and {r.before["id"] for r in found} == set(before)
    for record in found:
        old = before[record.before["id"]]
        for m, was in zip(record.measurements, old["measurements"], strict=True):
            assert (m.metric, m.value, m.n) == (was["metric"], was["value"], was["n"])
            assert (None if m.per_example is None else list(m.per_example)) == was["per_example"]
        kept = ("cost", "student", "environment", "created", "trace", "status", "reason")
        assert [getattr(record, k) for k in kept] == [old[k] for k in kept]
        assert record.cards["method"] == old["spec"]["method"]["card"]
        assert record.hyperparameters == old["spec"]["method"]["hyperparameters"]
        assert record.code["digest"] is None  # nobody knows what its code said: it is shown, and never used again
    assert migrate(store) == []


def test_the_command_says_what_became_of_what(store, capsys):
    assert main(["records", "migrate", str(store), "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert {Record.read(Path(d["file"])).before["id"] for d in done} == {d["before"] for d in done}
    assert main(["records", "migrate", str(store)]) == 0
    assert "0 records" in capsys.readouterr().err
    assert main(["records", "migrate", str(store / "absent")]) == 2


def test_a_damaged_record_stops_it_before_anything_is_changed(store):
    [first, *_] = sorted((store / "records").rglob("*.json"))
    first.write_text(first.read_text().replace('"status": "ok"', '"status": "failed"'))
    before = {p: p.read_bytes() for p in store.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="edited or damaged"):
        migrate(store)
    assert {p: p.read_bytes() for p in store.rglob("*") if p.is_file()} == before


def test_arenas_and_entries_that_were_apart_stay_apart():
    [path, *_] = sorted(OLD.glob("*.json"))
    later = "2027-01-01T00:00:00+00:00"
    news = migrated(
        [
            rewritten(path),
            rewritten(path, spec__suite__source="ab" * 32, created=later),
            rewritten(path, spec__method__source="cd" * 32, created="2026-12-01T00:00:00+00:00"),
        ]
    )
    assert len({r.id for r in news}) == 3
    assert [("loose" in r.identity["suite"], "loose" in r.identity["method"]) for r in news] == [
        (True, True),
        (False, False),
        (True, False),
    ]
    found, bad = boards(news)
    assert bad == [] and sorted(len(b.rows) for b in found) == [1, 2]
    [dirty] = migrated([rewritten(path, environment__dirty=True)])
    assert dirty.identity["method"]["loose"] == json.loads(path.read_text())["spec"]["method"]["source"]


def test_a_cell_that_is_not_made_again_stays_an_older_version(store, capsys):
    assert main(["records", "migrate", str(store), "--older", "speculative/smollm2 gkdd"]) == 2
    assert "did you mean 'speculative/smollm2 gkd'" in capsys.readouterr().err
    assert main(["records", "migrate", str(store), "--older", "speculative/smollm2 gkd"]) == 0
    by_track = {r.track: r for r in read_records(store)[0]}
    assert by_track["speculative/smollm2"].identity["kind"]["version"] == 0
    assert by_track["language-modeling/markov"].identity["kind"]["version"] == 1


@pytest.mark.parametrize("lost", [("measurements",), ("environment",), ("spec", "digests"), ("spec", "method", "hyperparameters")])
def test_a_record_without_a_part_is_one_line_and_changes_nothing(store, lost, capsys):
    [first, *_] = sorted((store / "records").rglob("*.json"))
    data = json.loads(first.read_text())
    node = data
    for key in lost[:-1]:
        node = node[key]
    del node[lost[-1]]
    body = {k: v for k, v in data.items() if k not in ("id", "digest")}
    data |= {"id": sha256(canonical(data["spec"])), "digest": sha256(canonical(body))}
    first.write_text(json.dumps(data))
    before = {p: p.read_bytes() for p in store.rglob("*") if p.is_file()}
    assert main(["records", "migrate", str(store)]) == 2
    err = capsys.readouterr().err
    assert "not a whole record of schema 1" in err and err.count("\n") == 1
    assert {p: p.read_bytes() for p in store.rglob("*") if p.is_file()} == before


def test_a_folder_called_json_is_no_record(store):
    (store / "records" / "odd.json").mkdir()
    assert len(migrate(store)) == 5


def test_what_is_no_record_of_schema_1_is_refused(tmp_path):
    for text in ("{", "[]", '{"schema": 2, "id": "a", "digest": "b"}', '{"schema": 1}'):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(UserError, match=r"x\.json"):
            read_old(tmp_path / "x.json")


def test_the_manifest_of_the_published_records_is_true():
    lines = [line.split("\t") for line in (PUBLISHED / "migrated.tsv").read_text().splitlines()[1:]]
    assert len(lines) == len({old for old, _, _ in lines}) == len({new for _, new, _ in lines}) == 1088
    assert {r.before["id"] for r in read_records(PUBLISHED / "records")[0] if r.before} == {old for old, _, _ in lines}
    for old, new, place in lines[::40]:
        record = Record.read(PUBLISHED / "records" / place)
        assert (record.before["id"], record.id) == (old, new)


def test_published_records_are_small():
    """Six kilobytes on average where there is no picture; schema 1 took 25."""
    found, bad = read_records(PUBLISHED / "records")
    sizes = [len(r.to_bytes()) for r in found[::10] if r.picture is None]
    assert bad == [] and sum(sizes) / len(sizes) <= 6000
