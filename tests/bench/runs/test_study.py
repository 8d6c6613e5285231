"""Studies: found by folder, planned as ordinary runs, done once, judged only when whole."""

from __future__ import annotations

import json
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import distillbench.runs.study
from distillbench.errors import UserError
from distillbench.runs.plan import plan
from distillbench.runs.record import Measurement, Record
from distillbench.runs.study import curve_of, find

TRACK = "language-modeling/markov"

# A study of two lengths; its title and text would break a page that does not escape.
SOURCE = """
from distillbench.cards.card import Paper
from distillbench.runs.study import Cell, Finding, Study, curve_of
STUDY = Study(
    slug="{slug}", title="<Two> & two", question="Does <b>more</b> help?", paper=Paper(title="None & <all>", year=2026),
    cells=tuple(
        Cell(arm="a", at=n, track="language-modeling/markov", method="{method}", hyperparameters={hyper},
             budget={{"student_examples": n}}, training={{"schedule": "constant"}}, options={{"prompts": 64, "references": 64}})
        for n in (64, 128)
    ),
)
def analyse(done):
    kl = curve_of(done, "a", "kl")
    gain = sum(kl[64].values()) - sum(kl[128].values())
    return Finding("reproduced" if gain > 0 else "not reproduced", f"gain <{{gain:.3f}}>", {{"kl": {{str(k): v for k, v in kl.items()}}}},
                   '<svg xmlns="http://www.w3.org/2000/svg"></svg>')
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """``package(slug=source, ...)`` is a package of studies, the only one that is installed."""

    def write(**files):
        name = f"studies_{tmp_path.name.replace('-', '_')}"
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").touch()
        for slug, text in files.items():
            (folder / f"{slug}.py").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        point = EntryPoint("mine", name, "distillbench.studies")
        monkeypatch.setattr(distillbench.runs.study, "entry_points", lambda group: [point] if group == "distillbench.studies" else [])
        return folder

    yield write
    for name in [m for m in sys.modules if m.startswith("studies_")]:
        del sys.modules[name]


def tiny(slug="two_lengths", method="seqkd", **hyper):
    return SOURCE.format(slug=slug, method=method, hyper=repr(hyper))


def test_a_study_is_done_once_and_leaves_picture_page_and_numbers(package, cli, tmp_path):
    package(two_lengths=tiny())
    arguments = ("study", "two-lengths", "--seeds", "2", "--workers", "1", "--out", tmp_path / "o")
    code, out, err = cli(*arguments, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["verdict"] == "reproduced" and told["seeds"] == [0, 1]
    assert "4 runs, 0 done before" in err
    assert "[4/4] a at 128, seqkd seed 1: kl " in err  # which cell, not only which method
    svg, page, numbers = (Path(p).read_text() for p in told.pop("files"))
    assert json.loads(numbers) == told
    assert set(told["numbers"]["kl"]) == {"64", "128"} and set(told["numbers"]["kl"]["64"]) == {"0", "1"}
    assert svg in page
    assert "&lt;Two&gt; &amp; two" in page and "gain &lt;" in page and "<b>" not in page and "&lt;all&gt;" in page
    # The second time nothing runs, under either spelling of the name.
    code, out, err = cli("study", "two_lengths", *arguments[2:])
    assert code == 0 and err.count("\n") == 1
    assert out.startswith("<Two> & two: reproduced\ngain <")


def test_a_study_without_all_of_its_runs_has_no_verdict(package, cli, tmp_path, write_method):
    broken = write_method("breaks", body="raise RuntimeError('out of luck')", problem="language-modeling")
    package(two_lengths=tiny(method=str(broken)))
    code, out, err = cli("study", "two_lengths", "--seeds", "1", "--workers", "1", "--out", tmp_path / "o")
    assert code == 1 and out == ""
    assert "a at 64, breaks seed 0 failed: RuntimeError: out of luck" in err
    assert err.endswith("two_lengths: no verdict without all of its runs\n")
    assert not (tmp_path / "o" / "studies").exists()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("study two_lenghts", "unknown study 'two_lenghts'; did you mean 'two_lengths'"),
        ("study two_lengths --seeds none", "--seeds none: give a number"),
        ("study", "required: STUDY"),
        ("list study", "unknown kind 'study'; did you mean 'studies'"),
    ],
)
def test_mistakes_are_one_line(package, cli, command, says):
    package(two_lengths=tiny())
    code, out, err = cli(*command.split())
    assert code == 2 and out == "" and err.count("\n") == 1
    assert says in err


def test_studies_are_listed(package, cli):
    package(two_lengths=tiny(), _helper="raise SystemExit(9)")
    code, out, _ = cli("list", "studies")
    assert code == 0 and out.splitlines()[1].split("\t")[::2] == ["two_lengths", "Does <b>more</b> help?"]
    assert [s["slug"] for s in json.loads(cli("list", "studies", "--json")[1])] == ["two_lengths"]


@pytest.mark.parametrize("text", ["", "STUDY = 3\ndef analyse(done): ...", tiny(slug="another")])
def test_a_file_that_is_no_study_is_named(package, text):
    folder = package(odd=text)
    with pytest.raises(UserError, match=r"odd\.py: a study has STUDY = Study\(slug='odd'") as caught:
        find("odd")
    assert str(folder) in str(caught.value)


def test_a_slip_in_a_cell_is_found_before_anything_runs(package, cli, tmp_path):
    package(two_lengths=tiny(temprature=1))
    code, _, err = cli("study", "two_lengths", "--out", tmp_path / "o")
    assert code == 2 and "did you mean 'temperature'" in err


def test_cells_are_the_runs_that_plan_gives(package):
    package(two_lengths=tiny(temperature=0.5))
    (cell, [spec]), _ = distillbench.runs.study.planned(find("two_lengths").study, [3])
    by_hand = plan(
        TRACK,
        ["seqkd"],
        [3],
        overrides={"seqkd": {"temperature": "0.5"}},
        controls=False,
        budget={"student_examples": 64},
        training={"schedule": "constant"},
        options={"prompts": 64, "references": 64},
    )
    assert cell.at == 64 and spec == by_hand[0] and spec.id == by_hand[0].id
    assert (spec.name, by_hand[0].name) == ("a at 64, seqkd seed 3", "seqkd seed 3")


def test_scores_are_in_the_axis_order_and_leave_out_what_has_none(package):
    package(two_lengths=tiny())
    cells = find("two_lengths").study.cells
    record = Record({}, "", {}, {}, "ok", None, (Measurement("kl", 0.5, 1),), {}, None, {}, "")
    done = [distillbench.runs.study.Done(c, {0: record}) for c in reversed(cells)]
    assert curve_of(done, "a", "kl") == {64: {0: 0.5}, 128: {0: 0.5}} and list(curve_of(done, "a", "kl")) == [64, 128]
    assert curve_of(done, "a", "tv") == {64: {}, 128: {}} and curve_of(done, "b", "kl") == {}
