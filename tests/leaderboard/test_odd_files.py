"""Files that are no records, or records that no run can have left: each costs its own row and one line, and never the board."""

from __future__ import annotations

import base64
import copy
import dataclasses
import json

import pytest

from distillbench.errors import UserError
from distillbench.identity import canonical, sha256
from distillbench.leaderboard import export
from distillbench.leaderboard.table import boards
from distillbench.runs.packing import open_up, pack
from distillbench.runs.record import Record, read_records
from tests.leaderboard.test_commands import TRACK, run


def sealed(record, at=(), value=None):
    """The JSON of ``record`` with another ``value`` at a path, and a digest and an id that fit it."""
    body = json.loads(open_up(record.to_bytes()))
    place = body
    for key in at[:-1]:
        place = place[key]
    if at:
        place[at[-1]] = value
    stated = {k: v for k, v in body.items() if k not in ("id", "digest")}
    known = isinstance(body.get("identity"), dict)
    return {**stated, "id": sha256(canonical(body["identity"])) if known else "0", "digest": sha256(canonical(stated))}


def odd_files(make):
    """Name -> (bytes, what the line says of it)."""
    kd = make.card("kd")
    whole = make.record(kd, make.suite(), 7, {"top1": 0.5, "nll": 1.0}, n=4, student="ab" * 32)

    def bent(*at, to):
        return json.dumps(sealed(whole, at, to)).encode()

    forged = {**sealed(whole), "status": "failed"}
    data = make.record(kd, make.suite(), 7, {"top1": 0.5, "nll": 1.0}, data_digest="cd" * 32)
    nan = json.dumps(sealed(whole)).replace('"value": 0.5', '"value": NaN')
    assert "NaN" in nan
    return {
        "wrong-type": (bent("measurements", 0, "value", to="0.5"), "'0.5', no finite number"),
        "nan": (nan.encode(), "not a whole record"),
        "infinite": (bent("measurements", 0, "examples", to=pack([float("inf")] * 4)), "is not the mean of its examples"),
        "out-of-range": (make.record(kd, make.suite(), 7, {"top1": 7.0, "nll": 1.0}).to_bytes(), "outside its range, 0 to 1"),
        "future": (bent("created", to="2999-01-01T00:00:00+00:00"), "which is not yet"),
        "seeds-not-derived": (bent("identity", "seeds", "evaluation", to=1), "are not those of seed 7"),
        "other-data": (data.to_bytes(), "are not those that its card pins"),
        "forged-digest": (json.dumps(forged).encode(), "does not match its digest"),
        "other-id": (json.dumps({**sealed(whole), "id": "0" * 64}).encode(), "does not match its digest"),
        "truncated": (whole.to_bytes()[:-20], "corrupt or truncated"),
        "empty": (b"", "corrupt or truncated"),
        "later-schema": (bent("schema", to=99), "record of schema 99"),
        "no-schema": (b"[1, 2, 3]", "not a distillbench record"),
        "picture-of-text": (bent("picture", to=base64.b64encode(b"<script>").decode()), "not a whole record"),
        "list-for-dict": (bent("identity", to=[1]), "not a whole record"),
        "dict-for-list": (bent("measurements", to={"top1": 0.5}), "not a whole record"),
        "machine-of-lists": (bent("environment", to=["cpu"]), "not a whole record"),
        "absurd-nesting": (b'{"schema": 2, "identity": ' + b"[" * 200_000, "corrupt or truncated"),
        "value-not-the-mean": (bent("measurements", 0, "value", to=0.75), "top1 = 0.75 is not the mean of its examples"),
        "two-cards": (bent("cards", "method", "slug", to="dist"), "put together from two records"),
        "text-over-lines": (bent("status", to="ok\nand well"), "its status is"),
    }


def test_a_bad_file_costs_its_own_row_and_one_line(make, tmp_path, capsys):
    records = make.write(tmp_path / "records", make.full_board())
    assert run("build", "--records", records, "--out", tmp_path / "before") == 0
    assert capsys.readouterr().err == ""
    files = odd_files(make)
    assert len(files) >= 12
    for name, (content, _) in files.items():
        (records / f"{name}.record").write_bytes(content)
    (records / "a-folder.record").mkdir()
    assert run("build", "--records", records, "--out", tmp_path / "after") == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(files) + 1
    for name, (_, says) in {**files, "a-folder": (b"", "cannot be read")}.items():
        [line] = [line for line in lines if f"/{name}.record: " in line]
        assert says in line and "Traceback" not in line
    before, after = ({p.relative_to(tmp_path / w): p.read_bytes() for p in (tmp_path / w).rglob("*.*")} for w in ("before", "after"))
    assert before == after


def test_nothing_but_bad_files_is_bad_input(make, tmp_path):
    for name, (content, _) in odd_files(make).items():
        (tmp_path / f"{name}.record").write_bytes(content)
    with pytest.raises(UserError, match=r"none of \d+ could be used"):
        run("show", TRACK, "--records", tmp_path)


def places(data, path=()):
    """The paths of all parts of a value."""
    yield path
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def test_no_part_of_a_record_can_be_bent_so_that_a_board_ends_in_a_traceback(make):
    good = make.full_board()
    base = dataclasses.replace(
        next(r for r in good if r.slug == "kd"),
        trace={"fit/kd": [0.5, 0.25]},
        student={"sha256": "ab" * 32, "architecture": "mlp"},
        environment={"commit": "0123", "dirty": False, "device": "cpu", "packages": {"torch": "2.1"}},
        sources={"m": "text"},
        artifacts={"a": {"sha256": "cd" * 32, "kind": "png"}},
    )
    values = (None, [], {}, "x", -1, 1e308, True, [[{}]], {"x": [1]}, 10**30, "a\nb")
    whole = json.loads(open_up(base.to_bytes()))
    bent = [(at, value) for at in places(whole) if at[:1] not in ((), ("id",), ("digest",)) for value in values]
    few, refused = bent[:: len(bent) // 400], []
    for at, value in few:
        try:
            record = Record.from_bytes(json.dumps(sealed(base, at, copy.deepcopy(value))), "here")
        except UserError as error:
            refused.append(str(error))
            continue
        found, _ = boards([*good, record])
        assert any(export.to_json(b) for b in found)
    assert all(line.startswith("here: ") and "\n" not in line for line in refused)
    assert len(few) / 3 < len(refused) < len(few)  # what is only shown, such as titles and claims, may say anything


def test_controls_are_of_the_arena_of_what_is_compared_with_them(make, tmp_path):
    def on(digest, *slugs, created="2026-01-01T00:00:00Z"):
        judge = make.suite()
        asset = dataclasses.replace(judge.settings["digits"].assets["data"], sha256=digest)
        judge = dataclasses.replace(judge, settings={"digits": dataclasses.replace(judge.settings["digits"], assets={"data": asset})})
        scores = [{"top1": 0.8, "nll": 1.0}, {"top1": 0.81, "nll": 0.9}]
        return [r for slug in slugs for r in make.runs(make.card(slug), judge, scores, data_digest=digest, created=created)]

    ours = on("ab" * 32, "scratch", "teacher", "kd")
    astray = on("cd" * 32, "dist", created="2026-02-01T00:00:00Z")
    found, lines = boards([*ours, *astray])
    [board] = found
    assert {r.name for r in board.rows} == {"kd", "teacher", "scratch"}
    assert lines == sorted(
        f"record {r.id[:16]}: no control was run on its data (those of others have another SHA-256); run them on the same files"
        for r in astray
    )
    with_their_own = boards([*ours, *astray, *on("cd" * 32, "scratch")])
    assert len(with_their_own[0]) == 2 and not with_their_own[1]  # another board of the track
    alone, said = boards(astray)
    assert len(alone) == 1 and not said  # nothing there to be taken for its control
    records, bad = read_records(make.write(tmp_path, [*ours, *astray]))
    assert len(records) == 8 and not bad
