"""Boards in a notebook: the board of a track, its data frame, its picture."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ET

import pytest

from distillbench import leaderboard
from distillbench.errors import SaveError, UserError

TRACK = "image-classification/digits"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def folder(make, tmp_path_factory):
    return make.write(tmp_path_factory.mktemp("records"), make.full_board())


def test_the_board_of_a_store_in_the_metric_that_is_asked_for(make, tmp_path):
    make.write(tmp_path / "records", make.full_board())
    (tmp_path / "store.json").write_text('{"schema": 1}')
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "meta.json").write_text("{}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what lies beside a store's records is not looked at
        board = leaderboard.board(TRACK, tmp_path)
    assert isinstance(board, leaderboard.Board) and (board.track, board.metric.name) == (TRACK, "top1")
    assert leaderboard.board(TRACK, str(tmp_path), metric="nll").metric.name == "nll"
    table = leaderboard.frame(board)
    assert list(table["method"]) == [r.name for r in board.rows]
    assert table.set_index("method").loc["dist", "rank"] == 1


def test_without_a_folder_it_is_the_published_one():
    board = leaderboard.board("image-classification/blobs")
    assert {"kd", "scratch", "teacher"} <= {r.card.slug for r in board.rows}


def test_a_bad_file_is_a_warning_at_the_callers_line(make, tmp_path):
    make.write(tmp_path, make.full_board())
    (tmp_path / "cut.json").write_text('{"schema": 1,')
    with pytest.warns(UserWarning, match=r"cut\.json: corrupt") as seen:
        leaderboard.board(TRACK, tmp_path)
    assert [w.filename for w in seen] == [__file__]


def test_mistakes_name_the_way_out(folder, tmp_path):
    with pytest.raises(UserError, match=f"did you mean '{TRACK}'"):
        leaderboard.board("image-classification/digit", folder)
    with pytest.raises(UserError, match="did you mean 'top1'"):
        leaderboard.board(TRACK, folder, metric="top")
    with pytest.raises(UserError, match="no such folder"):
        leaderboard.board(TRACK, tmp_path / "absent")


def test_the_picture_is_whole_in_itself_and_shows_every_scored_row(folder, tmp_path):
    board = leaderboard.board(TRACK, folder)
    drawing = leaderboard.draw(board)
    root = ET.fromstring(drawing._repr_svg_())
    titles = [t.text for t in root.iter(f"{SVG}title")]
    assert len(titles) == sum("top1" in r.intervals for r in board.rows) and any(t.startswith("dist: 0.97") for t in titles)
    texts = [t.text for t in root.iter(f"{SVG}text")]
    assert TRACK in texts and "dist" in texts and "over budget" in texts
    assert root.find(f"{SVG}rect").get("class") == "ground"  # readable on a dark page, of which an image knows nothing
    [style] = root.iter(f"{SVG}style")
    used = {name for node in root.iter() for name in (node.get("class") or "").split()}
    assert used - {"method"} == {c for c in used if f".{c}" in style.text}  # a circle is a method's by default
    assert style.text.count("var(--") and all(
        f"{v}: #" in style.text for v in ("--ink", "--soft", "--line", "--panel", "--method", "--over")
    )
    assert "url(" not in drawing.svg and "http" not in drawing.svg.replace("http://www.w3.org/2000/svg", "")
    path = drawing.save(tmp_path / "made" / "board.svg")
    assert path.read_text() == drawing.svg
    with pytest.raises(SaveError, match="could not be saved"):
        drawing.save(tmp_path / "made" / "board.svg" / "below a file.svg")


def test_names_are_escaped(make, tmp_path):
    board = leaderboard.board(TRACK, make.write(tmp_path, make.full_board()))
    rows = tuple(dataclasses.replace(r, name="<script>&") for r in board.rows)
    assert "<script>" not in leaderboard.draw(dataclasses.replace(board, rows=rows)).svg


def test_nothing_to_draw_is_one_line(make, tmp_path):
    failed = [make.record(make.card("kd"), make.suite(), 0, None, status="failed", reason="loss is not finite")]
    board = leaderboard.board(TRACK, make.write(tmp_path, failed))
    with pytest.raises(UserError, match="no row has both a score and a cost"):
        leaderboard.draw(board)


def test_names_are_found_when_they_are_used():
    code = """
import sys
from distillbench import leaderboard
assert not {"torch", "pandas", "numpy", "jinja2"} & set(sys.modules)
assert set(leaderboard.__all__) <= set(dir(leaderboard))
leaderboard.board, leaderboard.draw
assert not {"torch", "pandas", "jinja2"} & set(sys.modules), "the table alone needs neither"
for name in leaderboard.__all__: getattr(leaderboard, name)
assert "torch" not in sys.modules
try: leaderboard.bord
except AttributeError as error: assert "bord" in str(error)
else: raise SystemExit("no error")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
