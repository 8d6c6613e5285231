import dataclasses
import json
from pathlib import Path

import pytest

from distillbench.cards import registry
from distillbench.cards.card import Card, Paper
from distillbench.errors import UserError
from distillbench.files import digest_tree
from distillbench.identity import derive_seed
from distillbench.runs.identities import arena_of, seeds_by_role
from distillbench.runs.plan import plan, track
from distillbench.runs.record import Measurement, Record
from distillbench.runs.store import Store

TRACK = "image-classification/blobs"


def one(*arguments, **options):
    [spec] = plan(TRACK, *arguments, controls=False, **options)
    return spec


def test_controls_come_first_and_once():
    specs = plan(TRACK, ["kd", "scratch", "kd"], [0, 1])
    controls = list(track(TRACK)[1].controls)
    assert [s.method for s in specs] == 2 * [*controls, "kd"]
    assert [s.seed for s in specs] == 5 * [0] + 5 * [1]
    assert len({s.id for s in specs}) == 10
    assert [s.method for s in plan(TRACK, ["kd"], [0], controls=False)] == ["kd"]


def test_all_is_every_method_of_the_problem_but_the_controls():
    chosen = {s.method for s in plan(TRACK, ["all"], [0], controls=False)}
    cards = [e.card for e in registry.methods().values() if e.card is not None]
    assert chosen == {c.slug for c in cards if c.problem == "classification" and not c.control}
    assert "kd" in chosen and "scratch" not in chosen


@pytest.mark.parametrize(
    ("name", "methods", "options", "says"),
    [
        ("image-clasification/blobs", ["kd"], {}, "unknown suite .*did you mean 'image-classification'"),
        ("image-classification/blob", ["kd"], {}, "unknown setting of image-classification 'blob'; did you mean 'blobs'"),
        ("image-classification", ["kd"], {}, "names a suite; a track is suite/setting: .*image-classification/blobs"),
        (TRACK, ["pseudo_lable"], {}, "unknown method 'pseudo_lable'; did you mean 'pseudo_label'"),
        (TRACK, ["nowhere.py"], {}, "no such file"),
        (TRACK, ["kd"], {"split": "train"}, "unknown split 'train'"),
        (TRACK, ["kd"], {"overrides": {"kdd": {"temperature": 1}}}, "unknown method in --set 'kdd'; did you mean 'kd'"),
        (TRACK, ["kd"], {"overrides": {"kd": {"temperatur": 1}}}, "unknown hyper-parameter of kd 'temperatur'; did you mean 'temperature'"),
        (TRACK, ["kd"], {"overrides": {"kd": {"temperature": "0"}}}, r"kd\.temperature=0: must be > 0; default 4\.0"),
    ],
)
def test_wrong_names_are_one_line_with_the_nearest(name, methods, options, says):
    with pytest.raises(UserError, match=says) as caught:
        plan(name, methods, [0], **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"budget": {"student_example": 9}},
            "unknown budget of image-classification/blobs 'student_example'; did you mean 'student_examples'",
        ),
        ({"training": {"shedule": "constant"}}, "unknown training of .* 'shedule'; did you mean 'schedule'"),
        ({"options": {"no_such": 1}}, "unknown option of .* 'no_such'"),
    ],
)
def test_only_what_a_setting_has_can_be_replaced(changes, says):
    with pytest.raises(UserError, match=says):
        plan(TRACK, ["kd"], [0], **changes)


def test_other_options_or_training_are_another_board_and_the_same_ones_are_not():
    setting = registry.suite_card(registry.find("suite", "image-classification")).settings["blobs"]
    name, value = next((k, v) for k, v in setting.options.items() if isinstance(v, int))
    base = one(["kd"], [0]).id
    assert one(["kd"], [0], options={name: value}, training={"schedule": setting.training.schedule}).id == base
    assert one(["kd"], [0], options={name: value + 1}).id != base
    other = one(["kd"], [0], training={"learning_rate": 0.5})
    assert other.id != base
    assert other.setting_card.training.learning_rate == other.identity["setting"]["training"]["learning_rate"] == 0.5


def test_a_method_of_another_problem_says_where_it_runs(write_method):
    with pytest.raises(UserError, match="method odd solves weaving, suite image-classification asks for classification; it runs on: no"):
        plan(TRACK, [str(write_method("odd", problem="weaving"))], [0])


def test_overrides_change_the_identity_and_only_their_method():
    base = {s.method: s.id for s in plan(TRACK, ["kd"], [0])}
    hot = {s.method: s for s in plan(TRACK, ["kd"], [0], overrides={"kd": {"temperature": "2"}})}
    assert hot["kd"].hyperparameters["temperature"] == 2.0
    assert {m for m in base if base[m] != hot[m].id} == {"kd"}
    assert {s.method: s.id for s in plan(TRACK, ["kd"], [0], overrides={"kd": {"temperature": 4}})} == base  # the default, said aloud


def test_budget_split_and_seed_change_the_identity_and_controls_do_not():
    ids = [
        one(["kd"], [0]).id,
        one(["kd"], [1]).id,
        one(["kd"], [0], budget={"student_examples": 640}).id,
        one(["kd"], [0], split="tune").id,
        one(["kd"], [0], overrides={"kd": {"ce_weight": 0}}).id,
    ]
    assert len(set(ids)) == 5
    assert one(["kd"], [0]).id == ids[0] == next(s.id for s in plan(TRACK, ["kd"], [0]) if s.method == "kd")
    assert one(["kd"], [0], budget={"student_examples": 640}).setting_card.budget.student_examples == 640


def test_a_method_file_by_path_is_identified_by_its_bytes_not_by_its_place(write_method, tmp_path):
    path = write_method("mine")
    spec = one([str(path)], [0])
    assert spec.method == str(path) and spec.name == "mine seed 0"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = path.rename(elsewhere / "mine.py")
    assert one([str(moved)], [0]).id == spec.id
    moved.write_bytes(moved.read_bytes().replace(b"\n", b"\r\n"))
    assert one([str(moved)], [0]).id == spec.id  # line ends are git's business
    moved.write_text(moved.read_text() + "# more\n")
    assert one([str(moved)], [0]).id != spec.id


def test_an_installed_method_named_by_its_path_is_that_method():
    assert one([str(registry.find("method", "kd").path)], [0]).id == one(["kd"], [0]).id


def test_a_catalogue_name_stands_for_every_method_of_its_paper(monkeypatch, tmp_path):
    paper = Paper(title="T", year=2020, catalogue="Twins")
    entries = {}
    for slug in ("twin-a", "twin-b", "other"):
        card = Card(slug=slug, version=1, problem="classification", title=slug, paper=paper if slug != "other" else None)
        path = tmp_path / f"{slug}.py"
        path.write_text("")
        entries[slug] = registry.Entry("method", slug, path, None, card)
    monkeypatch.setattr(registry, "_found", lambda kind, real=registry._found: {**real(kind), **(entries if kind == "method" else {})})
    assert [s.method for s in plan(TRACK, ["Twins", "kd"], [0], controls=False)] == ["twin-a", "twin-b", "kd"]


def test_folders_are_digested_by_names_and_bytes(tmp_path, monkeypatch):
    def tree(name, **files):
        for place, content in files.items():
            path = tmp_path / name / place.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return digest_tree(tmp_path / name)

    base = tree("a", x=b"1", sub__y=b"2")
    assert tree("b", sub__y=b"2", x=b"1") == base
    assert len({base, tree("c", x=b"2", sub__y=b"1"), tree("d", x=b"1", y=b"2"), tree("e", x=b"1"), tree("f", x=b"12", sub__y=b"")}) == 5
    with monkeypatch.context() as patch:  # a file system may list them in any order
        patch.setattr(Path, "rglob", lambda folder, pattern, real=Path.rglob: reversed(list(real(folder, pattern))))
        assert digest_tree(tmp_path / "a") == base
    assert digest_tree(tmp_path / "a" / "x") == digest_tree(tmp_path / "b" / "x") != digest_tree(tmp_path / "c" / "x")
    (tmp_path / "empty").mkdir()
    for name, says in (("empty", "is empty; put CIFAR there"), ("absent", "not found; put CIFAR there")):
        with pytest.raises(UserError, match=says):
            digest_tree(tmp_path / name, "CIFAR", "somewhere")


def test_data_that_the_card_does_not_pin_must_be_there_and_is_hashed(tmp_path, monkeypatch):
    monkeypatch.delenv("DISTILLBENCH_DATA", raising=False)
    paper = "image-classification/cifar100"
    with pytest.raises(UserError, match=r"needs CIFAR-100 .*--data DIR or the environment variable DISTILLBENCH_DATA"):
        plan(paper, ["kd"], [0])
    with pytest.raises(UserError, match="not found; put CIFAR-100 there"):
        plan(paper, ["kd"], [0], data=str(tmp_path))
    for place in ("cifar100/train/apple/1.png", "teachers/resnet32x4.safetensors"):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).write_bytes(b"first")
    first = plan(paper, ["kd"], [0], data=str(tmp_path), controls=False)[0]
    assert first.identity["setting"]["digests"]["teacher"] == digest_tree(tmp_path / "teachers" / "resnet32x4.safetensors")
    monkeypatch.setenv("DISTILLBENCH_DATA", str(tmp_path))
    assert plan(paper, ["kd"], [0], controls=False)[0].id == first.id
    (tmp_path / "teachers" / "resnet32x4.safetensors").write_bytes(b"second")
    assert plan(paper, ["kd"], [0], controls=False)[0].id != first.id


def test_seeds_follow_the_run_but_for_the_teacher():
    zero, one_ = seeds_by_role(0), seeds_by_role(1)
    assert {r for r in zero if zero[r] == one_[r]} == {"teacher"}
    assert zero["init"] == derive_seed("init", 0)
    specs = plan(TRACK, ["kd"], [3])
    assert len({json.dumps(s.seeds, sort_keys=True) for s in specs}) == 1  # shared by all methods: comparisons are paired


def finished(spec):
    """A record as the runner would leave it, made without running anything."""
    return Record(
        identity=spec.identity,
        setting_name=spec.setting,
        cards=spec.cards,
        code=spec.code.kept(),
        status="ok",
        reason=None,
        measurements=tuple(Measurement.mean(m.name, [1.0, 0.0]) for m in spec.suite_card.metrics),
        cost={"total": {}, "phases": {}},
        student=None,
        environment={},
        created="2026-01-01T00:00:00+00:00",
    )


def test_a_finished_record_has_the_planned_identity_and_is_found(tmp_path):
    store = Store(tmp_path)
    spec = one(["kd"], [0])
    store.save(finished(spec))
    again = one(["kd"], [0])
    assert store.find(again).id == again.id == spec.id
    assert store.find(one(["kd"], [1])) is None


def test_a_hundred_cached_runs_are_planned_again_in_a_second_without_torch(tmp_path, python):
    store = Store(tmp_path / "store")
    for spec in plan(TRACK, ["kd"], range(20)):
        values = [float(i % 2) for i in range(4000)]
        store.save(
            dataclasses.replace(finished(spec), measurements=tuple(Measurement.mean(m.name, values) for m in spec.suite_card.metrics))
        )
    made = set(store.root.rglob("*.record"))
    code = (
        "import sys, time; from distillbench.cli.main import main; start = time.perf_counter()\n"
        "code = main(['run', sys.argv[1], '--method', 'kd', '--seeds', '20', '--out', sys.argv[2], '--json'])\n"
        "took = time.perf_counter() - start; assert code == 0 and 'torch' not in sys.modules; print('SECONDS', time.process_time(), took)"
    )
    out = python(code, TRACK, tmp_path / "store")
    listing, _, seconds = out.rpartition("SECONDS")
    assert len(json.loads(listing)) == 100
    assert {r["status"] for r in json.loads(listing)} == {"ok"} and set(store.root.rglob("*.record")) == made  # nothing was run
    assert min(float(s) for s in seconds.split()) < 1.0  # of this process: whoever else is busy on the machine does not count


def test_the_arena_of_a_track_is_what_its_runs_share():
    arenas = {json.dumps(arena_of(s.identity)) for s in plan(TRACK, ["kd"], [0, 1])}
    assert len(arenas) == 1
    assert set(json.loads(arenas.pop())) == {"engine", "kind", "suite", "setting", "split"}


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        ({"pace": "renders"}, "'renders' has no cap, so it can be neither the pace nor hard"),
        ({"pace": 3}, "3 has no cap"),
        ({"hard": ["wall_seconds"]}, "'wall_seconds' has no cap"),
        ({"hard": [[]]}, r"\[\] has no cap"),
        ({"hard": "student_examples"}, "hard is a list of meters, not 'student_examples'"),
        ({"student_tokens": "many"}, "the cap student_tokens is a number from 0 on, or none, not 'many'"),
        ({"teacher_examples": -1}, "the cap teacher_examples is a number from 0 on"),
        ({"teacher_examples": True}, "the cap teacher_examples is a number from 0 on"),
    ],
)
def test_a_budget_that_is_none_is_one_line(budget, says):
    with pytest.raises(UserError, match=f"image-classification/blobs: budget: {says}") as caught:
        one(["kd"], [0], budget=budget)
    assert "\n" not in str(caught.value)


def test_hard_caps_and_another_pace_are_another_board():
    plain = one(["kd"], [0]).id
    assert one(["kd"], [0], budget={"pace": "student_examples"}).id == plain  # as it is anyway
    assert len({plain, *(one(["kd"], [0], budget=b).id for b in ({"student_tokens": 9}, {"hard": ["student_examples"]}))}) == 3
