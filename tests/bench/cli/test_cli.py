import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distillbench.runs.record import Record, read_records

TRACK = "image-classification/blobs"
ROOT = Path(__file__).parents[3]
QUICK = ("--seeds", "1", "--no-controls", "--workers", "1", "--budget", "640")


def bad(result, code, *words):
    """One line on stderr, nothing on stdout, the right code."""
    got, out, err = result
    assert out == ""
    assert err.startswith("distillbench: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert "Traceback" not in err
    for word in words:
        assert word in err, err
    assert got == code
    return err


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("rum", ["unknown command 'rum'; did you mean 'run'", "distillbench --help"]),
        ("list method", ["unknown kind 'method'; did you mean 'methods'"]),
        ("list methods --jsn", ["unrecognized arguments: --jsn"]),
        ("run", ["required: SUITE/SETTING"]),
        (f"run {TRACK} --method pseudo_lable", ["unknown method 'pseudo_lable'; did you mean 'pseudo_label'"]),
        ("run image-clasification/blobs --method kd", ["unknown suite 'image-clasification'; did you mean 'image-classification'"]),
        ("run image-classification/blob --method kd", ["unknown setting of image-classification 'blob'; did you mean 'blobs'"]),
        ("run image-classification --method kd", ["names a suite; a track is suite/setting", TRACK]),
        (f"run {TRACK} --method kd --set kd.temprature=2", ["unknown hyper-parameter of kd 'temprature'; did you mean 'temperature'"]),
        (f"run {TRACK} --method kd --set kd.temperature=0", ["kd.temperature=0: must be > 0; default 4.0"]),
        (f"run {TRACK} --method kd --set kd.temperature=hot", ["kd.temperature=hot: ", "default 4.0"]),
        (f"run {TRACK} --method kd --set kd.temperature=nan", ["kd.temperature=nan: not finite"]),
        (f"run {TRACK} --method kd --set temperature=2", ["write METHOD.NAME=VALUE, for example kd.temperature=2"]),
        (f"run {TRACK} --method kd --set kd.temperature", ["write METHOD.NAME=VALUE"]),
        (f"run {TRACK} --method kd --set =", ["write METHOD.NAME=VALUE"]),
        (f"run {TRACK} --method kd --set kdd.temperature=2", ["unknown method in --set 'kdd'; did you mean 'kd'"]),
        (f"run {TRACK} --method kd --seeds many", ["--seeds many: give a number of seeds (5) or a range (5-9)"]),
        (f"run {TRACK} --method kd --seeds 0", ["--seeds 0: at least one seed"]),
        (f"run {TRACK} --method kd --seeds 9-5", ["--seeds 9-5: at least one seed"]),
        (f"run {TRACK} --method kd --seeds 3-", ["--seeds 3-: give a number"]),
        (f"run {TRACK} --method kd --budget 0", ["argument --budget: '0' is not a positive whole number"]),
        (f"run {TRACK} --method kd --budget 1e5", ["argument --budget: '1e5' is not a positive whole number"]),
        (f"run {TRACK} --method kd --workers -1", ["'-1' is not a positive whole number"]),
        (f"run {TRACK} --method kd --split train", ["unknown split 'train'"]),
        (f"run {TRACK} --method nowhere.py", ["nowhere.py: no such file"]),
        ("run image-classification/cifar100 --method kd", ["needs CIFAR-100", "--data DIR", "DISTILLBENCH_DATA"]),
        ("run image-classification/cifar100 --method kd --data /nowhere", ["/nowhere/cifar100: not found; put CIFAR-100 there"]),
        ("show nothing", ["nothing: neither a file nor the beginning of a record's id in runs or of a published record"]),
        ("show ../../x", ["neither a file nor"]),
        (f"show {'0' * 5000}", ["neither a file nor", "(5,000 characters)"]),
        ("check nosuchmethod", ["unknown method 'nosuchmethod'"]),
        ("check nowhere.py", ["nowhere.py: no such file"]),
        ("new method Bad-Slug", ["the slug 'Bad-Slug' must be lower-case"]),
        ("new method ../up", ["the slug '../up' must be lower-case"]),
        ("new method x --problem clasification", ["unknown kind of problem 'clasification'; did you mean 'classification'"]),
        ("new suite 9x", ["the slug '9x'"]),
        ("new card x", ["unknown kind 'card'"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(cli, command, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISTILLBENCH_DATA", raising=False)
    bad(cli(*command.split()), 2, *words)
    assert list(tmp_path.iterdir()) == []  # nothing was begun


def test_a_method_of_another_problem(cli, write_method, tmp_path):
    path = write_method("weaver", problem="weaving")
    bad(cli("run", TRACK, "--method", path, "--out", tmp_path / "s"), 2, "weaver solves weaving", "asks for classification")


def test_a_module_that_fails_to_import(cli, write_method, tmp_path):
    path = write_method("odd")
    path.write_text(path.read_text() + "import no_such_package\n")
    code, _, err = cli("run", TRACK, "--method", path, *QUICK, "--out", tmp_path / "s")
    lines = [line for line in err.splitlines() if line.startswith("distillbench:")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err
    assert "odd fails to import" in lines[0] and "No module named 'no_such_package'" in lines[0] and "pip install" in lines[0]


def test_a_method_that_does_not_fit_is_skipped_and_no_failure(cli, write_method, tmp_path):
    skips = write_method("skips", "from distillbench.errors import NotApplicable\nraise NotApplicable('this teacher has no stages')")
    code, out, err = cli("run", TRACK, "--method", skips, "--method", "scratch", *QUICK, "--out", tmp_path)
    assert code == 0 and "skips seed 0 skipped: this teacher has no stages" in err.splitlines()
    assert [line.split("\t")[-1] for line in out.splitlines() if line.startswith(("skips", "scratch"))] == ["skipped", "ok"]
    fails = write_method("fails", "raise RuntimeError('no')")
    assert cli("run", TRACK, "--method", skips, "--method", fails, *QUICK, "--out", tmp_path)[0] == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["corrupt or truncated"]),
        (b"\x00\xff\xfe", ["corrupt or truncated"]),
        (b'{"schema": 1', ["corrupt or truncated"]),
        (b'{"schema": 7}', ["schema 7", "upgrade distillbench"]),
        (b"[]", ["not a distillbench record"]),
        (b"[" * 100_000, ["corrupt or truncated"]),
    ],
)
def test_showing_what_is_no_record(cli, tmp_path, content, words):
    path = tmp_path / "record.json"
    path.write_bytes(content)
    bad(cli("show", path), 2, str(path), *words)


def test_a_newer_store_and_a_file_for_a_store(cli, tmp_path):
    (tmp_path / "store.json").write_text('{"schema": 3}')
    bad(cli("run", TRACK, "--method", "kd", *QUICK, "--out", tmp_path), 2, "a store of schema 3", "upgrade")
    bad(cli("run", TRACK, "--method", "kd", *QUICK, "--out", tmp_path / "store.json"), 2, "is a file, not a store", "--out")


def test_a_store_that_cannot_be_written_is_exit_code_four(cli, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = cli("run", TRACK, "--method", "kd", *QUICK, "--out", tmp_path / "file" / "below")
    assert code == 4 and err.splitlines()[-1].startswith("distillbench: ") and "--out" in err and "Traceback" not in err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_store_is_exit_code_four(cli, tmp_path):
    tmp_path.chmod(0o500)
    code, _, err = cli("run", TRACK, "--method", "kd", *QUICK, "--out", tmp_path / "store")
    assert code == 4 and "--out" in err and "Traceback" not in err


def test_a_full_disk_is_exit_code_four_and_the_same_command_finishes(cli, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    command = ("run", TRACK, "--method", "kd", *QUICK, "--out", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        code, _, err = cli(*command)
    assert code == 4 and "the disk is full: free some space" in err
    assert cli(*command)[0] == 0


def test_another_packages_broken_command_takes_nothing_down(cli, capsys, monkeypatch):
    from importlib.metadata import EntryPoint

    import distillbench.cli.arguments
    from distillbench.cli.main import main

    monkeypatch.setattr(distillbench.cli.arguments, "entry_points", lambda group: [EntryPoint("broken", "no_such_package:x", group)])
    capsys.readouterr()
    assert main(["list", "methods"]) == 0
    out, err = capsys.readouterr()
    assert "kd\t" in out and err.startswith("distillbench: command 'broken' is left out: ModuleNotFoundError") and err.count("\n") == 1


# --- commands ---------------------------------------------------------------------------------------------------


def test_run_as_json_show_and_done_before(cli, tmp_path):
    command = ("run", TRACK, "--method", "kd", "--set", "kd.temperature=2", *QUICK, "--out", tmp_path / "store")
    code, out, err = cli(*command, "--json")
    assert code == 0 and "1 runs, 0 done before, 1 to do, 1 at once" in err
    [run] = json.loads(out)
    assert set(run) == {"method", "seed", "id", "status", "reason", "measurements", "cost", "student"}
    assert (run["method"], run["seed"], run["status"], run["reason"]) == ("kd", 0, "ok", None)
    assert set(run["measurements"]) == {"top1", "nll", "ece", "agreement"} and 0 <= run["measurements"]["top1"] <= 1
    assert run["cost"]["student_examples"] == 640 and run["cost"]["peak_memory_bytes"] > 0
    assert Path(run["student"]).is_file()
    [record] = read_records(tmp_path / "store" / "records")[0]
    assert record.id == run["id"] and record.hyperparameters["temperature"] == 2.0

    code, again, err = cli(*command, "--json")
    assert (code, again, err) == (0, out, "")  # nothing left to say about

    code, out, err = cli("show", record.id[:10], "--out", tmp_path / "store")
    shown = dict(line.split("\t") for line in out.splitlines())
    assert code == 0 and err == ""
    assert shown["id"] == record.id and shown["status"] == "ok" and "temperature=2.0" in shown["method"] and shown["seed"] == "0"
    assert " [" in shown["top1"] and shown["top1"].endswith("] over 4000")  # with its interval over test images
    code, out, _ = cli("show", record.id, "--source", "--out", tmp_path / "store")
    assert code == 0 and (ROOT / "methods" / "classification" / "kd.py").read_text() in out
    code, out, _ = cli("show", record.id, "--json", "--out", tmp_path / "store")
    assert code == 0 and Record.from_bytes(out) == record
    bad(cli("show", record.id[:-1] + "z", "--out", tmp_path / "store"), 2, "neither a file nor")
    assert cli(*command, "--seeds", "1-16")[0] == 0  # 17 ids, and 16 digits to begin with
    ids = [r.id for r in read_records(tmp_path / "store" / "records")[0]]
    shared = next(i[0] for i in ids if sum(j[0] == i[0] for j in ids) > 1)
    bad(cli("show", shared, "--out", tmp_path / "store"), 2, "several records", "give more digits")


def test_run_for_people_shows_means_and_failures(cli, tmp_path, write_method):
    fails = write_method("fails", "raise RuntimeError('two\\nlines')")
    code, out, err = cli("run", TRACK, "-m", "scratch", fails, "--seeds", "2", *QUICK[2:], "--out", tmp_path / "store")
    rows = [line.split("\t") for line in out.splitlines()]
    assert code == 1
    assert rows[0] == ["method", "seeds", "top1", "low", "high", "status"]
    assert [r[:2] for r in rows[1:]] == [["scratch", "2"], ["fails", "0"]] and rows[2][-1] == "failed"
    assert float(rows[1][3]) < float(rows[1][2]) < float(rows[1][4])
    assert "fails seed 1: failed RuntimeError: two lines (fails.py:" in err and "Traceback" not in err


def test_an_over_budget_run_is_exit_code_one(cli, tmp_path, write_method):
    greedy = write_method("greedy", "return run.fit(problem.student, loss, problem.batches, steps=99)")
    code, out, _ = cli("run", TRACK, "-m", greedy, *QUICK, "--out", tmp_path / "store", "--json")
    [run] = json.loads(out)
    assert code == 1 and run["status"] == "over_budget" and run["reason"] == "student_examples 6336 of 640"


def test_the_name_alone_shows_the_whole_help(cli, capsys):
    code, out, err = cli()
    assert (code, err) == (0, "")
    with pytest.raises(SystemExit):
        cli("--help")
    assert out == capsys.readouterr().out
    assert "usage: distillbench" in out and "exit codes: 0 done" in out
    assert all(f"\n    {command} " in out for command in ("list", "run", "study", "check", "show", "guard", "doctor", "new"))


def test_a_published_record_is_shown_by_the_beginning_of_its_id(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no store here
    [record, *_] = read_records(ROOT / "leaderboard" / "records" / TRACK / "kd")[0]
    code, out, err = cli("show", record.id[:20])
    assert (code, err) == (0, "") and f"id\t{record.id}" in out and "method\tkd v1" in out
    bad(cli("show", record.id[0]), 2, "several records in runs and among the published ones", "give more digits")
    bad(cli("show", "²²²"), 2, "neither a file nor")  # digits to Python, not to us
    code, out, _ = cli("show", record.id, "--json")
    assert code == 0 and Record.from_bytes(out) == record


def test_records_of_a_package_that_is_gone_are_none(monkeypatch):
    from importlib.metadata import EntryPoint

    import distillbench.runs.published as published

    real = published.folders()
    assert real == [ROOT / "leaderboard" / "records"]
    more = [EntryPoint(n, v, "distillbench.records") for n, v in (("a", "no_such.package"), ("b", "no_such"), ("c", "json"))]
    monkeypatch.setattr(published, "entry_points", lambda group: more)
    assert published.folders() == []  # json is there, and holds no records


def test_lists_as_json(cli):
    code, out, err = cli("list", "methods", "--json")
    entries = {e["slug"]: e for e in json.loads(out)}
    assert code == 0 and err == ""
    assert set(entries["kd"]) == {"slug", "path", "error", "card"} and entries["kd"]["error"] is None
    assert entries["kd"]["card"]["hyperparameters"]["temperature"]["default"] == 4.0 and Path(entries["kd"]["path"]).is_file()
    code, out, _ = cli("list", "suites", "--json")
    [suite] = [e for e in json.loads(out) if e["slug"] == "image-classification"]
    assert code == 0 and suite["card"]["settings"]["blobs"]["tier"] == "analytic"
    assert f"{TRACK}\tclassification\tanalytic\t" in cli("list", "suites")[1]


def test_the_doctor_names_every_part_and_a_remedy_for_what_is_missing(cli, monkeypatch):
    monkeypatch.delenv("DISTILLBENCH_DATA", raising=False)
    code, out, _ = cli("doctor", "--json")
    found = {f["what"]: f for f in json.loads(out)}
    assert code == 0
    assert all(set(f) == {"what", "state", "remedy"} and f["state"] in ("ok", "missing", "broken") for f in found.values())
    assert all(f["remedy"] for f in found.values() if f["state"] != "ok")
    assert not [f for f in found.values() if f["state"] == "broken"]
    assert found[TRACK]["state"] == "ok" and found["method classification/kd"]["state"] == "ok"
    cifar = found["image-classification/cifar100"]
    assert cifar["state"] == "missing" and "--data" in cifar["remedy"] and "CIFAR-100" in cifar["remedy"]


def test_a_new_method_runs_and_passes_every_check_but_the_card(cli, tmp_path):
    code, out, _ = cli("new", "method", "my-idea", "--into", tmp_path / "deep")
    path = tmp_path / "deep" / "my-idea.py"
    assert code == 0 and out.strip() == str(path)
    bad(cli("new", "method", "my-idea", "--into", tmp_path / "deep"), 2, "is there already")
    code, out, _ = cli("check", path, "--json")
    outcomes = {r["check"]: r["outcome"] for r in json.loads(out)}
    assert code == 3 and {c for c, o in outcomes.items() if o == "failed"} == {"card"}
    assert list(outcomes.values()).count("passed") > len(outcomes) / 2
    path.write_text(path.read_text().replace("TODO: ", ""))
    code, out, _ = cli("run", TRACK, "-m", path, *QUICK, "--out", tmp_path / "store", "--json")
    assert code == 0 and json.loads(out)[0]["status"] == "ok"


def test_a_new_suite_is_a_readable_card_and_is_not_written_twice(cli, tmp_path):
    from distillbench.cards.reading import read_card

    code, out, _ = cli("new", "suite", "my-suite", "--into", tmp_path)
    assert code == 0 and read_card(Path(out.strip())).slug == "my-suite"
    bad(cli("new", "suite", "my-suite", "--into", tmp_path), 2, "is there already")


# --- processes --------------------------------------------------------------------------------------------------


def best(command, times=5):
    """The least CPU seconds (of all, waiting excluded) that a command took: what a busy machine disturbs least."""
    import resource

    taken = []
    environment = {**os.environ}
    for _ in range(times):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(taken)


def test_help_is_quick():
    bare = best([sys.executable, "-c", "import argparse, importlib.metadata"])
    ours = best([sys.executable, "-m", "distillbench", "--help"])
    assert ours / bare < 4


def test_a_closed_pipe_is_no_error():
    environment = {**os.environ}
    done = subprocess.run(
        f"'{sys.executable}' -m distillbench list methods --json | head -c 1; exit ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


@pytest.mark.slow
def test_ctrl_c_stops_a_pool_within_seconds_and_the_same_command_finishes(child, cli, tmp_path, write_method):
    """As a terminal does it: SIGINT to the whole process group, once while workers come up and once while they train."""
    import psutil

    flag = str(tmp_path / "flag")
    slow = write_method("slow", f"if os.path.exists({flag!r}):\n    time.sleep(60)\nreturn run.fit(problem.student, loss, problem.batches)")
    (tmp_path / "flag").touch()
    store = tmp_path / "store"
    command = ["run", TRACK, "-m", slow, "--seeds", "2", "--no-controls", "--budget", "640", "--out", store]

    for at_work in (False, True):
        process = child(*command, "--workers", "2")
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            below = psutil.Process(process.pid).children(recursive=True)
            if len(list(store.glob("runs/*.lock"))) == 2 if at_work else len(below) >= 3:
                break
            time.sleep(0.01)
        assert process.poll() is None, process.communicate()[1]
        if at_work:
            time.sleep(0.5)
        below = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        started = time.monotonic()
        _, err = process.communicate(timeout=20)
        assert time.monotonic() - started < 10
        assert process.returncode == 130, err
        assert "Traceback" not in err
        assert err.splitlines()[-1] == "distillbench: interrupted; the same command goes on where it stopped"
        _, alive = psutil.wait_procs(below, timeout=5)
        assert not alive
        assert not list(store.glob("records/**/*.record"))

    (tmp_path / "flag").unlink()
    code, out, err = cli(*command, "--workers", "1", "--json")
    assert code == 0, err
    assert [r["status"] for r in json.loads(out)] == ["ok", "ok"]


def test_a_dead_worker_is_one_line_and_exit_code_one(cli, monkeypatch, tmp_path):
    """What the pool says of it (tests/bench/runs/test_executors.py kills a real one) is printed once, however many runs it took along."""
    import distillbench.runs.executors
    from distillbench.errors import WorkerDied

    monkeypatch.setattr(
        distillbench.runs.executors, "run_all", lambda specs, *a, **k: ((s, WorkerDied("a worker process died")) for s in specs)
    )
    code, _, err = cli("run", TRACK, "-m", "kd", "--seeds", "3", "--no-controls", "--out", tmp_path)
    assert code == 1
    assert [line for line in err.splitlines() if line.startswith("distillbench:")] == ["distillbench: a worker process died"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("check", "kd", "--suite", "image-classification/nope"), "unknown setting"),
        (("check", "kd", "--suite", "image-classification/cifar100"), "--data"),
        (("check", "dmd", "--suite", "image-classification/blobs"), "it runs on: image-generation"),
        (("run", TRACK, "-m", "kd", "--checkpoint-seconds", "-5"), "not a number of seconds"),
        (("run", TRACK, "-m", "kd", "--checkpoint-seconds", "soon"), "not a number of seconds"),
    ],
)
def test_a_request_that_cannot_work_is_one_line_before_anything_runs(cli, monkeypatch, words, says):
    monkeypatch.delenv("DISTILLBENCH_DATA", raising=False)
    bad(cli(*words), 2, says)


def test_a_rank_alone_is_some_other_programs(cli, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "3")
    code, out, err = cli("run", TRACK, "-m", "kd", "--seeds", "1", "--no-controls", "--budget", "640", "--out", tmp_path)
    assert code == 0 and "kd\t1" in out, err


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_what_no_launcher_says_is_one_line(cli, monkeypatch, tmp_path, name):
    monkeypatch.setenv(name, "two")
    bad(cli("run", TRACK, "-m", "kd", "--seeds", "1", "--no-controls", "--out", tmp_path), 2, f"{name}='two'")
