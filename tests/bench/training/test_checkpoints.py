"""Checkpoints: what they carry, what a kill may not change, and damage. Killing whole processes is in test_kill.py."""

import dataclasses

import pytest
import torch
from torch import nn

from distillbench.errors import SaveError, UserError
from distillbench.problems.classification.losses import cross_entropy
from distillbench.training.checkpoint import load_checkpoint, save_checkpoint
from distillbench.training.nets import Architecture
from distillbench.training.observer import Observer
from distillbench.training.run import Learner
from distillbench.training.student import tensor_digest
from tests.bench.training.small import SGD, Killed, batches, fit, linear, make


def test_a_checkpoint_carries_every_type_and_notices_damage(tmp_path):
    path = tmp_path / "c"
    state = {
        "a": torch.arange(3),
        "b": [1, (2.5, None, "x", True)],
        "c": {0: {"step": torch.tensor(1.0)}, 1: {}},
        "half": torch.ones(2, dtype=torch.bfloat16),
    }
    save_checkpoint(path, state)
    back = load_checkpoint(path)
    assert back["b"] == [1, (2.5, None, "x", True)] and list(back["c"]) == [0, 1]
    assert torch.equal(back["a"], state["a"]) and torch.equal(back["half"], state["half"])
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], b"", b"x" + whole, whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="corrupt or truncated checkpoint"):
            load_checkpoint(path)
    with pytest.raises(TypeError, match="cannot hold object"):
        save_checkpoint(path, {"x": object()})


def two_loops(folder, kill_at=None, every=0.0):
    """Generators, dropout, an average and an alternating pair, in two phases. ``kill_at`` dies at that update."""
    run = make(budget=160, folder=folder, checkpoint_seconds=every, training=dataclasses.replace(SGD, optimizer="adamw", schedule="cosine"))
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 2))
    torch.manual_seed(4)
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    net.architecture = Architecture("seq")
    critic = linear(2, 2, seed=6)
    updates = iter(range(10_000))
    done = []

    def loss(b):
        done.append(next(updates))
        if done[-1] == kill_at:
            raise Killed
        return run.loss(b, ce=cross_entropy(net(b.inputs + 0.1 * b.noise(b.inputs.shape, "noise")), b.labels))

    with run.phase("general"):
        run.fit(net, loss, batches(), share=0.5)
    with run.phase("task"):
        player = Learner(net, loss, ema=0.9)
        judge = Learner(critic, lambda b: run.loss(b, j=cross_entropy(critic(net(b.inputs)), b.labels)), counts=None, learning_rate=0.01)
        run.loop([judge, player], batches())
    return run, run.export(player.average, averaged=True), len(done)


@pytest.mark.parametrize("kills", [[3], [9], [10], [11], [2, 5, 3, 4]], ids=str)
def test_a_killed_run_resumes_bit_for_bit_with_the_same_bill(tmp_path, kills):
    whole, student, _ = two_loops(None)
    for kill in kills:
        with pytest.raises(Killed):
            two_loops(tmp_path, kill_at=kill)
    run, resumed, updates = two_loops(tmp_path)
    assert tensor_digest(resumed.weights) == tensor_digest(student.weights)
    assert updates == 20 - sum(kills)  # with a checkpoint after every step, nothing was done twice
    cost, wanted = run.cost(), whole.cost()
    for name in wanted["total"]:
        if name != "wall_seconds":
            assert cost["total"][name] == wanted["total"][name], name
            assert {p: c[name] for p, c in cost["phases"].items()} == {p: c[name] for p, c in wanted["phases"].items()}
    assert run.trace == whole.trace


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b"", lambda b: b[: len(b) // 3]], ids=["cut", "empty", "a third"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_with_a_warning(tmp_path, damage):
    _, student, _ = two_loops(None)
    with pytest.raises(Killed):
        two_loops(tmp_path, kill_at=7)
    newest = tmp_path / "00-general.checkpoint"
    assert load_checkpoint(newest)["step"] == 7 and load_checkpoint(newest.with_suffix(".previous"))["step"] == 6
    newest.write_bytes(damage(newest.read_bytes()))
    with pytest.warns(UserWarning, match=r"00-general\.checkpoint is not usable, going back to the one before"):
        _, resumed, updates = two_loops(tmp_path)
    assert updates == 20 - 6
    assert tensor_digest(resumed.weights) == tensor_digest(student.weights)


def test_with_both_checkpoints_damaged_the_loop_starts_again(tmp_path):
    _, student, _ = two_loops(None)
    with pytest.raises(Killed):
        two_loops(tmp_path, kill_at=7)
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with pytest.warns(UserWarning, match="is not usable"):
        _, resumed, updates = two_loops(tmp_path)
    assert updates == 20 and tensor_digest(resumed.weights) == tensor_digest(student.weights)


def test_a_checkpoint_of_another_method_is_never_half_restored(tmp_path):
    with pytest.raises(Killed):
        two_loops(tmp_path, kill_at=7)
    run = make(folder=tmp_path)
    with run.phase("general"), pytest.raises(RuntimeError, match="state_dict"):
        fit(run, linear(9, 9))


def test_many_short_loops_lose_no_more_than_one_interval(tmp_path, monkeypatch):
    """20 loops of 4 seconds each on a slow clock, an interval of 10 seconds: killed in any of them, at most 10 seconds are redone."""
    clock = [0.0]
    monkeypatch.setattr("distillbench.training.run.time.perf_counter", lambda: clock[0])

    def work(folder, kill_at=None):
        run = make(budget=8 * 80, folder=folder, checkpoint_seconds=10.0)
        net = linear()
        done = []

        def loss(b):
            if len(done) == kill_at:
                raise Killed
            done.append(1)
            clock[0] += 1.0
            return run.loss(b, ce=cross_entropy(net(b.inputs), b.labels))

        for _ in range(20):
            run.fit(net, loss, batches(), steps=4)
        return net, len(done)

    whole, _ = work(None)
    for kill_at in (7, 22, 41, 60, 79):
        folder = tmp_path / str(kill_at)
        with pytest.raises(Killed):
            work(folder, kill_at)
        net, redone = work(folder)
        assert torch.equal(net.weight, whole.weight)
        assert redone <= 80 - kill_at + 10, kill_at


def test_checkpoints_are_written_no_oftener_than_asked(tmp_path):
    due = []

    class Asked(Observer):
        def saves(self, step, steps):
            due.append((step, steps))
            return step % 2 == 0

        def saved(self, written):
            due.append(written)

    fit(make(folder=tmp_path, checkpoint_seconds=3600, observer=Asked()), linear())
    assert not due and not list(tmp_path.iterdir())
    fit(make(folder=tmp_path, checkpoint_seconds=0.0, observer=Asked()), linear())
    assert due == [x for step in range(1, 11) for x in ((step, 10), step % 2 == 0)]
    assert load_checkpoint(tmp_path / "00-fit.checkpoint")["step"] == 10
    assert load_checkpoint(tmp_path / "00-fit.previous")["step"] == 8


def test_a_full_disk_stops_the_run_loudly(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SaveError, match="disk is full"):
        fit(make(folder=tmp_path, checkpoint_seconds=0.0), linear())
