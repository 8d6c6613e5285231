"""The analyses of the studies, on records with a planted answer; the pictures."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from distillbench.leaderboard.chart import Line, Panel, draw
from distillbench.leaderboard.studies import capacity_gap_law as gap
from distillbench.leaderboard.studies import teacher_hacking as hacking
from distillbench.runs.record import Measurement, Record
from distillbench.runs.study import Done, studies, summary
from distillbench.stats import Interval


def record(**values):
    measured = tuple(Measurement(k, v, 1) for k, v in values.items())
    return Record({}, "", {}, {}, "ok", None, measured, {}, None, {}, "2026-01-01T00:00:00Z")


def done(study, curve, seeds=3, noise=0.0, seed=0):
    """Records of a whole grid: ``curve(cell)`` -> values by metric, each with normal noise of its own."""
    rng = np.random.default_rng(seed)
    return [Done(c, {s: record(**{k: v + noise * rng.normal() for k, v in curve(c).items()}) for s in range(seeds)}) for c in study.cells]


# --- teacher hacking ----------------------------------------------------------------------------------------------


def falling(at):
    return 0.3 + 1 / at


def u_shape(at):
    return 0.5 + 0.05 * math.log2(at / 32) ** 2


def planted(offline, online=lambda at: (falling(at), falling(at))):
    def curve(cell):
        golden, proxy = (online if cell.arm in hacking.ONLINE else offline)(cell.at)
        return {"truth_kl": golden, "kl": proxy}

    return curve


def test_a_planted_u_shape_under_a_falling_proxy_is_hacking():
    found = hacking.analyse(done(hacking.STUDY, planted(lambda at: (u_shape(at), falling(at))), noise=0.001))
    assert found.verdict == "reproduced"
    arm = found.numbers["arms"][hacking.OFFLINE]
    assert arm["hacks"] is True and arm["overfits"] is False and arm["at"] == 32 and arm["proxy_at"] == 256
    assert arm["golden"]["estimate"] == pytest.approx(u_shape(256) - u_shape(32), abs=0.005)
    assert arm["hacked"] == arm["golden"]
    assert "then hacking: golden +0.4" in found.text
    assert not any(found.numbers["arms"][a]["hacks"] for a in hacking.ONLINE)


def test_monotone_curves_do_not_reproduce_it():
    found = hacking.analyse(done(hacking.STUDY, planted(lambda at: (falling(at), falling(at))), noise=0.0005))
    assert found.verdict == "not reproduced"
    assert "no hacking, no overfitting" in found.text


def test_both_rising_is_overfitting_and_not_hacking():
    found = hacking.analyse(done(hacking.STUDY, planted(lambda at: (u_shape(at), u_shape(at) - 0.1)), noise=0.001))
    arm = found.numbers["arms"][hacking.OFFLINE]
    assert arm["overfits"] is True and arm["hacks"] is False
    assert found.verdict == "not reproduced"


def test_hacking_of_the_online_arms_too_is_not_what_the_paper_claims():
    both = lambda at: (u_shape(at), falling(at))  # noqa: E731
    assert hacking.analyse(done(hacking.STUDY, planted(both, both), noise=0.001)).verdict == "not reproduced"


@pytest.mark.parametrize("seed", range(5))
def test_noise_alone_is_never_called_reproduced_and_one_seed_decides_nothing(seed):
    flat = planted(lambda at: (0.5, 0.5), lambda at: (0.5, 0.5))
    assert hacking.analyse(done(hacking.STUDY, flat, noise=0.05, seed=seed)).verdict == "undecided"
    u = planted(lambda at: (u_shape(at), falling(at)))
    found = hacking.analyse(done(hacking.STUDY, u, seeds=1, seed=seed))
    assert found.verdict == "undecided" and "one seed, no interval" in found.text


def test_a_minimum_chosen_by_the_other_seeds_makes_no_rise_of_noise():
    """The end less the least of the same seed would be a rise of over one standard deviation; ours has mean zero."""
    rng = np.random.default_rng(1)
    rises, naive = [], []
    for _ in range(300):
        curve = {float(x): dict(enumerate(rng.normal(size=3))) for x in range(6)}
        rises.append(hacking.turn(curve, curve).golden.estimate)
        naive.append(np.mean([curve[5.0][s] - min(v[s] for v in curve.values()) for s in range(3)]))
    assert abs(np.mean(rises)) < 0.15
    assert np.mean(naive) > 1


# --- capacity gap --------------------------------------------------------------------------------------------------


def gapped(best, depth=0.02):
    """Distances with their minimum at the teacher nearest to ``best(S)``; the teachers' own distance falls."""

    def curve(cell):
        if cell.arm == gap.ITSELF:
            return {"truth_kl": 1 / cell.at}
        size = int(cell.arm.split()[-1])
        return {"truth_kl": 1 / size + depth * math.log(cell.at / best(size)) ** 2}

    return curve


def test_a_planted_law_is_found_with_its_slope():
    found = gap.analyse(done(gap.STUDY, gapped(lambda s: 2 * s), noise=0.0002))
    assert found.verdict == "reproduced"
    assert found.numbers["fits"]["slope"]["estimate"] == pytest.approx(2, abs=0.01)
    assert found.numbers["fits"]["exponent"]["low"] <= 1 <= found.numbers["fits"]["exponent"]["high"]


def test_one_best_teacher_for_all_students_is_no_law():
    found = gap.analyse(done(gap.STUDY, gapped(lambda s: 8), noise=0.0002))
    assert found.verdict == "not reproduced"
    assert found.numbers["fits"]["exponent"]["estimate"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("best", [1, 15, 100])
def test_an_optimum_at_the_end_of_the_grid_is_undecidable(best):
    found = gap.analyse(done(gap.STUDY, gapped(lambda s: best), noise=0.0002))
    assert found.verdict == "undecided" and not found.numbers["fits"]
    assert "undecidable: an end of the grid may be as good" in found.text


def test_noise_decides_nothing():
    flat = gapped(lambda s: 4, depth=0)
    assert {gap.analyse(done(gap.STUDY, flat, noise=0.01, seed=s)).verdict for s in range(20)} == {"undecided"}
    assert gap.analyse(done(gap.STUDY, gapped(lambda s: 2 * s), seeds=1)).verdict == "undecided"


def test_the_slope_through_the_origin_is_the_least_squares_one():
    s, t = np.asarray([1.0, 2, 4]), np.asarray([[3.0, 4, 9], [2, 4, 8]])
    by_numpy = [np.linalg.lstsq(s[:, None], row, rcond=None)[0][0] for row in t]
    assert gap.through_origin(s, t) == pytest.approx(by_numpy)
    assert gap.exponent(s, t) == pytest.approx([np.polyfit(np.log(s), np.log(row), 1)[0] for row in t])


def test_draws_vary_as_the_seeds_do():
    """Two teachers a standard error apart: the better one is drawn about as often as Student's t says."""
    quality = {1.0: {0: 0.0, 1: 0.2, 2: 0.4}, 2.0: {0: 0.3, 1: 0.3, 2: 0.6}}  # differences 0.3, 0.1, 0.2: t = 3.46 with 2 degrees
    best = gap.best_teacher(quality, np.random.default_rng(0))
    from scipy.stats import t

    assert best.teacher == 1
    assert 1 <= best.draws.min() < 1.1 and 1.9 < best.draws.max() <= 2
    assert (best.draws > math.sqrt(2)).mean() == pytest.approx(t.sf(0.2 / (0.1 / math.sqrt(3)), 2), abs=0.012)


# --- pictures --------------------------------------------------------------------------------------------------------


def numbers(svg):
    for node in ET.fromstring(svg).iter():
        for name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy"):
            if name in node.attrib:
                yield float(node.attrib[name])


def test_a_chart_escapes_names_and_places_points():
    line = Line("a <b> & 'c'", (1, 10, 100), (Interval(1, 0.5, 2), Interval(0.1, -1, 0.2), Interval(0.01, math.nan, math.nan)))
    svg = draw([Panel("t", "x", "y", (line,), ((0.05, "<here>"),), log_x=True, log_y=True)], "t & u")
    root = ET.fromstring(svg)
    assert all(math.isfinite(v) for v in numbers(svg))
    texts = [n.text for n in root.iter() if n.tag.endswith("text")]
    assert "a <b> & 'c'" in texts and "<here>" in texts
    dots = [(float(n.attrib["cx"]), float(n.attrib["cy"])) for n in root.iter() if n.tag.endswith("circle")]
    assert dots[1][0] - dots[0][0] == pytest.approx(dots[2][0] - dots[1][0], abs=0.2)
    assert dots[1][1] - dots[0][1] == pytest.approx(dots[2][1] - dots[1][1], abs=0.2) and dots[1][1] > dots[0][1]
    assert len([n for n in root.iter() if n.attrib.get("class") == "bar"]) == 2
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")
    with pytest.raises(ValueError, match="lines with points"):
        draw([Panel("t", "x", "y", ())], "t")


@pytest.mark.parametrize("slug", ["teacher_hacking", "capacity_gap_law"])
def test_every_study_is_whole(slug):
    found = studies()[slug]
    study = found.study
    assert study.paper.catalogue == slug and study.paper.row and study.paper.arxiv
    assert len({(c.arm, c.at) for c in study.cells}) == len(study.cells)
    finding = found.analyse(done(study, lambda c: {"kl": 0.1 + 1 / c.at, "truth_kl": 0.2 + 1 / c.at}, noise=0.001))
    assert all(math.isfinite(v) for v in numbers(finding.picture))
    import json

    json.dumps(summary(study, finding, range(3)), allow_nan=False)
    finding = found.analyse(done(study, lambda c: {"kl": 0.1 + 1 / c.at, "truth_kl": 0.2 + 1 / c.at}, seeds=1))
    json.dumps(summary(study, finding, [0]), allow_nan=False)
