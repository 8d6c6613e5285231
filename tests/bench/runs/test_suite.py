"""The contract of a suite: what either side is told, what judging leaves, and the networks that a judge trains for itself."""

import json
import sys

import pytest

from distillbench import api
from distillbench.cards import registry
from distillbench.cards.scaffold import write_suite
from distillbench.errors import UserError, WorkerDied
from distillbench.runs.identities import seeds_by_role
from distillbench.runs.plan import plan
from distillbench.runs.record import Record
from distillbench.runs.runner import execute
from distillbench.runs.store import Store
from distillbench.runs.suite import JudgeContext, TrainContext, suite_of

# The judge of the scaffold, and two probes that it trains on inputs of its own; each says in a file which step it takes.
PROBED = """
import json, os, signal
from distillbench.runs.suite import Artifact

STEPS = Path({steps!r})


class Probing(Judge):
    def evaluate(self, student, ctx):
        found = super().evaluate(student, ctx)

        def train(run):
            probe, data = build(Architecture("line"), run.seeds["init"]), draw(256, run.seeds["data"])

            def loss(batch):
                with STEPS.open("a") as file:
                    file.write(f"{{run.seeds['init']}} ")
                if STEPS.with_suffix(".stop").exists() and len(STEPS.read_text().split()) == 13:
                    os.kill(os.getpid(), signal.SIGKILL)
                return run.loss(batch, ce=nn.functional.cross_entropy(probe(batch.inputs), batch.labels, reduction="none"))

            return run.fit(probe, loss, Shuffled(data, torch.arange(256), 64, run.seeds["order"]))

        probes = [self.rebuild(ctx.fit(student, "probe", i, train, examples=640), ctx) for i in range(2)]
        values = [float(p(torch.ones(1, 1))[0, 1].detach()) for p in probes]
        artifacts = {{"probes": Artifact(json.dumps(values).encode(), "json"), "notes": Artifact(b"two probes", "text")}}
        return Judgement(found.measurements, artifacts)


SUITE = Probing()
"""


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """``suite(more)`` installs somebody's package with the scaffold's suite, and ``more`` behind it; its file is returned."""
    folder = tmp_path / "my_suites"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    real = registry.entry_points
    extra = registry.EntryPoint("mine", "my_suites", "distillbench.suites")
    monkeypatch.setattr(registry, "entry_points", lambda group: [*real(group=group), *([extra] if group == extra.group else [])])

    def install(more=""):
        path = write_suite("my-suite", folder)
        path.write_text(path.read_text().replace("import torch\n", "from pathlib import Path\n\nimport torch\n", 1) + more)
        registry.refresh()
        return path

    yield install
    registry.refresh()
    for name in [n for n in sys.modules if n.startswith("my_suites")]:
        del sys.modules[name]


def spec(method="scratch", seed=0, **more):
    return plan("my-suite/line", [method], [seed], controls=False, budget={"student_examples": 640}, **more)[0]


@pytest.fixture
def probed(suite, tmp_path):
    """The file in which each step of a probe is a word: its seed."""
    suite(PROBED.format(steps=str(tmp_path / "steps")))
    return tmp_path / "steps"


# --- what either side is told ------------------------------------------------------------------------------------------


def test_what_trains_knows_no_evaluation_seed_whoever_makes_its_context():
    seeds = seeds_by_role(3)
    told = TrainContext("line", registry.suite_card(registry.find("suite", "image-classification")).settings["blobs"], seeds)
    assert set(told.seeds) == set(seeds) - {"evaluation"} and seeds["evaluation"] not in told.seeds.values()
    assert not hasattr(told, "split") and told.tuning is False


def test_a_method_meets_neither_the_seed_nor_the_split(tmp_path, write_method):
    """All that a method can reach of a run's context: its problem and its run."""
    path = write_method("peek", "assert 'evaluation' not in run.seeds\nreturn run.fit(problem.student, loss, problem.batches)")
    for split in ("test", "tune"):
        [one] = plan("image-classification/blobs", [str(path)], [0], controls=False, split=split, budget={"student_examples": 64})
        assert "evaluation" in one.seeds
        record = execute(one, Store(tmp_path / "runs"))
        assert record.status == "ok", record.reason


def test_a_method_that_ruins_its_teacher_does_not_ruin_the_judges(tmp_path, write_method):
    """The digits' teacher is read once for a process; what a method gets is a copy."""
    ruin = "for p in problem.teacher._module.parameters():\n    p.data.zero_()\n"
    path = write_method("ruin", ruin + "problem.student.requires_grad_(True)\nreturn run.export(problem.student)")
    same, again = (write_method(slug, "return run.export(problem.student)") for slug in ("same", "again"))
    plans = [plan("image-classification/digits", [str(p)], [0], controls=False)[0] for p in (same, path, again)]
    untouched, ruined, after = (execute(one, Store(tmp_path / "runs")) for one in plans)
    assert ruined.status == "failed" and "the teacher's own network was changed" in ruined.reason
    assert after.status == untouched.status == "ok"
    assert after.value("agreement") == untouched.value("agreement") and after.student["sha256"] == untouched.student["sha256"]


@pytest.mark.parametrize(
    "more", ["\ndel SUITE\n", "\nSUITE = Judge\n", "\nSUITE = 'my-suite'\n", "\nimport types\nSUITE = types.SimpleNamespace(problem=1)\n"]
)
def test_a_package_without_a_suite_is_one_line(suite, more, tmp_path):
    path = suite(more)
    with pytest.raises(UserError, match="offers no SUITE") as error:
        suite_of(registry.find("suite", "my-suite"))
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="offers no SUITE"):
        execute(spec(), Store(tmp_path / "runs"))


def test_a_cap_is_not_asked_of_yardsticks_and_is_none_by_default(suite, tmp_path, write_method):
    suite("\nclass Capped(Judge):\n    def exceeds(self, student, ctx):\n        return f'{ctx.name} is full'\nSUITE = Capped()\n")
    assert suite_of(registry.find("suite", "image-classification")).exceeds(None, None) is None
    assert execute(spec(), Store(tmp_path / "runs")).status == "ok"
    record = execute(spec("kd"), Store(tmp_path / "runs"))
    assert (record.status, record.reason) == ("over_budget", "line is full") and record.finished


# --- the judge's own networks ------------------------------------------------------------------------------------------


def test_what_the_judge_trains_is_billed_to_the_judge_alone(probed, tmp_path):
    record = execute(spec(), Store(tmp_path / "runs"))
    assert record.status == "ok", record.reason
    assert record.cost["phases"]["judge"]["student_examples"] == 2 * 640 and record.cost["phases"]["judge"]["student_steps"] == 20
    assert record.cost["total"]["student_examples"] == 640  # the budget, to the last example
    seeds = probed.read_text().split()
    assert len(seeds) == 20 and len(set(seeds)) == 2 and len(set(seeds[:10])) == 1  # one after the other, each with its own
    assert not {int(s) for s in seeds} & set(spec().seeds.values())


def test_what_was_trained_for_a_student_is_found_again_and_costs_the_same(probed, tmp_path):
    store = Store(tmp_path / "runs")
    first = execute(spec(), store)
    [kept] = (store.root / "records").rglob("*.record")
    kept.unlink()
    again = execute(spec(), store)
    assert len(probed.read_text().split()) == 20
    assert again.artifacts == first.artifacts and again.measurements == first.measurements
    assert again.cost["phases"]["judge"] == first.cost["phases"]["judge"]
    execute(spec(seed=1), store)  # another student
    assert len(probed.read_text().split()) == 40
    for path in (store.root / "judging" / "judge").glob("*.kept"):
        path.write_bytes(path.read_bytes()[:-1])
    [kept] = (p for p in (store.root / "records").rglob("*.record") if Record.read(p).seed == 0)
    kept.unlink()
    assert execute(spec(), store).artifacts == first.artifacts  # what is damaged is trained again
    assert len(probed.read_text().split()) == 60


def test_the_key_holds_student_role_index_seed_track_and_code(suite, tmp_path):
    suite()
    from distillbench.training.nets import Architecture
    from distillbench.training.student import Student

    module = registry.find("suite", "my-suite").load()
    one, other = (Student.of(module.build(Architecture("line"), seed)) for seed in (1, 2))
    trained = []

    def train(run):
        trained.append(run.seeds["init"])
        return run.export(module.build(Architecture("line"), run.seeds["init"]))

    def told(key="k", seed=0):
        setting = registry.suite_card(registry.find("suite", "my-suite")).settings["line"]
        return JudgeContext("line", setting, seeds_by_role(seed), cache=tmp_path / "cache", key=key)

    asked = [
        (told(), one, "probe", 0),
        (told(), other, "probe", 0),
        (told(), one, "fresh", 0),
        (told(), one, "probe", 1),
        (told(seed=1), one, "probe", 0),
        (told("other code"), one, "probe", 0),
    ]
    for _ in range(2):
        for ctx, student, role, index in asked:
            ctx.fit(student, role, index, train, examples=64)
    assert len(trained) == len(asked)
    told(key=None).fit(one, "probe", 0, train, examples=64)
    assert len(trained) == len(asked) + 1 and trained[-1] == trained[0]  # nothing is kept, and the seeds are the same


def test_a_judge_that_was_killed_goes_on_where_it_stopped(probed, tmp_path):
    store, stop = Store(tmp_path / "runs"), probed.with_suffix(".stop")
    stop.touch()
    with pytest.raises(WorkerDied, match="judges died"):
        execute(spec(), store, checkpoint_seconds=0.0)
    assert len(probed.read_text().split()) == 13 and not list(store.root.glob("records/**/*.record"))
    stop.unlink()
    record = execute(spec(), store, checkpoint_seconds=0.0)
    assert record.status == "ok" and len(probed.read_text().split()) == 13 + 8  # the first probe is there, the second had two steps
    assert record.artifacts == execute(spec(), Store(tmp_path / "other")).artifacts
    assert not [p for p in (store.root / "judging" / "judge").iterdir() if p.is_dir()]  # its checkpoints are gone


# --- what judging leaves -------------------------------------------------------------------------------------------------


def test_artifacts_are_in_the_store_by_hash_and_in_the_record_by_name(probed, tmp_path):
    store = Store(tmp_path / "runs")
    record = execute(spec(), store)
    assert {name: about["kind"] for name, about in record.artifacts.items()} == {"probes": "json", "notes": "text"}
    content = (store.root / "artifacts" / record.artifacts["notes"]["sha256"]).read_bytes()
    assert content == b"two probes" and record.picture is None
    again = Record.from_bytes(record.to_bytes())
    assert again.artifacts == record.artifacts
    without = execute(plan("image-classification/blobs", ["teacher"], [0], controls=False)[0], store)
    assert "artifacts" not in json.loads(without.to_json())


@pytest.mark.parametrize(
    "about", [{"sha256": "../../etc/passwd", "kind": "text"}, {"sha256": "0" * 64}, {"sha256": 3, "kind": "text"}, "x"]
)
def test_an_artifact_that_names_no_file_of_the_store_makes_no_record(tmp_path, about):
    import dataclasses

    record = execute(plan("image-classification/blobs", ["teacher"], [0], controls=False)[0], Store(tmp_path))
    with pytest.raises(UserError, match="not a whole record"):
        Record.from_bytes(dataclasses.replace(record, artifacts={"x": about}).to_bytes())


def test_weights_are_judged_outside_a_run_too(probed, tmp_path):
    store = Store(tmp_path / "runs")
    record = execute(spec(), store)
    assert api.judge(api.weights(record, store.root), "my-suite/line") == {m.metric: m.value for m in record.measurements}
    assert len(probed.read_text().split()) == 40  # nothing is kept there: the probes were trained again


TOGETHER = """
import os, sys
from pathlib import Path
from distillbench.cards import registry
from distillbench.cli.main import main
from distillbench.runs import lanes
place, store = sys.argv[1:]
sys.path.insert(0, place)
real, extra = registry.entry_points, registry.EntryPoint("mine", "my_suites", "distillbench.suites")
registry.entry_points = lambda group: [*real(group=group), *([extra] if group == extra.group else [])]
lanes.START = "fork"  # they know what was replaced here
for i in range(2):  # the second time, what the judge has trained is found
    code = main(["run", "my-suite/line", "--method", "scratch", "--seeds", "1", "--no-controls", "--budget", "640", "--out", store])
    assert code == 0, code
    if os.environ["RANK"] == "0":
        [record] = Path(store, "records").rglob("*.record")
        record.rename(Path(store, f"{i}.record"))
"""


@pytest.mark.slow
def test_two_processes_train_what_one_trains(probed, tmp_path):
    from tests.bench.training.test_processes import together

    done = together(TOGETHER, tmp_path, tmp_path / "two")
    assert all(code == 0 for code, *_ in done), done
    first, again = (Record.read(tmp_path / "two" / f"{i}.record") for i in range(2))
    steps = len(probed.read_text().split())
    alone = execute(spec(), Store(tmp_path / "one"))
    assert steps == 20 and first.environment["processes"] == 2  # one judge for both
    for record in (first, again):
        for meter in ("student_examples", "student_steps"):
            assert record.cost["phases"]["judge"][meter] == alone.cost["phases"]["judge"][meter]

    def probes(store, record):
        return json.loads((tmp_path / store / "artifacts" / record.artifacts["probes"]["sha256"]).read_text())

    assert probes("two", first) == probes("two", again) == pytest.approx(probes("one", alone), abs=1e-4)
