"""The run: budget, loops, learners, cost, and what is exported."""

import dataclasses
import math
import re
import time

import pytest
import torch
from torch import nn

from distillbench.cards.card import Budget
from distillbench.errors import Diverged, UserError
from distillbench.identity import derive_seed
from distillbench.problems.classification.losses import cross_entropy, kl_divergence, soft_cross_entropy, without
from distillbench.problems.classification.oracle import ClassifierOracle
from distillbench.training.data import Batch, Shuffled
from distillbench.training.learner import rate
from distillbench.training.nets import Architecture
from distillbench.training.observer import Observer
from distillbench.training.run import Learner, coupled
from distillbench.training.student import ONLY, Part, Student
from tests.bench.training.small import SEEDS, SGD, batches, examples, fit, linear, make

# --- learning rates ---------------------------------------------------------------------------------------------


def test_rates_are_known_numbers():
    constant, cosine = SGD, dataclasses.replace(SGD, schedule="cosine")
    steps = dataclasses.replace(SGD, schedule="steps", milestones=(0.5, 0.75), gamma=0.1)
    assert [rate(constant, s, 10) for s in (0, 5, 9)] == [1, 1, 1]
    assert [rate(cosine, s, 4) for s in range(4)] == pytest.approx([1, 0.5 + math.sqrt(0.5) / 2, 0.5, 0.5 - math.sqrt(0.5) / 2])
    assert [rate(steps, s, 8) for s in range(8)] == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    warm = dataclasses.replace(SGD, warmup=0.4)
    assert [rate(warm, s, 10) for s in range(6)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


@pytest.mark.parametrize("schedule", ["constant", "cosine", "steps"])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.1, 0.25, 0.33, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 10, 1000])
def test_rates_stay_between_zero_and_one_and_warmup_rises(schedule, warmup, steps):
    training = dataclasses.replace(SGD, schedule=schedule, milestones=(0.5,), warmup=warmup)
    rates = [rate(training, s, steps) for s in range(steps)]
    assert all(0 <= r <= 1 for r in rates)
    rising = rates[: int(warmup * steps)]
    assert rising == sorted(rising)


def test_the_rate_reaches_the_optimizer():
    net, run = linear(), make(training=dataclasses.replace(SGD, schedule="steps", milestones=(0.5,), gamma=0.0))
    seen = []

    def loss(b):
        seen.append(net.weight.detach().clone())
        return run.loss(b, ce=cross_entropy(net(b.inputs), b.labels))

    fit(run, net, loss=loss)
    moved = [not torch.equal(a, b) for a, b in zip(seen, [*seen[1:], net.weight], strict=True)]
    assert moved == 5 * [True] + 5 * [False]


# --- budget -----------------------------------------------------------------------------------------------------


def test_the_budget_stops_the_loop():
    run = make(budget=87)
    fit(run, linear())
    assert run.meter.counts["student_examples"] == 80 and run.meter.counts["student_steps"] == 10
    assert run.over_budget() is None
    with pytest.raises(UserError, match="the budget of 87 student examples is used up before phase 'fit'"):
        fit(run, linear())


def test_shares_of_the_budget_and_what_is_left_of_it():
    run = make(budget=80)
    fit(run, linear(), share=0.25)
    assert run.meter.counts["student_examples"] == 16
    fit(run, linear())
    assert run.meter.counts["student_examples"] == 80


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        (Budget(student_examples=40), "student_examples 80 of 40"),
        (Budget(student_examples=80, teacher_examples=79), "teacher_examples 80 of 79"),
        (Budget(student_examples=80, training_flops=10.0), r"training_flops \d+ of 10"),
        (Budget(student_examples=80, wall_seconds=1e-9), "wall_seconds .* of 1e-09"),
        (Budget(student_examples=80, teacher_examples=80, training_flops=1e12, wall_seconds=1e6), None),
    ],
)
def test_every_cap_is_watched(budget, says):
    data = examples()
    oracle = ClassifierOracle(linear(seed=9), data)
    run, net = make(budget=budget, oracles=[oracle]), linear()
    fit(run, net, batches(data=data), lambda b: run.loss(b, kd=kl_divergence(net(b.inputs), oracle.logits(b))), steps=10)
    run.cost()
    over = run.over_budget()
    assert over is None if says is None else re.fullmatch(says, over)


def test_auxiliary_learners_are_not_metered_and_teacher_side_ones_are_the_teachers():
    run, net, critic = make(), linear(), linear(seed=1)
    free = Learner(critic, lambda b: run.loss(b, x=cross_entropy(critic(b.inputs), b.labels)), updates=3, counts=None)
    asked = Learner(linear(seed=2), lambda b: run.loss(b, x=cross_entropy(asked.module(b.inputs), b.labels)), counts="teacher_examples")
    main = Learner(net, lambda b: run.loss(b, x=cross_entropy(net(b.inputs), b.labels)), updates=2)
    run.loop([free, asked, main], batches())
    counts = run.meter.counts
    assert (counts["student_examples"], counts["student_steps"], counts["teacher_examples"]) == (80, 10, 40)
    with pytest.raises(UserError, match=r"a loop without a student needs steps="):
        make().loop([free], batches())


# --- reduction --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_the_loss_is_the_mean_over_the_batch_whatever_the_micro_batches(parts):
    """8 examples in 3 parts are 2 + 3 + 3: a mean of means would be another number."""
    data = batches(8)
    batch = next(data.stream(0))
    net = linear()
    values = nn.functional.cross_entropy(net(batch.inputs), batch.labels, reduction="none")
    wanted = torch.autograd.grad(values.mean(), net.parameters())
    before = [p.detach().clone() for p in net.parameters()]
    run = make(budget=8, micro_batches=parts)
    fit(run, net, data)
    for was, now, grad in zip(before, net.parameters(), wanted, strict=True):
        assert torch.allclose((was - now.detach()) / 0.1, grad, atol=1e-6)
    assert run.trace["fit/ce"] == [pytest.approx(float(values.mean().detach()), rel=1e-4)]


def test_more_micro_batches_than_examples_are_the_same_batch():
    few, many = linear(), linear()
    fit(make(budget=80), few)
    fit(make(budget=80, micro_batches=50), many)
    assert torch.allclose(few.weight, many.weight, atol=1e-6)


def test_terms_that_were_reduced_or_not_enough():
    run, batch = make(), examples(3).take(torch.arange(3))
    assert float(run.loss(batch, a=torch.tensor([1.0, 2.0, 6.0]))["a"]) == 3.0
    assert float(run.loss(batch, a=coupled(lambda x: x.max(), torch.tensor([1.0, 4.0])))["a"]) == 4.0
    for value, said in (
        (torch.zeros(3, 5), r"has shape \(3, 5\); give one value for each of the 3 rows; another unit is named"),
        (torch.zeros(5), r"has shape \(5,\); give one value for each of the 3 rows"),  # of tokens or pixels
        (torch.tensor(4.0), r"has shape \(\).*; a term that couples the batch is coupled\("),
        ((torch.zeros(3), "tokens"), "is counted in 'tokens', which this batch has none of; it has rows"),
        (coupled(lambda x: x, torch.zeros(3)), r"coupled loss term 'odd' has shape \(3,\); its function gives one number"),
    ):
        with pytest.raises(UserError, match=f"loss term 'odd' {said}|{said}"):
            run.loss(batch, fine=torch.zeros(3), odd=value)


def test_shared_divergences_against_numbers_by_hand():
    student, teacher = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[math.log(3), 0.0]])
    assert float(kl_divergence(student, teacher)) == pytest.approx(0.5 * math.log(3))  # .75 log 3 + .25 log 1/3
    assert float(kl_divergence(2 * student, 2 * teacher, temperature=2.0)) == pytest.approx(4 * 0.5 * math.log(3), rel=1e-5)
    assert float(kl_divergence(teacher, teacher, temperature=3.0)) == 0
    assert float(cross_entropy(student, torch.tensor([0]))) == pytest.approx(math.log(4))
    assert float(soft_cross_entropy(student, torch.tensor([[0.5, 0.5]]))) == pytest.approx(0.5 * math.log(4) + 0.5 * math.log(4 / 3))
    assert without(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor([1, 2])).tolist() == [[1.0, 3.0], [4.0, 5.0]]


# --- learners ---------------------------------------------------------------------------------------------------


def test_the_average_is_a_known_number_and_is_what_leaves():
    net = linear()
    run = make(budget=24)
    mean = net.weight.detach().clone()
    seen = []

    def loss(b):
        seen.append(net.weight.detach().clone())
        return run.loss(b, ce=cross_entropy(net(b.inputs), b.labels))

    student = fit(run, net, loss=loss, ema=0.9)
    for weight in [*seen[1:], net.weight.detach()]:
        mean = 0.9 * mean + 0.1 * weight
    assert student.averaged == "ema 0.9" and torch.allclose(student.weights["weight"], mean, atol=1e-6)
    assert not torch.allclose(student.weights["weight"], net.weight, atol=1e-4)


def test_buffers_of_the_average_follow_at_once():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    net.architecture = Architecture("bn")
    run = make(budget=24)
    student = fit(run, net, ema=0.99)
    assert torch.equal(student.weights["0.running_mean"], net[0].running_mean)
    assert int(student.weights["0.num_batches_tracked"]) == 3


def test_gradients_are_clipped():
    net, run = linear(), make(budget=8, training=dataclasses.replace(SGD, learning_rate=1.0, clip=0.01))
    before = [p.detach().clone() for p in net.parameters()]
    fit(run, net, loss=lambda b: run.loss(b, ce=100 * cross_entropy(net(b.inputs), b.labels)))
    moved = math.sqrt(sum(float((a - b.detach()).square().sum()) for a, b in zip(before, net.parameters(), strict=True)))
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_learners_alternate_and_the_others_are_frozen():
    run, generator, critic = make(budget=24), linear(3, 3), linear(3, 2, seed=1)
    order = []

    def generate(b):
        order.append("generator")
        assert all(p.requires_grad for p in generator.parameters()) and not any(p.requires_grad for p in critic.parameters())
        return run.loss(b, fool=cross_entropy(critic(generator(b.inputs)), b.labels))  # its gradient passes through the critic

    def criticise(b):
        order.append("critic")
        assert all(p.requires_grad for p in critic.parameters()) and not any(p.requires_grad for p in generator.parameters())
        return run.loss(b, judge=cross_entropy(critic(generator(b.inputs)), b.labels))

    was = [generator.weight.detach().clone(), critic.weight.detach().clone()]
    adam = {"optimizer": "adam", "learning_rate": 0.05}
    players = [Learner(critic, criticise, updates=2, counts=None, **adam), Learner(generator, generate)]
    run.loop(players, batches())
    assert order == 3 * ["critic", "critic", "generator"]
    assert isinstance(players[0].optimizer, torch.optim.Adam) and isinstance(players[1].optimizer, torch.optim.SGD)
    assert not torch.equal(was[0], generator.weight) and not torch.equal(was[1], critic.weight)
    assert all(p.requires_grad for x in players for p in x.parameters)
    assert set(run.trace) == {"fit/judge", "fit/fool"}


def test_every_update_sees_the_next_batch():
    run, net, data = make(budget=32), linear(), batches()
    seen = []

    def loss(b):
        seen.append(b.index.tolist())
        return run.loss(b, x=cross_entropy(net(b.inputs), b.labels))

    run.loop([Learner(net, loss, updates=2)], data)
    stream = data.stream(0)
    assert seen == [next(stream).index.tolist() for _ in range(4)]


def test_two_learners_may_share_a_network():
    run, net = make(budget=16), linear()
    twice = [Learner(net, lambda b: run.loss(b, x=cross_entropy(net(b.inputs), b.labels)), counts=c) for c in ("student_examples", None)]
    before = net.weight.detach().clone()
    run.loop(twice, batches(), steps=2)
    assert not torch.equal(before, net.weight)


def test_a_method_may_do_its_own_backward():
    net, run = linear(), make(budget=8)

    def backward(terms, parameters):
        assert set(terms) == {"a", "b"}
        for p in parameters:
            p.grad = torch.ones_like(p)

    before = net.weight.detach().clone()
    fit(run, net, loss=lambda b: run.loss(b, a=net(b.inputs).sum(1), b=net(b.inputs).sum(1)), backward=backward)
    assert torch.allclose(net.weight, before - 0.1)


def test_batches_can_be_entered_at_any_step():
    data = batches(8, examples(43))  # 5 whole batches an epoch, 3 examples left over
    stream = data.stream(0)
    all_ = [next(stream).index.tolist() for _ in range(17)]
    for start in (0, 1, 4, 5, 6, 16):
        assert next(data.stream(start)).index.tolist() == all_[start]
    for epoch in range(3):
        rows = [row for rows in all_[5 * epoch : 5 * epoch + 5] for row in rows]
        assert len(rows) == len(set(rows)) == 40
    assert all_[:5] != all_[5:10]
    assert Shuffled(examples(5), torch.arange(5), 8, seed=0).batch_size == 5


# --- what is exported -------------------------------------------------------------------------------------------


def test_only_what_the_problem_built_leaves_and_only_if_it_is_finite():
    with pytest.raises(UserError, match="only a network the problem built can be exported"):
        make().export(nn.Linear(2, 2))
    net = linear()
    net.weight.data[0, 0] = math.nan
    with pytest.raises(UserError, match="weight is not finite"):
        make().export(net)
    student = make().export(linear(), recipe={"steps": 4})
    back = Student.from_bytes(student.to_bytes())
    assert back.architecture == student.architecture and back.recipe == {"steps": 4}
    assert all(torch.equal(back.weights[k], v) for k, v in student.weights.items())


@pytest.mark.parametrize("blob", [b"", b"\x00" * 8, b"\xff" * 64, Student({ONLY: Part(Architecture("x"), {}, "trained")}).to_bytes()[:-4]])
def test_bytes_that_are_no_student_are_one_line(blob):
    with pytest.raises(UserError, match="not a distillbench student"):
        Student.from_bytes(blob)


def test_a_student_whose_metadata_misses_its_name_is_one_line():
    from safetensors.torch import save

    for about in ("{}", "[]", "3", "[" * 100_000):
        with pytest.raises(UserError, match="not a distillbench student"):
            Student.from_bytes(save({"w": torch.zeros(1)}, metadata={"distillbench": about}))


def test_nan_names_its_step_and_its_term():
    run, net = make(), linear()
    count = iter(range(100))

    def loss(b):
        bad = math.nan if next(count) == 6 else 1.0
        return run.loss(b, fine=cross_entropy(net(b.inputs), b.labels), bad=bad * net(b.inputs).sum(1))

    with run.phase("second"), pytest.raises(Diverged, match=r"step 6 of phase 'second' \(fine=.*, bad=nan\)") as caught:
        fit(run, net, loss=loss)
    assert caught.value.step == 6
    assert all(math.isfinite(v) for values in run.trace.values() for v in values)


# --- cost -------------------------------------------------------------------------------------------------------


def test_phases_are_billed_and_sum_to_the_total():
    data = examples()
    oracle = ClassifierOracle(linear(seed=9), data)
    run, net = make(budget=80, oracles=[oracle]), linear()

    def loss(b):
        return run.loss(b, kd=kl_divergence(net(b.inputs), oracle.logits(b)))

    with run.phase("general"):
        fit(run, net, batches(data=data), loss, share=0.5)
        with run.phase("inner"):
            oracle.logits(next(batches(data=data).stream(0)))
    fit(run, net, batches(data=data), loss)
    cost = run.cost()
    assert set(cost["phases"]) == {"general", "inner", "fit"}
    for name, total in cost["total"].items():
        assert sum(p[name] for p in cost["phases"].values()) == pytest.approx(total)
    assert [cost["phases"][p]["student_examples"] for p in ("general", "inner", "fit")] == [40, 0, 40]
    assert [cost["phases"][p]["teacher_examples"] for p in ("general", "inner", "fit")] == [40, 8, 40]


def test_time_between_loops_is_billed():
    run = make(budget=80)
    time.sleep(0.05)
    fit(run, linear(), steps=2)
    with run.phase("thinking"):
        time.sleep(0.05)
        fit(run, linear(), steps=2)
        time.sleep(0.05)
    cost = run.cost()
    assert cost["phases"]["fit"]["wall_seconds"] >= 0.05
    assert cost["phases"]["thinking"]["wall_seconds"] >= 0.1


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_flops_are_those_of_a_hand_count(steps):
    """A linear map of (8, 3) to (8, 2): 2*8*3*2 forward, as much for the weight's gradient, and nothing for the data's."""
    run, net = make(budget=8 * steps), linear()
    fit(run, net)
    assert run.meter.counts["training_flops"] == steps * 2 * (2 * 8 * 3 * 2)


def test_flops_and_examples_do_not_depend_on_a_warm_cache(tmp_path):
    data = examples()
    costs = []
    for _ in range(2):
        oracle = ClassifierOracle(linear(seed=9), data, tmp_path)
        run, net = make(oracles=[oracle]), linear()
        fit(run, net, batches(data=data), lambda b, r=run, n=net, o=oracle: r.loss(b, kd=kl_divergence(n(b.inputs), o.logits(b))))
        costs.append(run.cost()["total"])
    cold, warm = costs
    assert (cold["teacher_forwards"], warm["teacher_forwards"]) == (40, 0)
    for name in ("training_flops", "teacher_examples", "student_examples"):
        assert cold[name] == warm[name] > 0


def test_mixed_precision_is_real_on_a_cpu_too():
    for precision, wanted in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        run, net = make(training=dataclasses.replace(SGD, precision=precision)), linear()
        seen = set()

        def loss(b, run=run, net=net, seen=seen):
            out = net(b.inputs)
            seen.add(out.dtype)
            return run.loss(b, ce=cross_entropy(out, b.labels))

        fit(run, net, loss=loss)
        assert seen == {wanted} and net.weight.dtype is torch.float32 and not torch.is_autocast_enabled("cpu")


def test_streams_of_random_numbers_belong_to_roles():
    run = make()
    noise, init = torch.rand(4, generator=run.generator("noise")), torch.rand(4, generator=run.generator("init"))
    assert not torch.equal(noise, init)
    assert torch.equal(noise, torch.rand(4, generator=torch.Generator().manual_seed(SEEDS["noise"])))
    own = torch.rand(4, generator=run.generator("my role"))
    assert torch.equal(own, torch.rand(4, generator=torch.Generator().manual_seed(derive_seed("my role", SEEDS["noise"]))))
    assert run.generator("noise") is run.generator("noise")


def test_parts_of_a_batch_are_its_rows():
    batch = next(batches().stream(0))
    parts = [batch.part(0, 3), batch.part(3, 8)]
    assert [len(p) for p in parts] == [3, 5]
    for name in ("inputs", "labels", "index", "labelled"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(batch, name))
    assert isinstance(batch, Batch)


def test_progress_is_told_where_the_loop_is():
    told = []

    class Told(Observer):
        def progress(self, *where):
            told.append(where)

    fit(make(budget=80, observer=Told()), linear())
    assert told[-1] == ("fit", 10, 10) and all(0 < done <= total for _, done, total in told)
