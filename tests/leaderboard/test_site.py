"""The site: escaped, reproducible, linked, and built in time that grows with the records and no faster."""

from __future__ import annotations

import base64
import dataclasses
import html.parser
import random
import time

import pytest

from distillbench.cards.card import Metric, Paper
from distillbench.errors import SaveError, UserError
from distillbench.leaderboard.picture import picture, scaled, si
from distillbench.leaderboard.site import build, pages, segment
from distillbench.leaderboard.table import boards
from distillbench.runs.record import read_records

EVIL = "<script>window.stolen = 1</script>\"'><img src=x onerror=alert(1)>"


class Links(html.parser.HTMLParser):
    """Every address and id of a page, and every element's name."""

    def __init__(self, text):
        super().__init__()
        self.to, self.tags = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.to += [v for k, v in attrs if k in ("href", "src") and v]


@pytest.fixture(scope="module")
def site(make, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    judge = make.suite(settings=("digits", "blobs"))
    older = make.full_board(make.suite(examples=9_000))
    found, bad = boards(make.full_board(judge) + make.full_board(judge, "blobs") + older)
    assert bad == []
    build(found, folder)
    return folder


def test_every_relative_link_leads_to_a_file_and_nothing_is_fetched(site):
    files = sorted(site.rglob("*.html"))
    assert len(files) == 1 + 2 + 8 + 1  # index, tracks, methods, suite
    for file in files:
        for tag, attrs in Links(file.read_text()).tags:
            for name in ("href", "src"):
                to = attrs.get(name)
                if to is None or (tag == "a" and to.startswith("https://")) or to == "data:,":
                    continue
                assert not to.startswith(("http", "/", "file:")), to
                assert (file.parent / to).resolve().is_file(), f"{file}: {to}"
    assert "url(" not in (site / "style.css").read_text()


def test_every_file_is_reached_from_the_index(site):
    seen, todo = set(), [site / "index.html"]
    while todo:
        file = todo.pop().resolve()
        if file in seen:
            continue
        seen.add(file)
        if file.suffix == ".html":
            todo += [file.parent / to for to in Links(file.read_text()).to if not to.startswith(("https:", "data:"))]
    assert seen == {p.resolve() for p in site.rglob("*") if p.is_file()}


def test_pages_say_what_they_must(site):
    method = (site / "methods/classification/kd.html").read_text()
    for text in (
        "T^2 KL(softmax(t/T) || softmax(s/T))",
        "https://arxiv.org/abs/1503.02531",
        "no data augmentation",
        "methods/classification/kd.py",
    ):
        assert text in method
    for text in ("0123456789abcdef0123", "The temperature was chosen", "better than scratch", "not reproduced", "earlier board"):
        assert text in method
    track = (site / "tracks/image-classification/digits.html").read_text()
    for text in (
        "student_examples 20000 of 10000",
        "loss is not finite",
        "How to read this",
        "Earlier boards",
        "budget.student_examples 10000 (newest: 9000)",
        "<svg",
    ):
        assert text in track
    suite = (site / "suites/image-classification.html").read_text()
    assert "mean negative log-likelihood" in suite
    assert "CC BY 4.0" in suite


def test_text_from_records_is_escaped_everywhere(make):
    nasty = make.card(
        "kd",
        title=EVIL,
        problem="../../up",
        paper=Paper(title=EVIL, year=2020, arxiv=EVIL, code="javascript:alert(1)"),
        equations={EVIL: EVIL},
        deviations=(EVIL,),
        exempt={EVIL: EVIL},
        notes=EVIL,
    )
    judge = make.suite(title=EVIL, summary=EVIL)
    records = make.runs(nasty, judge, [0.8, 0.9, 0.85])
    records.append(make.record(nasty, judge, 3, None, status="failed", reason=EVIL))
    records += make.runs(nasty, judge, [0.8, 0.9], temperature=EVIL)
    records[0].environment["commit"] = EVIL
    found, bad = boards(records)
    assert bad == []
    for path, text in pages(found).items():
        if path.endswith(".html"):
            tags = Links(text).tags
            assert [a.get("src") for t, a in tags if t in ("script", "img")] == ["../" * path.count("/") + "sort.js"], path
            assert not any(k.startswith("on") for _, a in tags for k in a), path
            assert "javascript:" not in text, path


def test_a_setting_cannot_leave_its_folder(make):
    judge = make.suite(settings=("../../evil",))
    paths = pages(boards(make.runs(make.card("kd"), judge, [0.8, 0.9], setting="../../evil"))[0])
    assert not any(".." in p for p in paths)
    assert segment("digits") == "digits"
    assert segment("..").startswith("x-")


def test_two_builds_are_equal_byte_for_byte(make, tmp_path):
    records = make.full_board() + make.full_board(make.suite(examples=9_000))
    for name, seed in (("a", 1), ("b", 2)):
        mixed = random.Random(seed).sample(records, len(records))
        read, bad = read_records(make.write(tmp_path / f"{name}-records", mixed))
        assert bad == []
        build(boards(read)[0], tmp_path / name)
    files = [p.relative_to(tmp_path / "a") for p in sorted((tmp_path / "a").rglob("*")) if p.is_file()]
    assert len(files) > 15
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_build_says_what_is_wrong(make, tmp_path):
    found, _ = boards(make.runs(make.card("kd"), make.suite(), [0.8, 0.9]))
    with pytest.raises(UserError, match="distillbench run"):
        build([], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        build(found, tmp_path / "file")
    with pytest.raises(SaveError):
        build(found, tmp_path / "file" / "below")


@pytest.mark.parametrize("scores", [[0.8], [0.8, 0.8], [0.0, 0.0]])
def test_a_board_of_one_row_or_one_seed_has_pages(make, scores):
    found, _ = boards(make.runs(make.card("kd"), make.suite(), scores))
    assert "tracks/image-classification/digits.html" in pages(found)


def test_a_board_without_a_score_has_pages_and_no_picture(make):
    found, _ = boards([make.record(make.card("kd"), make.suite(), 0, None, status="skipped", reason="needs a GPU")])
    assert picture(found[0]) is None
    assert "needs a GPU" in pages(found)["tracks/image-classification/digits.html"]


def test_the_picture_is_to_scale_and_its_labels_cover_nothing(make):
    board = boards(make.full_board())[0][0]
    drawn = picture(board)
    marks = {m.title.split(":")[0]: m for m in drawn.marks}
    assert marks["teacher"].x is None
    assert marks["teacher"].kind == marks["scratch"].kind == "control"
    assert marks["greedy"].kind == "over"
    assert "log" in drawn.x_label  # costs span 30x
    # equal ratios of cost are equal distances
    assert marks["dist"].x - marks["scratch"].x == pytest.approx((marks["greedy"].x - marks["scratch"].x) * 0.32299, rel=1e-2)
    assert marks["dist"].y < marks["kd"].y < marks["scratch"].y
    assert marks["kd"].low > marks["kd"].y > marks["kd"].high
    boxes = []
    for m in drawn.marks:
        width = len(m.text) * 6.6
        left = m.text_x - {"start": 0, "middle": width / 2, "end": width}[m.anchor]
        boxes += [(left, m.text_y - 11, left + width, m.text_y + 3)] if m.text else []
    assert len(boxes) == len(drawn.marks)
    for i, a in enumerate(boxes):
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[i + 1 :])


def test_scores_over_a_wide_range_go_on_a_log_axis(make):
    judge = make.suite(metrics=(Metric(name="fd", unit="distance", better="lower"),), primary="fd")
    records = [
        r for slug, mean in (("good", 0.5), ("poor", 50.0), ("middle", 5.0)) for r in make.runs(make.card(slug), judge, make.spread(mean))
    ]
    board = boards(records)[0][0]
    drawn = picture(board)
    assert drawn.y_label.endswith("lower is better, log)")
    heights = {m.title.split(":")[0]: m.y for m in drawn.marks}
    assert heights["good"] - heights["middle"] == pytest.approx(heights["middle"] - heights["poor"], abs=2)
    assert {t.text for t in drawn.y_ticks} >= {"1", "10"}
    assert scaled([0.5, 4.9])[1] is False and scaled([-1.0, 50.0])[1] is False
    place, _ = scaled([0.5, 50.0])
    assert place(-3.0) == place(0.1) < place(0.5)


def test_counts_have_si_prefixes():
    assert [si(v) for v in (0.0, 12.0, 999.9, 62_500, 1.2e11, 999_999)] == ["0", "12", "1k", "62.5k", "120G", "1M"]


@pytest.mark.slow
def test_time_grows_with_the_records_and_no_faster(make, tmp_path):
    """Four times the records in at most six times the time: tracks grow, methods per track do not."""

    def seconds(settings: int) -> float:
        judge = make.suite(settings=[f"s{i}" for i in range(settings)])
        names = ["scratch", "teacher", *(f"m{i}" for i in range(18))]
        records = [
            r
            for s in judge.settings
            for i, name in enumerate(names)
            for scores in [[{"top1": v, "nll": 1 - v} for v in make.spread(0.5 + i / 50)]]
            for r in make.runs(make.card(name), judge, scores, setting=s, n=50)
        ]
        folder = make.write(tmp_path / str(settings), records)
        start = time.perf_counter()
        read, bad = read_records(folder)
        assert not bad
        build(boards(read)[0], tmp_path / f"site-{settings}")
        return time.perf_counter() - start

    seconds(1)  # imports and compiled templates
    assert seconds(40) < 6 * seconds(10)


def test_sheets_of_samples_stand_on_their_track(make):
    judge = make.suite()
    png = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
    runs = make.runs(make.card("kd"), judge, [0.8, 0.9]) + make.runs(make.card("scratch"), judge, [0.7, 0.6])
    runs[1] = dataclasses.replace(runs[1], picture=png)  # of the first seed that has one
    text = next(t for p, t in pages(boards(runs)[0]).items() if p == "tracks/image-classification/digits.html")
    images = [a["src"] for t, a in Links(text).tags if t == "img"]
    assert images == [f"data:image/png;base64,{png}"]
