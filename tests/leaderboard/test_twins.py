"""One student's bytes under two methods or two seeds: named, marked, and counted once."""

from __future__ import annotations

import dataclasses

import pytest

from distillbench.leaderboard.site import pages
from distillbench.leaderboard.table import boards

TRACK = "image-classification/digits"


def weights(method: str, seed: int) -> str:
    return f"{hash_of(method):02x}{seed:02x}" * 16


def hash_of(text: str) -> int:
    return sum(text.encode()) % 256


def trained(make, slug, scores, **fields):
    """Records whose students are all different."""
    card = fields.pop("card", None) or make.card(slug)
    return [make.record(card, make.suite(), seed, score, student=weights(slug, seed), **fields) for seed, score in enumerate(scores)]


def rows_of(records):
    [board], lines = boards(records)
    return {r.name: r for r in board.rows}, lines


def given(records, seed, student):
    return [dataclasses.replace(r, student={"sha256": student}) if r.seed == seed else r for r in records]


def test_two_methods_with_one_student_are_named_and_both_rows_say_so(make):
    kd, dist = trained(make, "kd", make.spread(0.9)), trained(make, "dist", make.spread(0.9))
    copied = given(given(dist, 1, weights("kd", 1)), 3, weights("kd", 3))
    rows, lines = rows_of([*trained(make, "scratch", make.spread(0.8)), *kd, *copied])
    assert lines == sorted(
        f"{TRACK}: dist seed {s} and kd seed {s} have one student, {weights('kd', s)[:16]}: their rows say so" for s in (1, 3)
    )
    assert rows["kd"].marks == ("the very student of dist at seeds 1, 3",)
    assert rows["dist"].reason == "the very student of kd at seeds 1, 3"
    assert rows["kd"].seeds == rows["dist"].seeds == (0, 1, 2, 3, 4) and rows["kd"].rank == rows["dist"].rank == 1
    assert not rows["scratch"].marks
    [board], _ = boards([*kd, *copied])
    assert "the very student of kd at seeds 1, 3" in pages([board])[f"tracks/{TRACK}.html"]


def test_two_seeds_with_one_student_count_once(make):
    kd = given(trained(make, "kd", [0.9, 0.91, 0.92]), 2, weights("kd", 0))
    rows, lines = rows_of(kd)
    assert lines == [f"{TRACK}: kd seeds 0, 2 have one student, {weights('kd', 0)[:16]}: it counts once"]
    assert rows["kd"].scores["top1"] == {0: 0.9, 1: 0.91}
    assert rows["kd"].reason == "seed 2 repeated: the very student of seed 0, so it counts once"


def test_a_method_that_gives_one_student_at_every_seed_has_one_score_and_no_rank(make):
    rows, lines = rows_of([r for seed in range(5) for r in given(trained(make, "kd", [0.9] * 5), seed, "ab" * 32) if r.seed == seed])
    assert rows["kd"].seeds == (0,) and rows["kd"].rank is None and len(lines) == 1


@pytest.mark.parametrize("card", [{"control": True}, {"trains": False}])
def test_what_trains_nothing_may_have_one_student_for_all_seeds(make, card):
    records = [make.record(make.card("sampler", **card), make.suite(), seed, 0.9, student="ab" * 32) for seed in range(5)]
    rows, lines = rows_of(records)
    assert rows["sampler"].seeds == (0, 1, 2, 3, 4) and not rows["sampler"].reason and not lines


def test_one_seed_may_have_one_student_again(make):
    """A newer version or a hyper-parameter that changes nothing there gives the same bytes, and says so truly."""
    kd, tuned = trained(make, "kd", [0.9, 0.91]), trained(make, "kd", [0.9, 0.91], temperature=1.0)
    newer = trained(make, "kd", [0.9, 0.91], card=make.card("kd", version=2), temperature=2.0)
    rows, lines = rows_of([*kd, *tuned, *newer])
    assert not lines and all(len(r.seeds) == 2 for r in rows.values())


def test_two_tracks_and_two_splits_may_share_a_student(make):
    judge = make.suite(settings=("digits", "blobs"))
    records = [make.record(make.card(m), judge, 0, 0.9, setting=s, student="ab" * 32) for m, s in (("kd", "digits"), ("dist", "blobs"))]
    found, lines = boards([*records, make.record(make.card("nkd"), judge, 0, 0.9, split="tune", student="ab" * 32)])
    assert len(found) == 2 and not lines
