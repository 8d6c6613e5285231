"""What becomes of a board when a version rises, when records contradict each other, and when machines differ."""

from __future__ import annotations

import dataclasses

from distillbench.leaderboard.table import boards
from distillbench.leaderboard.versions import JOINED, lifted

CELL = "image-classification/digits classification/{}"


def one(records, joined=()):
    found, bad = boards(records, joined)
    assert bad == [] and len(found) == 1
    return found[0]


def rows_of(board):
    return {r.name: r for r in board.rows}


def test_one_step_of_the_engine_empties_no_board_of_the_cells_that_did_not_move(make):
    judge = make.suite()
    old = [r for slug, score in (("kd", 0.8), ("dist", 0.9)) for r in make.runs(make.card(slug), judge, make.spread(score), engine=1)]
    new = make.runs(make.card("dkd"), judge, make.spread(0.85), engine=2)
    rise = {"part": "engine", "slug": None, "from": 1, "to": 2, "cells": [CELL.format("kd")]}
    board = one([*old, *new], [rise])
    rows = rows_of(board)
    assert (rows["dkd"].rank, rows["kd"].rank) == (1, 2)
    below = rows["dist (older)"]
    assert below.rank is None and below.older == below.reason == "older version: engine 1 (now 2)" and len(below.seeds) == 5
    assert board.rows[-1].name == "dist (older)"
    everything = rows_of(one([*old, *new], [{**rise, "cells": [CELL.format("kd"), CELL.format("dist")]}]))
    assert {name: r.rank for name, r in everything.items()} == {"dist": 1, "dkd": 2, "kd": 3}


def test_rises_follow_each_other_and_only_their_own_part(make):
    record = make.runs(make.card("kd"), make.suite(), [0.8])[0]
    cell = CELL.format("kd")
    rises = [
        {"part": "kind", "slug": "classification", "from": 1, "to": 2, "cells": [cell]},
        {"part": "kind", "slug": "classification", "from": 2, "to": 3, "cells": [cell]},
        {"part": "suite", "slug": "another-suite", "from": 1, "to": 2, "cells": [cell]},
    ]
    now = lifted(record, rises)
    assert now["kind"]["version"] == 3 and now["suite"]["version"] == 1
    assert record.identity["kind"]["version"] == 1  # the record itself stays as it is
    assert lifted(record, rises[1:])["kind"]["version"] == 1


def test_a_newer_version_of_a_method_takes_its_place(make):
    judge = make.suite()
    named = (("kd", 1, 0.95), ("kd", 2, 0.8), ("dist", 1, 0.85))
    board = one([r for slug, version, score in named for r in make.runs(make.card(slug, version=version), judge, make.spread(score))])
    rows = rows_of(board)
    assert rows["kd"].rank == 2 and rows["kd"].card.version == 2
    assert rows["kd v1"].rank is None and rows["kd v1"].older == "older version: method 1 (now 2)"
    assert board.reference("kd").card.version == 2


def test_two_students_of_one_identity_are_a_contradiction_and_never_silently_the_newest(make):
    judge, kd = make.suite(), make.card("kd")
    records = [make.record(kd, judge, seed, score, student=f"{seed:064}") for seed, score in enumerate(make.spread(0.8))]
    other = make.record(kd, judge, 2, 0.99, student="b" * 64, created="2026-02-02T00:00:00Z")
    row = one([*records, other]).rows[0]
    assert row.seeds == (0, 1, 3, 4)
    assert "seed 2 contradiction: 2 records of one identity have different students" in row.reason and "0.99" in row.reason
    same = dataclasses.replace(records[2], created="2026-02-02T00:00:00Z")
    assert one([*records, same]).rows[0].seeds == (0, 1, 2, 3, 4)


def test_rows_made_on_mixed_machines_say_so(make):
    judge = make.suite()

    def made(record, device, torch):
        return dataclasses.replace(record, environment={**record.environment, "device": device, "packages": {"torch": torch}})

    records = make.runs(make.card("kd"), judge, [0.8, 0.81, 0.82])
    assert one([made(r, "cpu", f"2.14.{i}") for i, r in enumerate(records)]).rows[0].marks == ()
    mixed = one([made(r, "cpu" if r.seed else "NVIDIA X", "2.14.1" if r.seed else "2.5.0") for r in records]).rows[0]
    assert mixed.marks == ("mixed devices: NVIDIA X, cpu", "mixed versions of torch: 2.14, 2.5")
    assert mixed.rank == 1


def test_the_committed_table_is_well_formed():
    for rise in JOINED:
        assert set(rise) == {"part", "slug", "from", "to", "cells"}
        assert rise["part"] in ("engine", "kind", "suite") and rise["to"] == rise["from"] + 1
        assert all(" " in cell and cell.count("/") == 2 for cell in rise["cells"])
