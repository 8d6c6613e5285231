"""What loops offer besides one learner on one stream: periods, streams of one's own, paces, hard caps, work that is kept."""

import dataclasses
import time

import pytest
import torch

from distillbench.cards.card import Budget
from distillbench.errors import OverBudget, UserError
from distillbench.problems.classification.losses import cross_entropy, kl_divergence
from distillbench.problems.classification.oracle import ClassifierOracle
from distillbench.training.data import Batches, Shuffled
from distillbench.training.run import Learner
from tests.bench.training.small import SGD, Killed, batches, examples, fit, linear, make


def seeing(run, net, seen, name=None, die_at=None):
    """A loss that keeps which rows it was given, and dies at the update ``die_at`` of those that ``seen`` counts."""

    def loss(batch):
        if die_at is not None and len(seen) == die_at:
            raise Killed
        seen.append((name, batch.index.tolist()))
        noisy = net(batch.inputs + 0.1 * batch.noise(batch.inputs.shape, "noise"))
        return run.loss(batch, **{name or "x": cross_entropy(noisy, batch.labels)})

    return loss


def positions(data, count, start=0):
    return [data.rows(p).tolist() for p in range(start, start + count)]


# --- a learner that acts in every so many-th iteration -----------------------------------------------------------


def test_a_learner_acts_in_every_third_iteration_and_batches_go_by_updates():
    run, generator, critic, seen = make(), linear(), linear(seed=1), []
    slow = Learner(generator, seeing(run, generator, seen, "slow"), every=3, updates=2)
    fast = Learner(critic, seeing(run, critic, seen, "fast"), counts=None)
    run.loop([slow, fast], batches(), steps=7)
    assert [name for name, _ in seen] == 2 * ["slow", "slow", "fast", "fast", "fast"] + ["slow", "slow", "fast"]
    assert [rows for _, rows in seen] == positions(batches(), 13)
    assert (slow.made_before(7), fast.made_before(7)) == (6, 7) and [slow.made_before(s) for s in range(5)] == [0, 2, 2, 2, 4]
    assert (run.meter.counts["student_steps"], run.meter.counts["student_examples"]) == (6, 48)


def test_a_student_that_acts_rarely_still_uses_its_whole_budget():
    run, net, critic = make(budget=80), linear(), linear(seed=1)
    slow = Learner(net, seeing(run, net, []), every=3)
    run.loop([Learner(critic, seeing(run, critic, []), counts=None), slow], batches())
    assert run.meter.counts["student_examples"] == 80
    run = make(budget=80)
    run.loop([Learner(net, seeing(run, net, []), every=3)], batches(), share=0.5)
    assert run.meter.counts["student_examples"] == 40


def test_the_average_of_a_learner_that_acts_rarely_follows_its_own_updates():
    run, net, weights, counted = make(), linear(), [], []
    slow = Learner(
        net, seeing(run, net, []), every=3, ema=lambda k: counted.append(k) or 0.5, after=lambda _: weights.append(net.weight.clone())
    )
    mean = net.weight.detach().clone()
    counted.clear()
    run.loop([slow], batches(), steps=9)
    assert counted == [0, 1, 2] and len(weights) == 3
    for weight in weights:
        mean = (mean + weight.detach()) / 2
    torch.testing.assert_close(slow.average.weight, mean)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 7, 96, 100])
@pytest.mark.parametrize("every", [1, 2, 3, 6])
def test_operations_of_a_learner_that_acts_rarely_are_counted(every, steps):
    """A map to 200 outputs in every so many-th iteration beside one to 2 in all of them."""
    run, net, heavy = make(budget=8 * steps), linear(), linear(outputs=200, seed=1)
    rare = Learner(heavy, lambda b: run.loss(b, x=heavy(b.inputs).square().sum(1)), every=every, counts=None)
    run.loop([rare, Learner(net, seeing(run, net, []))], batches())
    whole = 2 * (2 * 8 * 3 * 200) * rare.made_before(steps) + 2 * (2 * 8 * 3 * 2) * steps
    assert run.meter.counts["training_flops"] == whole


# --- a learner with a stream of its own --------------------------------------------------------------------------


def others(size=4):
    data = examples(30, seed=7)
    return Shuffled(data, torch.arange(30), size, seed=8)


def test_learners_may_have_streams_of_their_own_and_share_the_loops():
    run, nets, seen = make(), [linear(seed=i) for i in range(3)], []
    players = [
        Learner(nets[0], seeing(run, nets[0], seen, "own"), batches=others(), counts=None, updates=2),
        Learner(nets[1], seeing(run, nets[1], seen, "first"), counts=None),
        Learner(nets[2], seeing(run, nets[2], seen, "second")),
    ]
    run.loop(players, batches(), steps=3)
    assert [rows for name, rows in seen if name == "own"] == positions(others(), 6)
    assert [rows for name, rows in seen if name != "own"] == positions(batches(), 6)
    assert run.meter.counts["student_examples"] == 24


def test_steps_go_by_the_students_own_stream():
    run, net, critic = make(budget=80), linear(), linear(seed=1)
    student = Learner(net, seeing(run, net, []), batches=others())
    run.loop([Learner(critic, seeing(run, critic, []), counts=None), student], batches())
    assert (run.meter.counts["student_steps"], run.meter.counts["student_examples"]) == (20, 80)
    run = make(budget=80)
    run.loop([Learner(net, seeing(run, net, []), batches=others())])  # nobody needs the loop's
    assert run.meter.counts["student_examples"] == 80
    with pytest.raises(UserError, match=r"a learner without batches of its own needs those of the loop: run\.loop\(learners, batches\)"):
        make().loop([Learner(net, seeing(run, net, []))])


def test_the_same_position_of_two_streams_has_other_noise():
    run, drawn = make(), []

    def loss(net):
        return lambda b: (drawn.append(b.noise((len(b), 3), "noise")), run.loss(b, x=net(b.inputs).sum(1)))[1]

    nets = [linear(seed=i) for i in range(3)]
    run.loop(
        [Learner(n, loss(n), batches=others(8), counts=c) for n, c in zip(nets, ("student_examples", None, None), strict=True)], steps=2
    )
    assert len({tuple(x.flatten().tolist()) for x in drawn}) == 6


def several(folder=None, die_at=None):
    """Three players: one acts in every third iteration and has its own stream, one makes two updates, one is averaged."""
    training = dataclasses.replace(SGD, optimizer="adamw", schedule="cosine")
    run = make(budget=8 * 10, folder=folder, checkpoint_seconds=0.0, training=training)
    nets, seen = [linear(seed=i) for i in range(3)], []
    players = [
        Learner(nets[0], seeing(run, nets[0], seen, "rare", die_at), batches=others(), counts=None, every=3),
        Learner(nets[1], seeing(run, nets[1], seen, "twice", die_at), counts=None, updates=2),
        Learner(nets[2], seeing(run, nets[2], seen, "student", die_at), ema=0.9),
    ]
    run.loop(players, batches())
    return run, players, seen


def test_a_loop_of_several_streams_resumes_at_any_step(tmp_path):
    whole, players, seen = several()
    assert len(seen) == 4 + 20 + 10
    ends = [x for p in players for x in (p.module, p.average) if x is not None]
    begins = [i for i, (name, _) in enumerate(seen) if name == "student"]  # the last update of every iteration
    for die_at in range(len(seen)):
        folder = tmp_path / str(die_at)
        with pytest.raises(Killed):
            several(folder, die_at)
        run, again, rest = several(folder)
        done = sum(i < die_at for i in begins)
        assert rest == seen[begins[done - 1] + 1 if done else 0 :], die_at
        resumed = [x for p in again for x in (p.module, p.average) if x is not None]
        for one, other in zip(ends, resumed, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True)), die_at
        for name in ("student_examples", "student_steps", "training_flops"):
            assert run.meter.counts[name] == whole.meter.counts[name], (name, die_at)
        assert run.trace == whole.trace


# --- work outside of loops, seeds, and draws after an update -----------------------------------------------------


def costly(folder, made, die=False):
    """Answers of the teacher are drawn and asked for once, between two loops."""
    data = examples()
    oracle = ClassifierOracle(linear(seed=9), data)
    run, net = make(budget=80, folder=folder, oracles=[oracle], checkpoint_seconds=0.0), linear()
    fit(run, net, batches(data=data), share=0.5)

    def make_it():
        made.append(1)
        rows = torch.randperm(40, generator=run.generator("rows"))[:16]
        return {"rows": rows, "answers": oracle.logits(data.take(rows)), "about": [1, "x"]}

    with run.phase("answers"):
        kept = run.once("answers", make_it)
    after = torch.rand(3, generator=run.generator("rows"))
    if die:
        raise Killed
    fit(run, net, batches(data=data), lambda b: run.loss(b, kd=kl_divergence(net(b.inputs), oracle.logits(b))))
    return run, net, kept, after


def test_what_is_made_once_is_not_made_again_after_a_kill(tmp_path):
    made: list[int] = []
    whole, net, kept, after = costly(None, made)
    with pytest.raises(Killed):
        costly(tmp_path, made, die=True)
    run, again, same, later = costly(tmp_path, made)
    assert len(made) == 2  # by the whole run, and by the one that died
    assert torch.equal(kept["answers"], same["answers"]) and torch.equal(kept["rows"], same["rows"]) and same["about"] == [1, "x"]
    assert torch.equal(after, later) and torch.equal(net.weight, again.weight)
    cost, wanted = run.cost(), whole.cost()
    assert cost["phases"].keys() == wanted["phases"].keys()
    for name, phase in wanted["phases"].items():
        for meter in ("student_examples", "student_steps", "teacher_examples", "training_flops"):
            assert cost["phases"][name][meter] == phase[meter], (name, meter)
    assert wanted["phases"]["answers"]["teacher_examples"] == 16 and wanted["total"]["teacher_examples"] == 16 + 40


def test_two_things_made_once_are_told_apart(tmp_path):
    for _ in range(2):
        run = make(folder=tmp_path)
        assert [run.once("x", lambda: 1), run.once("x", lambda: 2), run.once("y", lambda: None)] == [1, 2, None]
    with pytest.raises(TypeError, match="cannot hold set"):
        make(folder=tmp_path / "other").once("x", lambda: {1})


def test_a_seed_belongs_to_a_role_a_number_and_the_run():
    run = make()
    seeds = [run.seed("nets", i) for i in range(3)] + [run.seed("other"), run.seed("nets 1")]
    assert len(set(seeds)) == 5 and seeds[0] == run.seed("nets") == make().seed("nets", 0)
    assert all(0 <= s < 2**63 for s in seeds)
    torch.manual_seed(seeds[0])  # one that torch takes


def test_noise_after_an_update_is_its_own_and_the_same_in_any_parts():
    def drawn(parts, die_at=None, folder=None):
        run, net, seen = make(budget=40, micro_batches=parts, folder=folder, checkpoint_seconds=0.0), linear(), {}

        def after(_):
            step = run.meter.counts["student_steps"]
            if step == die_at:
                raise Killed
            seen[step] = torch.cat([run.noise((4,), "x"), run.noise((2, 2), "y").flatten(), run.noise((), "z")[None]])
            with pytest.raises(UserError, match="'after x' is drawn twice"):
                run.noise((4,), "x")

        learner = Learner(net, seeing(run, net, []), after=after)
        run.loop([learner], batches())
        return seen

    whole = drawn(1)
    assert len(whole) == 5 and len({tuple(x.tolist()) for x in whole.values()}) == 5
    assert all(torch.equal(whole[step], x) for step, x in drawn(3).items())
    assert abs(float(torch.cat(list(whole.values())).mean())) < 0.6


def test_noise_after_an_update_of_a_resumed_run_is_the_same(tmp_path):
    def play(folder, die_at=None):
        run, net, seen = make(budget=80, folder=folder, checkpoint_seconds=0.0), linear(), []

        def after(_):
            seen.append(run.noise((3,), "x"))
            with torch.no_grad():
                net.weight.add_(0.1 * seen[-1])

        run.fit(net, seeing(run, net, [], die_at=die_at), batches(), after=after)
        return net

    whole = play(None)
    with pytest.raises(Killed):
        play(tmp_path, 6)
    assert torch.equal(play(tmp_path).weight, whole.weight)


def test_streams_of_random_numbers_are_not_for_losses_nor_noise_for_outside():
    run, net = make(), linear()

    def loss(batch):
        return run.loss(batch, x=net(batch.inputs + torch.randn(8, 3, generator=run.generator("mine"))).sum(1))

    with pytest.raises(UserError, match=r"the random stream 'mine' is asked for within a loss: draw from the batch \(batch\.noise"):
        fit(run, net, loss=loss)
    torch.rand(1, generator=run.generator("mine"))  # a loss that failed is over
    with pytest.raises(UserError, match=r"run\.noise\('x'\) is for what follows an update \(after=\.\.\.\); outside of loops"):
        run.noise((3,), "x")
    with pytest.raises(UserError, match=r"run\.noise\('x'\) is for what follows an update"):
        fit(make(), net, loss=lambda b: run.loss(b, x=run.noise((8,), "x") + net(b.inputs).sum(1)))


# --- paces and hard caps -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Talk(Batches):
    """Rows whose student says 1 to 9 tokens for each, as many as nobody knows beforehand."""

    run: object
    inner: Shuffled
    batch_size: int = 8
    regular = False

    def rows(self, position):
        return self.inner.rows(position)

    def take(self, request):
        self.run.meter.add("student_tokens", int((1 + request.integers(9, (len(request),), "lengths")).sum()))
        return self.inner.take(request)


def paced(folder=None, die_at=None, tokens=600, share=1.0, loops=1, micro_batches=1):
    budget = Budget(student_examples=10**6, student_tokens=tokens, pace="student_tokens")
    training = dataclasses.replace(SGD, schedule="cosine")
    run = make(budget=budget, folder=folder, checkpoint_seconds=0.0, training=training, micro_batches=micro_batches)
    net, seen, progress, used = linear(), [], [], []
    inner = seeing(run, net, seen, die_at=die_at)

    def loss(batch):
        progress.append(run.progress)
        return inner(batch)

    for _ in range(loops):
        run.fit(net, loss, Talk(run, batches()), share=share)
        used.append(run.meter.counts["student_tokens"])
    return run, net, progress, used


def test_a_loop_ends_when_the_pace_is_used_and_its_progress_goes_from_0_to_1():
    run, net, progress, (used,) = paced()
    assert 600 < used < 600 + 8 * 9 and run.over_budget() is None  # by the batch that used it up, which is no fault
    run.meter.add("student_tokens", 1)
    assert run.over_budget() == f"student_tokens {used + 1} of 600"  # what comes behind it is
    assert run.meter.counts["student_steps"] == len(progress) and 12 < len(progress) < 20
    assert progress[0] == 0 and progress == sorted(progress) and 0.85 < progress[-1] < 1
    assert len(set(progress)) == len(progress)
    assert not torch.equal(net.weight, linear().weight)
    with pytest.raises(UserError, match="the budget of 600 student_tokens is used up before phase 'fit'"):
        fit(run, net)
    with pytest.raises(UserError, match="the budget's pace is student_tokens, so nobody knows the number of steps"):
        run.steps(8)
    assert run.meter.counts["training_flops"] == pytest.approx(len(progress) * 2 * (2 * 8 * 3 * 2))


def test_a_share_of_the_pace_is_of_the_whole_and_the_rest_is_what_is_left():
    _, _, progress, used = paced(share=0.5, loops=2)
    assert 300 <= used[0] < 372 and 600 <= used[1] < 672
    second = progress.index(0.0, 1)
    assert progress[:second] == sorted(progress[:second]) and progress[second:] == sorted(progress[second:])
    assert max(progress) < 1


def test_micro_batches_speak_the_same_tokens():
    whole, parts = paced(), paced(micro_batches=3)
    assert parts[3] == whole[3]
    torch.testing.assert_close(parts[1].weight, whole[1].weight)


@pytest.mark.parametrize("die_at", [1, 5, 11])
def test_a_killed_paced_loop_goes_on_to_the_same_end(tmp_path, die_at):
    whole, net, progress, used = paced()
    with pytest.raises(Killed):
        paced(tmp_path, die_at)
    run, again, rest, same = paced(tmp_path)
    assert torch.equal(net.weight, again.weight) and same == used and rest == progress[die_at:]
    assert whole.over_budget() is run.over_budget() is None
    assert paced(tmp_path)[0].over_budget() is None  # restored as it ended
    assert run.meter.counts["student_steps"] == whole.meter.counts["student_steps"]


def test_the_learning_rate_of_a_paced_loop_falls_to_nearly_nothing():
    budget = Budget(student_examples=10**6, student_tokens=2000, pace="student_tokens")
    run, net, rates = make(budget=budget, training=dataclasses.replace(SGD, schedule="cosine")), linear(), []
    learner = Learner(net, seeing(run, net, []), after=lambda _: rates.append(learner.optimizer.param_groups[0]["lr"]))
    run.loop([learner], Talk(run, batches()))
    assert rates[0] == pytest.approx(0.1) and rates == sorted(rates, reverse=True) and rates[-1] < 0.002


def test_a_pace_that_nothing_moves_is_one_line():
    budget = Budget(student_examples=10**6, student_tokens=100, pace="student_tokens")
    with pytest.raises(UserError, match="after 1000 steps of phase 'fit' nothing is counted as student_tokens, the budget's pace"):
        fit(make(budget=budget), linear())


def test_a_pace_that_is_hard_ends_as_a_pace_and_is_hard_behind_it():
    budget = Budget(student_examples=10**6, student_tokens=600, pace="student_tokens", hard=("student_tokens",))
    run, net = make(budget=budget), linear()
    run.loop([Learner(net, seeing(run, net, []))], Talk(run, batches()))
    assert run.meter.counts["student_tokens"] > 600 and run.over_budget() is None
    with pytest.raises(OverBudget, match="student_tokens"):
        run.loop([Learner(net, seeing(run, net, []))], Talk(run, batches()), steps=2)


def test_a_pace_or_a_hard_cap_needs_a_cap():
    for options in ({"pace": "student_tokens"}, {"hard": ("pairs",)}, {"pace": "nothing"}):
        with pytest.raises(ValueError, match="has no cap, so it can be neither the pace nor hard"):
            Budget(student_examples=80, **options)


@pytest.mark.parametrize("hard", [(), ("teacher_examples",), ("training_flops", "teacher_examples")])
def test_a_hard_cap_ends_a_run_at_once_and_another_only_when_it_is_over(hard):
    data = examples()
    oracle = ClassifierOracle(linear(seed=9), data)
    budget = Budget(student_examples=80, teacher_examples=20, training_flops=1e9, hard=hard)
    run, net = make(budget=budget, oracles=[oracle]), linear()

    def train():
        fit(run, net, batches(data=data), lambda b: run.loss(b, kd=kl_divergence(net(b.inputs), oracle.logits(b))))

    if hard:
        with pytest.raises(OverBudget, match=r"^teacher_examples 24 of 20$"):
            train()
        assert run.meter.counts["student_steps"] == 3
    else:
        train()
        assert run.meter.counts["student_steps"] == 10 and run.over_budget() == "teacher_examples 80 of 20"


def test_a_hard_cap_on_time_is_looked_at_after_every_step():
    run, net = make(budget=Budget(student_examples=8000, wall_seconds=0.2, hard=("wall_seconds",))), linear()
    begun = time.perf_counter()
    with pytest.raises(OverBudget, match="wall_seconds"):
        fit(run, net, loss=lambda b: (time.sleep(0.02), run.loss(b, x=net(b.inputs).sum(1)))[1])
    assert time.perf_counter() - begun < 5 and run.meter.counts["student_steps"] < 20
