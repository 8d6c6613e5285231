"""The suite of generators: the exact teacher, the sampler, the judge, and what it refuses."""

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from distillbench.cards.options import options_of
from distillbench.cards.reading import read_card
from distillbench.errors import UserError
from distillbench.runs.identities import seeds_by_role
from distillbench.runs.plan import plan
from distillbench.runs.runner import execute
from distillbench.runs.store import Store
from distillbench.runs.suite import JudgeContext, TrainContext
from distillbench.suites import image_generation as suite
from distillbench.suites.image_generation import gaussians, nets, sampling
from distillbench.suites.image_generation.nets import GaussianMixture, build
from distillbench.training.data import Request
from distillbench.training.nets import Architecture
from distillbench.training.noise import Key
from distillbench.training.student import Student
from tests.oracles.image_generation import diffusion as oracle

SETTING = suite.CARD.settings["gaussians"]
SEEDS = seeds_by_role(0)
MEANS = gaussians.means(options_of(SETTING, gaussians.Options))


def posed(setting=SETTING, seeds=SEEDS):
    return suite.SUITE.problem(TrainContext("gaussians", setting, seeds))


def judge(student, setting=SETTING, seeds=SEEDS, split="test"):
    return {m.metric: m.value for m in suite.SUITE.evaluate(student, JudgeContext("gaussians", setting, seeds, split=split)).measurements}


def mixture(means, std):
    return build(Architecture("gaussian-mixture", {"means": means, "std": std}), 0)


# --- the card and the problem ---


def test_the_card_is_a_literal():
    card = read_card(Path(suite.__file__))
    assert card.slug == "image-generation"
    assert dict(card.settings)["gaussians"].options["modes"] == 8


def test_seeds_are_honoured_by_role():
    problem, same = posed(), posed()
    assert torch.equal(problem.train.inputs, same.train.inputs)
    assert all(torch.equal(a, b) for a, b in zip(problem.student.parameters(), same.student.parameters(), strict=True))
    assert not torch.equal(posed(seeds={**SEEDS, "data": 1}).train.inputs, problem.train.inputs)
    other = posed(seeds={**SEEDS, "init": 1})
    assert torch.equal(other.train.inputs, problem.train.inputs)
    assert not torch.equal(other.student.enter.weight, problem.student.enter.weight)


def test_batches_are_real_samples_with_label_zero():
    batch = next(posed().batches.stream(0))
    assert batch.inputs.shape == (256, 2)
    assert not batch.labels.any()
    assert bool(batch.labelled.all())


def test_levels_cover_the_schedule_and_respect_their_bounds():
    problem, rows = posed(), Request(torch.arange(5000), 0, key=Key(0, 0, 0, 0))
    level = problem.levels(rows)
    assert level.shape == (5000,)
    assert problem.sigma_min <= float(level.min()) < 0.011
    assert 9.9 < float(level.max()) <= problem.sigma_max
    some = problem.levels(rows, "some", low=0.4, high=0.6)
    assert 0.2 < float(some.min()) < float(some.max()) < 2


# --- the teacher ---


def points():
    rng = np.random.default_rng(0)
    return rng.standard_normal((20, 2)) * 1.5, np.exp(rng.uniform(np.log(0.05), np.log(10), 20))


def test_edm_8_the_teacher_is_the_posterior_mean_at_every_noise_level():
    x, sigma = points()
    net = GaussianMixture(MEANS.tolist(), 0.1)
    mine = net(torch.tensor(x), torch.tensor(sigma)).numpy()
    truth = [oracle.posterior_mean(a, s, MEANS.numpy(), 0.1) for a, s in zip(x, sigma, strict=True)]
    assert np.allclose(mine, truth, rtol=1e-10, atol=1e-12)


def test_the_teachers_score_is_the_gradient_of_the_log_density():
    x, sigma = points()
    answer = GaussianMixture(MEANS.tolist(), 0.1)(torch.tensor(x), torch.tensor(sigma)).numpy()
    for a, s, d in zip(x, sigma, answer, strict=True):
        step = 1e-5
        slope = [
            (oracle.log_density(a + step * e, s, MEANS.numpy(), 0.1) - oracle.log_density(a - step * e, s, MEANS.numpy(), 0.1)) / (2 * step)
            for e in np.eye(2)
        ]
        assert np.allclose((d - a) / s**2, slope, rtol=1e-6, atol=1e-6)


def test_unequal_distances_from_the_origin_are_weighed_right():
    means = [[0.0, 0.0], [3.0, 0.0], [0.0, -1.0]]
    x, sigma = points()
    mine = GaussianMixture(means, 0.4)(torch.tensor(x), torch.tensor(sigma)).numpy()
    truth = [oracle.posterior_mean(a, s, np.array(means), 0.4) for a, s in zip(x, sigma, strict=True)]
    assert np.allclose(mine, truth, rtol=1e-9, atol=1e-12)


def test_the_oracle_counts_every_row_of_every_call():
    problem = posed()
    for rows in (7, 5):
        answer = problem.teacher.denoise(torch.zeros(rows, 2), torch.ones(rows), torch.zeros(rows, dtype=torch.int64))
        assert not answer.requires_grad
    assert problem.teacher.meter.counts["teacher_examples"] == 12


# --- the student ---


def test_a_fresh_student_answers_c_skip_x_and_rebuilds_bit_for_bit():
    problem = posed()
    x, s = torch.randn(6, 2), torch.full((6,), 0.714)
    assert torch.allclose(problem.student(x, s), x / 2)
    with torch.no_grad():
        problem.student.leave.weight.normal_()
    student = Student.from_bytes(Student.of(problem.student, problem.recipe()).to_bytes())
    assert torch.equal(nets.rebuild(student)(x, s), problem.student.eval()(x, s))


def test_labels_change_a_conditional_network_only():
    x, s, labels = torch.randn(4, 2), torch.ones(4), torch.arange(4)
    own = {"shape": [2], "width": 16, "blocks": 1, "sigma_data": 0.5, "sigma_min": 0.01}
    for classes in (0, 4):
        net = build(Architecture("denoiser-mlp", {**own, "classes": classes}), 0)
        torch.nn.init.normal_(net.leave.weight)
        assert torch.equal(net(x, s, labels), net(x, s)) == (classes == 0)


def test_weights_that_do_not_fit_are_named():
    student = Student.of(posed().student, posed().recipe())
    part = dataclasses.replace(student.only, weights={k: v for k, v in student.weights.items() if k != "enter.bias"})
    broken = Student({"student": part}, student.recipe)
    with pytest.raises(UserError, match="do not fit architecture denoiser-mlp"):
        judge(broken)


# --- the sampler ---


def test_the_one_step_rule_is_one_call_at_the_given_level():
    net, z = mixture(MEANS.tolist(), 0.1), torch.randn(5, 2)
    x, spent = sampling.sample(net, {"rule": "denoise", "sigmas": [2.5]}, z, None, torch.Generator(), sigma_min=0.01)
    assert spent == 1
    assert torch.equal(x, net(2.5 * z, torch.full((5,), 2.5)))


def test_the_many_step_rule_noises_anew_to_the_next_level():
    net, z = mixture(MEANS.tolist(), 0.1), torch.randn(5, 2)
    x, spent = sampling.sample(net, {"rule": "denoise", "sigmas": [10.0, 0.8]}, z, None, torch.Generator().manual_seed(1), sigma_min=0.01)
    assert spent == 2
    fresh = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
    first = net(10 * z, torch.full((5,), 10.0))
    assert torch.allclose(x, net(first + (0.8**2 - 0.01**2) ** 0.5 * fresh, torch.full((5,), 0.8)))


@pytest.mark.parametrize("rule", [*sampling.RULES, *sampling.SDE_RULES])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_evaluations_that_a_recipe_is_charged_for_are_those_that_it_takes(rule, guidance):
    net = build(Architecture("gaussian-mixture", {"means": MEANS.tolist(), "std": 0.1, "classes": 4}), 0)
    own = {"sde": "subvp"} if rule in sampling.SDE_RULES else {}
    own |= {"snr": 0.1} if rule == "predictor_corrector" else {}
    recipe = {"rule": rule, "sigmas": [9.0, 3.0, 1.0, 0.2], "guidance": guidance, **own}
    z, labels = torch.randn(5, 2), torch.arange(5) % 4
    x, spent = sampling.sample(net, recipe, z, labels, torch.Generator(), sigma_min=0.01)
    assert spent == sampling.evaluations(recipe, sigma_max=10.0)
    assert bool(torch.isfinite(x).all())
    assert x.dtype == z.dtype


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({}, "leaves with recipe"),
        ({"rule": "magic", "sigmas": [1.0]}, "leaves with recipe"),
        ({"rule": "denoise", "sigmas": [1.0], "extra": 2}, "leaves with recipe"),
        ({"rule": "denoise", "sigmas": [1.0], "sde": "ve"}, "leaves with recipe"),
        ({"rule": ["denoise"], "sigmas": [1.0]}, "leaves with recipe"),
        ({"rule": "ancestral", "sigmas": [1.0]}, r"leaves with recipe.* and sde, not"),
        ({"rule": "ancestral", "sigmas": [1.0], "sde": "ve", "snr": 0.1}, r"leaves with recipe.* and sde, not"),
        ({"rule": "predictor_corrector", "sigmas": [1.0], "sde": "ve"}, r"leaves with recipe.* and sde, snr, not"),
        ({"rule": "ancestral", "sigmas": [1.0], "sde": "vpp"}, "unknown SDE 'vpp'"),
        ({"rule": "predictor_corrector", "sigmas": [1.0], "sde": "ve", "snr": 0}, "snr must be a number above 0"),
        ({"rule": "predictor_corrector", "sigmas": [1.0], "sde": "ve", "snr": float("inf")}, "snr must be a number above 0"),
        ({"rule": "predictor_corrector", "sigmas": [1.0], "sde": "ve", "snr": 0.1}, "takes 2 evaluations"),
        ({"rule": "probability_flow", "sigmas": [2.0, 1.0], "sde": "vp"}, "takes 3 evaluations"),
        ({"rule": "denoise", "sigmas": [1.0], "guidance": float("nan")}, "guidance must be a number"),
        ({"rule": "denoise", "sigmas": [1.0], "guidance": 2}, "takes 2 evaluations"),
        ({"rule": "denoise", "sigmas": []}, "must lie within"),
        ({"rule": "denoise", "sigmas": [11.0]}, "must lie within"),
        ({"rule": "denoise", "sigmas": [float("nan")]}, "must lie within"),
        ({"rule": "denoise", "sigmas": [1.0, 2.0]}, "must decrease"),
        ({"rule": "denoise", "sigmas": [2.0, 1.0]}, "takes 2 evaluations per sample, this setting allows 1"),
        ({"rule": "heun", "sigmas": [2.0, 1.0]}, "takes 3 evaluations"),
    ],
)
def test_a_recipe_that_is_none_or_too_long_is_refused(recipe, said):
    with pytest.raises(UserError, match=said):
        judge(Student.of(posed().student, recipe))


def test_a_setting_of_two_steps_takes_two():
    setting = dataclasses.replace(SETTING, options={**SETTING.options, "steps": 2})
    problem = posed(setting)
    with torch.no_grad():
        problem.student.leave.weight.normal_()
    assert judge(Student.of(problem.student, {"rule": "denoise", "sigmas": [10.0, 1.0]}), setting)["nfe"] == 2


# --- the judge ---


def test_the_teacher_with_many_steps_is_at_the_floor_and_in_one_step_a_blur():
    problem = posed()
    teacher = problem.teacher.trainable_copy()
    many, one = judge(Student.of(teacher, problem.heun())), judge(Student.of(teacher, problem.recipe()))
    assert abs(many["mmd2"]) < 0.002
    assert many["spread_ratio"] == pytest.approx(1, abs=0.03)
    assert (many["nfe"], one["nfe"]) == (35, 1)
    assert (many["coverage"], one["coverage"]) == (1, 0)
    assert one["between_modes"] == 1
    assert one["mmd2"] > 0.3


def test_a_collapse_within_modes_shows_in_mmd_and_spread_and_not_in_coverage():
    collapsed = mixture(MEANS.tolist(), 0.01)
    setting = dataclasses.replace(SETTING, options={**SETTING.options, "steps": 35})
    scores = judge(Student.of(collapsed, posed().heun()), setting)
    assert scores["spread_ratio"] < 0.2
    assert scores["spread_error"] > 1.5
    assert scores["coverage"] == 1
    assert scores["mmd2"] > 0.01


def test_every_method_is_judged_from_the_same_noise_and_a_split_has_its_own():
    problem = posed()
    student = Student.of(problem.teacher.trainable_copy(), problem.recipe())

    def draws(seeds=SEEDS, split="test"):
        ctx = JudgeContext("gaussians", SETTING, seeds, split=split)
        made, _ = sampling.drawn(
            nets.rebuild(student), student, ctx.options(gaussians.Options), ctx, teacher=lambda: gaussians.teacher(ctx)
        )
        return torch.stack([samples for samples, _ in made])

    first = draws()
    assert torch.equal(first, draws())
    assert not torch.equal(first, draws(split="tune"))
    assert not torch.equal(first, draws(seeds_by_role(1)))
    assert not torch.equal(first[0], first[1])


def test_sampling_leaves_global_randomness_alone_and_does_not_depend_on_it():
    problem = posed()
    student = Student.of(problem.teacher.trainable_copy(), problem.recipe())
    torch.manual_seed(0)
    first = judge(student)
    torch.manual_seed(1)
    assert judge(student) == first


def test_a_generator_that_ignores_its_noise_is_named():
    with pytest.raises(UserError, match="ignores its noise: all 2000 samples are the same"):
        judge(Student.of(mixture([[0.5, 0.5]], 0.0), posed().recipe()))


def test_samples_that_are_not_finite_are_counted():
    net = copy.deepcopy(posed().student)
    with torch.no_grad():
        net.leave.weight.fill_(1e38)
        net.enter.weight.fill_(1e38)
    with pytest.raises(UserError, match=r"\d+ of 2000 samples are not finite"):
        judge(Student.of(net, posed().recipe()))


METHOD = """
import torch
from distillbench.cards.card import Card
CARD = Card(slug="{slug}", version=1, problem="image-generation", title="odd", exempt={{"export": "it sets weights itself"}})
def distill(problem, run):
    {body}
"""


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "torch.nn.init.constant_(problem.student.leave.weight, 3e38); return run.export(problem.student, recipe=problem.recipe())",
            "not finite",
        ),
        ("return run.export(problem.student)", "leaves with recipe"),
        ("return run.export(problem.student, recipe=problem.heun())", "35 evaluations"),
    ],
)
def test_a_bad_generator_becomes_a_failed_record_with_its_reason(tmp_path, body, reason):
    path = tmp_path / "odd.py"
    path.write_text(METHOD.format(slug="odd", body=body))
    record = execute(plan("image-generation/gaussians", [str(path)], [0], controls=False)[0], Store(tmp_path / "store"))
    assert record.status == "failed"
    assert reason in record.reason
    assert not record.measurements


def test_the_controls_of_this_problem_are_planned():
    specs = plan("image-generation/gaussians", ["dmd"], [0])
    assert [s.method for s in specs] == ["scratch", "teacher", "teacher_one_step", "dmd"]
    assert {s.cards["method"]["problem"] for s in specs} == {"image-generation"}


def test_scratch_asks_the_teacher_nothing_and_the_teacher_trains_nothing(tmp_path):
    specs = plan("image-generation/gaussians", [], [0], budget={"student_examples": 256 * 4})
    for spec in specs:
        record = execute(spec, Store(tmp_path))
        assert record.status == "ok", record.reason
        assert record.cost["total"]["teacher_examples"] == 0
        assert record.cost["total"]["student_examples"] == (256 * 4 if spec.method == "scratch" else 0)
        assert record.value("nfe") == (35 if spec.method == "teacher" else 1)
