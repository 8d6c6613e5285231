"""The game of a generator and its fake score: what is drawn, what is learnt from what, and what leaves."""

import dataclasses

import pytest
import torch

from distillbench.cards.card import Budget, Training
from distillbench.problems.image_generation.edm import denoising_loss, karras_level, per_row
from distillbench.problems.image_generation.matching import Matching
from distillbench.runs.identities import seeds_by_role
from distillbench.runs.suite import TrainContext
from distillbench.suites import image_generation as suite
from distillbench.suites.image_generation import sampling
from distillbench.training.data import Request
from distillbench.training.noise import Key
from distillbench.training.run import Run
from tests.keyed import keyed, stream

BATCH = 256
START = 2.5


def problem_and_run(batches=12, micro_batches=1, steps=1):
    setting = suite.CARD.settings["gaussians"]
    setting = dataclasses.replace(setting, options={**setting.options, "steps": steps})
    problem = suite.SUITE.problem(TrainContext("gaussians", setting, seeds_by_role(0)))
    training = Training(batch_size=BATCH, optimizer="sgd", learning_rate=0.01, schedule="constant")
    budget = Budget(student_examples=BATCH * batches)
    run = Run(seeds=seeds_by_role(0), budget=budget, training=training, oracles=[problem.teacher], micro_batches=micro_batches)
    return problem, run


def game(steps=1, **options):
    problem, run = problem_and_run(steps=steps)
    made = Matching(problem, run, steps=steps, start=START, initial_share=0.2, **options)
    return problem, run, made, next(stream(problem.batches))


class Recorder(torch.nn.Module):
    """A student that answers a fixed function of its input, and keeps what it was asked."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.6))
        self.asked = []

    def forward(self, noisy, sigma, labels=None):
        self.asked.append((noisy.detach(), sigma, labels))
        return self.scale * torch.tanh(noisy) / (1 + per_row(sigma, noisy)) + 0.3 * torch.sin(3 * noisy)


class Scripted(torch.nn.Module):
    """Answers as ``net``, and keeps the inputs."""

    def __init__(self, net):
        super().__init__()
        self.net, self.seen = net, []

    def forward(self, noisy, sigma, labels=None):
        self.seen.append((noisy, sigma))
        return self.net(noisy, sigma, labels)


# --- generated samples ---


def test_one_step_starts_from_pure_noise_at_the_first_level():
    _, _, made, batch = game()
    made.student = Recorder()
    made.generate(batch)
    [(noisy, sigma, labels)] = made.student.asked
    assert torch.equal(noisy, START * keyed(batch).noise(noisy.shape, "latents"))
    assert bool((sigma == START).all())
    assert torch.equal(labels, batch.labels)


def test_real_samples_are_never_looked_at():
    _, _, made, batch = game(3)
    first = made.generate(batch)
    assert torch.equal(first, made.generate(keyed(dataclasses.replace(batch, inputs=batch.inputs + 100))))


@pytest.mark.parametrize("last", [0, 1, 2])
def test_simulated_inputs_are_those_of_the_suites_sampler(last):
    """The same noise through ``sampling.sample``: the input at step i is the sampler's own, for the generator as it is now."""
    problem, _, made, batch = game(3)
    net, levels = Recorder(), problem.few_steps(3, START)
    made.student = net
    made.generate(batch)
    drawn = [keyed(batch).noise(batch.inputs.shape, role) for role in ("latents", "latents 1", "latents 2")]
    final, at, _ = net.asked[-1]
    script = iter(drawn[1:])

    def scripted_randn(shape, **_):
        return next(script)

    sampler = Scripted(net)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling.torch, "randn", scripted_randn)
        sampling.sample(sampler, problem.recipe(3, START), drawn[0], None, torch.Generator(), sigma_min=problem.sigma_min)
    inputs, sigma = sampler.seen[last]
    rows = at == torch.tensor(levels[last])
    assert int(rows.sum()) > BATCH // 5
    assert torch.equal(final[rows], inputs[rows])
    assert torch.equal(at[rows], sigma[rows])


def test_inputs_follow_the_generator_as_it_learns():
    _, _, made, batch = game(2)
    made.student = net = Recorder()
    made.generate(batch)
    with torch.no_grad():
        net.scale.mul_(2)
    made.generate(keyed(batch))
    (before, at, _), (after, _, _) = net.asked[1], net.asked[3]
    first = at == START
    assert torch.equal(before[first], after[first])
    assert not torch.isclose(before[~first], after[~first]).all(1).any()


def test_every_evaluation_is_as_likely_to_be_the_last():
    problem, _, made, batch = game(4)
    made.student = Recorder()
    for position in range(20):
        made.generate(keyed(batch, position))
    levels = torch.cat([made.student.asked[i][1] for i in range(3, 80, 4)])
    counts = torch.stack([(levels == torch.tensor(s)).sum() for s in problem.few_steps(4, START)]).double()
    expected = 20 * BATCH / 4
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.3  # chi squared, 3 degrees of freedom: 1 in 1,000


def test_the_graph_is_that_of_the_last_evaluation_alone():
    """The derivative by a weight is what one evaluation at the recorded input gives; earlier ones add nothing."""
    _, _, made, batch = game(3)
    made.student = net = Recorder()
    made.generate(batch).sum().backward()
    whole = net.scale.grad.clone()
    noisy, sigma, _ = net.asked[-1]
    assert float(whole) == pytest.approx(float((torch.tanh(noisy) / (1 + per_row(sigma, noisy))).sum()), rel=1e-5)


def test_more_steps_than_allowed_cost_nothing():
    problem, run = problem_and_run()
    with pytest.raises(ValueError, match="5 steps, where this setting allows 1"):
        Matching(problem, run, steps=5, initial_share=0.2)
    assert run.cost()["total"]["student_examples"] == 0


# --- noise levels ---


def test_compared_levels_keep_the_bounds_and_the_fake_score_learns_at_all():
    problem, _, made, batch = game(low=0.3, high=0.6)
    bound = [float(karras_level(torch.tensor(1 - p), sigma_min=problem.sigma_min, sigma_max=problem.sigma_max)) for p in (0.3, 0.6)]
    clean = torch.zeros(BATCH, 2)
    levels = torch.cat([made.perturb(keyed(batch, i), clean)[1] for i in range(20)])
    assert bound[0] * 0.999 <= float(levels.min()) < 1.05 * bound[0]
    assert 0.95 * bound[1] < float(levels.max()) <= bound[1] * 1.001
    asked = Scripted(made.fake)
    made.fake = asked
    for position in range(20):
        made.fake_loss(keyed(batch, position), clean)
    learnt = torch.cat([s for _, s in asked.seen])
    position = (learnt ** (1 / 7) - problem.sigma_min ** (1 / 7)) / (problem.sigma_max ** (1 / 7) - problem.sigma_min ** (1 / 7))
    assert 0 <= float(position.min()) + 1e-5 < 0.01
    assert 0.99 < float(position.max()) < 1 + 1e-5
    assert float(position.mean()) == pytest.approx(0.5, abs=0.02)


def test_the_noise_of_a_row_has_its_level():
    _, _, made, _ = game(high=0.8)
    clean = torch.full((4000, 6), 3.0)
    noisy, sigma = made.perturb(Request(torch.arange(4000), 0, key=Key(1, 0, 0, 0)), clean)
    unit = (noisy - clean) / sigma[:, None]
    assert float(unit.mean()) == pytest.approx(0, abs=0.03)
    assert float(unit.std()) == pytest.approx(1, abs=0.03)
    assert abs(float(torch.corrcoef(torch.stack([unit[:, 0].abs(), sigma]))[0, 1])) < 0.06


# --- gradients ---


def test_the_fake_score_never_sees_the_generators_graph():
    _, _, made, batch = game()
    for p in made.student.parameters():
        p.grad = None  # what its initialisation left
    generated = made.generate(batch)
    made.fake_loss(batch, generated).sum().backward()
    assert all(p.grad is None for p in made.student.parameters())
    assert all(p.grad is not None for p in made.fake.parameters())


def test_the_fake_scores_loss_is_the_denoising_loss_of_what_it_answered():
    problem, _, made, batch = game()
    made.fake = Recorder()
    generated = torch.randn(BATCH, 2)
    loss = made.fake_loss(batch, generated)
    noisy, sigma, _ = made.fake.asked[0]
    expected = denoising_loss(made.fake(noisy, sigma), generated, sigma, sigma_data=problem.sigma_data)
    assert torch.allclose(loss, expected)


@pytest.mark.parametrize("differentiable", [False, True])
def test_scores_have_a_graph_to_the_sample_only_where_asked(differentiable):
    _, _, made, batch = game()
    noisy = torch.randn(BATCH, 2, requires_grad=True)
    sigma = torch.ones(BATCH)
    for answer in made.denoised(noisy, sigma, batch.labels, differentiable=differentiable):
        assert answer.requires_grad is differentiable
        if differentiable:
            [slope] = torch.autograd.grad(answer.sum(), noisy)
            assert float(slope.abs().sum()) > 0
    with torch.no_grad():
        assert not any(a.requires_grad for a in made.denoised(noisy, sigma, batch.labels, differentiable=differentiable))


# --- the loop ---


def test_players_learn_in_turn_and_the_other_one_is_frozen():
    _, run, made, _ = game()
    seen = []

    def generator_loss(batch):
        seen.append(("generator", *(next(n.parameters()).requires_grad for n in (made.student, made.fake))))
        noisy, sigma = made.perturb(batch, made.generate(batch))
        real, fake = made.denoised(noisy, sigma, batch.labels, differentiable=True)
        return run.loss(batch, gap=(real - fake).square().sum(1))

    def fake_loss(batch):
        seen.append(("fake", *(next(n.parameters()).requires_grad for n in (made.student, made.fake))))
        return run.loss(batch, fake=made.fake_loss(batch, made.generate(batch)))

    before = run.cost()["total"]
    made.train(generator_loss, generator_rate=1, fake_rate=1, fake_updates=2, beta1=0.0, fake_loss=fake_loss)
    assert seen[:4] == [("generator", True, False), ("fake", False, True), ("fake", False, True), ("generator", True, False)]
    spent = run.cost()["total"]
    steps = spent["student_steps"] - before["student_steps"]
    assert len(seen) == 3 * steps
    assert spent["student_examples"] - before["student_examples"] == BATCH * steps
    assert spent["teacher_examples"] - before["teacher_examples"] == BATCH * steps


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_the_generator_or_its_average_leaves_with_the_recipe_of_its_levels(average):
    problem, run, made, _ = game(2)
    first = {k: v.clone() for k, v in made.student.state_dict().items()}
    student = made.train(
        lambda batch: run.loss(batch, size=made.generate(batch).square().sum(1)),
        generator_rate=1,
        fake_rate=1,
        fake_updates=1,
        beta1=0.9,
        average=average,
    )
    assert student.recipe == {"rule": "denoise", "sigmas": problem.few_steps(2, START)}
    assert student.recipe["sigmas"][0] == START
    assert student.averaged == (f"ema {average:g}" if average else "")
    last = made.student.state_dict()
    same = all(torch.equal(student.weights[k], last[k]) for k in last)
    assert same is (average == 0)
    assert not all(torch.equal(student.weights[k], first[k]) for k in first)


@pytest.mark.parametrize("steps", [1, 3])
def test_micro_batches_draw_what_the_whole_batch_draws(steps):
    """Three parts of a batch give the weights of the whole batch."""
    ends = []
    for parts in (1, 3):
        problem, run = problem_and_run(batches=6, micro_batches=parts, steps=steps)
        made = Matching(problem, run, steps=steps, start=START, initial_share=0.2)

        def generator_loss(batch, made=made, run=run):
            noisy, sigma = made.perturb(batch, made.generate(batch))
            real, fake = made.denoised(noisy, sigma, batch.labels, differentiable=True)
            return run.loss(batch, gap=(real - fake).square().sum(1))

        made.train(generator_loss, generator_rate=1, fake_rate=1, fake_updates=2, beta1=0.0)
        ends.append([p.detach().clone() for n in (made.student, made.fake) for p in n.parameters()])
    for whole, parts in zip(*ends, strict=True):
        assert torch.allclose(whole, parts, rtol=1e-4, atol=1e-6)
