"""Score SDE: the teacher's own weights, the recipes it leaves with, and how well they sample the mixture."""

import pytest
import torch

from distillbench.cards.options import options_of
from distillbench.methods.image_generation.score_sde import distill
from distillbench.runs.identities import seeds_by_role
from distillbench.runs.plan import plan, track
from distillbench.runs.runner import execute
from distillbench.runs.store import Store
from distillbench.runs.suite import TrainContext
from distillbench.suites import image_generation as suite
from distillbench.suites.image_generation import gaussians, nets, sampling
from distillbench.suites.metrics.modes import between_modes, coverage, spread_ratio
from distillbench.training.run import Run
from distillbench.training.student import tensor_digest


def problem_and_setting(name):
    setting = track(f"image-generation/{name}")[2]
    return suite.SUITE.problem(TrainContext(name, setting, seeds_by_role(0))), setting


def leave(name, **values):
    problem, setting = problem_and_setting(name)
    run = Run(seeds=seeds_by_role(0), budget=setting.budget, training=setting.training)
    values = {"sde": "ve", "sampler": "predictor_corrector", "steps": 100, "snr": 0.16, **values}
    return distill(problem, run, **values), problem, run


@pytest.mark.parametrize("name", ["gaussians", "gaussians-guided", "digits"])
def test_the_teacher_leaves_as_it_came_and_is_asked_nothing(name):
    student, problem, run = leave(name)
    assert tensor_digest(student.weights) == problem.teacher.digest
    assert not any(run.meter.counts.values())
    assert student.recipe.get("guidance", 1.0) == problem.teacher.guidance


@pytest.mark.parametrize(
    ("sampler", "steps", "levels", "taken"),
    [
        ("predictor_corrector", 41, 20, 40),
        ("reverse_diffusion", 41, 41, 41),
        ("ancestral", 41, 41, 41),
        ("probability_flow", 42, 21, 41),
        ("probability_flow", 4, 2, 3),
        ("predictor_corrector", 4, 2, 4),
    ],
)
def test_no_recipe_takes_more_evaluations_than_it_was_given(sampler, steps, levels, taken):
    student, problem, _ = leave("gaussians", sampler=sampler, steps=steps, sde="vp")
    assert len(student.recipe["sigmas"]) == levels
    assert sampling.evaluations(student.recipe, sigma_max=problem.sigma_max) == taken
    assert (student.recipe["sigmas"][0], student.recipe["sigmas"][-1]) == (problem.sigma_max, problem.sigma_min)


def found(**values):
    """Within-mode spread (1 is right), share between modes (0.011) and coverage of 4,000 samples of the mixture."""
    student, problem, _ = leave("gaussians", **values)
    options = options_of(suite.CARD.settings["gaussians"], gaussians.Options)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, 2, generator=generator)
    samples, _ = sampling.sample(nets.rebuild(student), student.recipe, noise, None, generator, sigma_min=problem.sigma_min)
    modes, std = gaussians.means(options), options.std
    between = float(between_modes(samples, modes, std).double().mean())
    return spread_ratio(samples, modes, std), between, coverage(samples, modes, std)


def test_at_as_many_levels_the_corrector_improves_on_the_predictor_alone():
    spread, between, _ = found(sampler="predictor_corrector", steps=40)
    alone, stray, _ = found(sampler="reverse_diffusion", steps=20)
    assert abs(spread - 1) < 0.8 * abs(alone - 1)
    assert between < 0.8 * stray


@pytest.mark.parametrize("sampler", ["predictor_corrector", "reverse_diffusion", "ancestral", "probability_flow"])
@pytest.mark.parametrize("sde", ["ve", "vp", "subvp"])
def test_every_sde_and_sampler_finds_the_mixture(sde, sampler):
    spread, between, covered = found(sde=sde, sampler=sampler, steps=100)
    assert spread == pytest.approx(1, abs=0.25)
    assert between < 0.06
    assert covered == 1


def test_the_record_says_what_was_spent(tmp_path):
    torch.manual_seed(0)
    [spec] = plan("image-generation/gaussians", ["score_sde"], [0], controls=False, overrides={"score_sde": {"steps": 10}},
                  options={"samples": 500})  # fmt: skip
    record = execute(spec, Store(tmp_path))
    assert record.status == "ok", record.reason
    assert record.value("nfe") == 10
    assert record.cost["total"]["teacher_examples"] == record.cost["total"]["student_examples"] == 0
