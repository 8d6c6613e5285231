"""The digits as a generation setting, the guided mixture, and what the evaluation door lets through."""

import dataclasses

import numpy as np
import pytest
import torch

from distillbench.cards.options import options_of
from distillbench.errors import UserError
from distillbench.problems.image_generation.edm import guided, heun_solve, karras_grid
from distillbench.problems.image_generation.oracle import DenoiserOracle
from distillbench.runs.identities import seeds_by_role
from distillbench.runs.plan import plan
from distillbench.runs.runner import execute
from distillbench.runs.store import Store
from distillbench.runs.suite import Artifact, JudgeContext, TrainContext
from distillbench.suites import image_generation as suite
from distillbench.suites.image_classification import digits as images
from distillbench.suites.image_generation import digits, gaussians, sampling
from distillbench.suites.image_generation.nets import build
from distillbench.training.nets import Architecture, staged
from distillbench.training.student import Student
from tests.oracles.image_generation import diffusion as oracle

DIGITS = suite.CARD.settings["digits"]
GUIDED = suite.CARD.settings["gaussians-guided"]
SEEDS = seeds_by_role(0)


def small(setting=DIGITS, **options):
    """The setting with two draws of 200 samples."""
    return dataclasses.replace(setting, options={**setting.options, "draws": 2, "samples": 200, **options})


def judge(student, setting, split="tune", name="digits"):
    return {m.metric: m.value for m in suite.SUITE.evaluate(student, JudgeContext(name, setting, SEEDS, split=split)).measurements}


# --- digits ---


def test_teacher_training_and_test_images_are_disjoint():
    rows = images.partition()
    assert sum(len(r) for r in rows.values()) == 1797
    assert len(torch.cat(list(rows.values())).unique()) == 1797
    train, _ = digits.split("train")
    assert torch.equal(suite.SUITE.problem(TrainContext("digits", DIGITS, SEEDS)).train.inputs, train)
    assert float(train.min()) == -1 and float(train.max()) == 1


def test_the_teacher_is_the_students_architecture_and_near_the_real_floor():
    problem = suite.SUITE.problem(TrainContext("digits", DIGITS, SEEDS))
    teacher = problem.teacher.trainable_copy()
    assert {k: v.shape for k, v in teacher.state_dict().items()} == {k: v.shape for k, v in problem.student.state_dict().items()}
    many, one = judge(Student.of(teacher, problem.heun()), small()), judge(Student.of(teacher, problem.recipe()), small())
    assert many["fd_digits_cnn"] < 2 < 10 < one["fd_digits_cnn"]
    assert (many["nfe"], one["nfe"]) == (35, 1)


def test_class_accuracy_ranks_nothing():
    """A blurred class mean is recognised every time: it is measured, and on no card."""
    assert "class_accuracy" not in {m.name for m in suite.CARD.metrics}
    blur = torch.stack([digits.split("train")[0][digits.split("train")[1] == c].mean(0) for c in range(10)])
    labels = torch.arange(10).repeat(20)
    found = {m.metric: m.value for m in digits.measure([(blur[labels], labels)], JudgeContext("name", DIGITS, SEEDS, split="tune"))}
    assert found["class_accuracy"] > 0.9
    assert found["fd_digits_cnn"] > 3
    assert found["diversity"] == 0 and found["diversity_error"] > 6
    assert found["recall"] < 0.1


def test_real_images_are_at_the_floor_of_every_metric():
    found = {m.metric: m.value for m in digits.measure([digits.split("tune")], JudgeContext("name", DIGITS, SEEDS))}
    assert found["fd_digits_cnn"] < 1 and abs(found["kid_digits_cnn"]) < 0.05 and found["diversity_error"] < 0.05
    assert min(found["precision"], found["recall"]) > 0.85 and found["copied_fraction"] < 0.05
    assert 0.4 < found["closer_to_training"] < 0.6


def test_a_copy_of_the_training_set_is_named_though_its_distance_is_small():
    with pytest.raises(UserError, match="copies its training set: 100% of its samples"):
        digits.measure([digits.split("train")], JudgeContext("name", DIGITS, SEEDS))


def test_a_student_may_not_take_more_steps_and_only_the_teachers_very_weights_may():
    problem = suite.SUITE.problem(TrainContext("digits", DIGITS, SEEDS))
    teacher = problem.teacher.trainable_copy()
    with torch.no_grad():
        teacher.leave.bias += 1e-3
    with pytest.raises(UserError, match="takes 35 evaluations per sample, this setting allows 1"):
        judge(Student.of(teacher, problem.heun()), small())


def test_few_steps_are_evenly_placed_and_counted():
    few = small(suite.CARD.settings["digits-few"])
    problem = suite.SUITE.problem(TrainContext("digits-few", few, SEEDS))
    sigmas = problem.few_steps()
    assert len(sigmas) == 2 and sigmas[0] == 80
    assert sigmas[1] == pytest.approx(((80 ** (1 / 7) + 0.02 ** (1 / 7)) / 2) ** 7)
    assert problem.few_steps(1, 2.5) == [2.5] and problem.few_steps(1, 500.0) == [80.0]
    with pytest.raises(ValueError, match="3 steps, where this setting allows 2"):
        problem.few_steps(3)
    assert judge(Student.of(problem.teacher.trainable_copy(), problem.recipe()), few)["nfe"] == 2


def test_a_class_that_ignores_its_noise_is_named():
    samples, labels = torch.randn(40, 1, 8, 8), torch.arange(40) % 10
    sampling.sound(samples, labels)
    samples[labels == 3] = samples[3].clone()
    with pytest.raises(UserError, match="all 4 samples of class 3 are the same"):
        sampling.sound(samples, labels)


def test_a_sheet_has_a_row_of_ten_for_every_class(tmp_path):
    import base64
    import io

    from PIL import Image

    problem = suite.SUITE.problem(TrainContext("digits", DIGITS, SEEDS))
    student = Student.of(problem.teacher.trainable_copy(), problem.recipe())
    ctx = JudgeContext("digits", DIGITS, SEEDS, split="tune")
    options = options_of(DIGITS, digits.Options)
    drawn, _ = sampling.drawn(suite.SUITE.rebuild(student, ctx), student, options, ctx, teacher=lambda: digits.teacher(ctx), draws=1)
    sheet = digits.pixels(drawn, ctx)
    assert sheet.shape == (89, 89) and float(sheet.min()) >= 0 and float(sheet.max()) <= 1
    [(samples, labels)] = drawn
    assert torch.allclose(sheet[27:35, 9:17], (1 - samples[labels == 3][1, 0].clamp(-1, 1)) / 2)
    image = np.asarray(Image.open(io.BytesIO(Artifact.png(sheet).content)))
    assert np.allclose(image / 255, sheet.numpy(), atol=1 / 255)
    record = execute(plan("image-generation/digits", ["teacher_one_step"], [0], controls=False, split="tune")[0], Store(tmp_path))
    assert record.status == "ok", record.reason
    assert base64.b64decode(record.picture) == Artifact.png(sheet).content
    kept = tmp_path / "artifacts" / record.artifacts["picture"]["sha256"]
    assert kept.read_bytes() == Artifact.png(sheet).content and record.artifacts["picture"]["kind"] == "png"


def test_a_teacher_file_that_is_not_the_pinned_one_is_refused():
    other = dataclasses.replace(DIGITS, assets={"teacher": dataclasses.replace(DIGITS.assets["teacher"], sha256="0" * 64)})
    with pytest.raises(UserError, match="not the file that this setting pins"):
        suite.SUITE.problem(TrainContext("digits", other, SEEDS))


@pytest.mark.slow
def test_the_teacher_under_a_methods_name_is_refused_and_a_control_is_not(tmp_path):
    path = tmp_path / "disguised.py"
    path.write_text(
        "from distillbench.cards.card import Card\n"
        'CARD = Card(slug="disguised", version=1, problem="image-generation", title="the teacher")\n'
        "def distill(problem, run):\n    return run.export(problem.teacher.trainable_copy(), recipe=problem.heun(4))\n"
    )
    for method, status in ((str(path), "failed"), ("teacher", "ok")):
        (spec,) = plan("image-generation/digits", [method], [0], controls=False, split="tune")
        record = execute(spec, Store(tmp_path / "runs"))
        assert record.status == status
        assert record.reason is None or "is the teacher's network" in record.reason


# --- guidance ---


def mixture(classes):
    arguments = {"means": gaussians.means(options_of(GUIDED, gaussians.Options)).tolist(), "std": 0.1, "classes": classes}
    return build(Architecture("gaussian-mixture", arguments), 0)


def test_the_conditional_teacher_is_the_posterior_mean_over_its_own_modes():
    net, modes = mixture(4), gaussians.means(options_of(GUIDED, gaussians.Options)).numpy()
    x, sigma = np.random.default_rng(0).standard_normal((8, 2)), np.linspace(0.05, 5, 8)
    labels = torch.arange(8) % 4
    mine = net(torch.tensor(x), torch.tensor(sigma), labels).numpy()
    truth = [oracle.posterior_mean(a, s, modes[[c, c + 4]], 0.1) for a, s, c in zip(x, sigma, labels.tolist(), strict=True)]
    assert np.allclose(mine, truth, rtol=1e-9, atol=1e-12)
    assert torch.equal(net(torch.tensor(x), torch.tensor(sigma)), mixture(0)(torch.tensor(x), torch.tensor(sigma), labels))


def test_guidance_is_linear_metered_twice_and_1_is_the_conditional_model():
    net, x, s, c = mixture(4), torch.randn(6, 2), torch.ones(6), torch.arange(6) % 4
    for g, asked in ((1.0, 6), (2.0, 12), (0.0, 12)):
        teacher = DenoiserOracle(net, guidance=g)
        answer = teacher.denoise(x, s, c)
        assert teacher.meter.counts["teacher_examples"] == asked
        assert torch.allclose(answer, net(x, s) + g * (net(x, s, c) - net(x, s)), atol=1e-6)
    assert torch.equal(DenoiserOracle(net, guidance=2.0).denoise(x, s), net(x, s))
    assert DenoiserOracle(net, guidance=2.0).over(net).guidance == 1.0


def test_the_graph_of_a_guided_answer_reaches_the_sample_and_only_where_asked():
    teacher, s, c = DenoiserOracle(mixture(4), guidance=2.0), torch.ones(6), torch.arange(6) % 4
    x = torch.randn(6, 2, requires_grad=True)
    assert not teacher.denoise(x, s, c).requires_grad
    teacher.denoise(x, s, c, differentiable=True).sum().backward()
    assert float(x.grad.abs().min()) > 0
    with torch.no_grad():
        assert not teacher.denoise(x, s, c, differentiable=True).requires_grad


@pytest.mark.slow
def test_the_guided_teacher_scores_at_the_floor_against_its_own_exact_flow():
    setting = dataclasses.replace(GUIDED, options={**GUIDED.options, "draws": 2})
    problem = suite.SUITE.problem(TrainContext("gaussians-guided", setting, SEEDS))
    teacher = problem.teacher.trainable_copy()
    many = judge(Student.of(teacher, problem.heun()), setting, "test", "gaussians-guided")
    unguided = judge(Student.of(teacher, {k: v for k, v in problem.heun().items() if k != "guidance"}), setting, "test", "gaussians-guided")
    assert many["nfe"] == 70 and unguided["nfe"] == 35
    assert abs(many["mmd2"]) < 0.003 < 0.01 < unguided["mmd2"]


def test_the_right_samples_under_wrong_labels_are_far_away():
    reference, labels = gaussians.reference(options_of(GUIDED, gaussians.Options), 500, 1)
    right = {m.metric: m.value for m in gaussians.measure([(reference, labels)], JudgeContext("name", GUIDED, SEEDS))}
    wrong = {m.metric: m.value for m in gaussians.measure([(reference, (labels + 1) % 4)], JudgeContext("name", GUIDED, SEEDS))}
    assert right["mmd2"] < 0.01 < 0.1 < wrong["mmd2"]
    assert right["sliced_wasserstein"] == wrong["sliced_wasserstein"]  # which does not see labels


def test_twice_the_steps_of_the_exact_flow_change_nothing_a_metric_sees():
    answer = guided(mixture(4).double(), 3.0)
    noise, labels = torch.randn(500, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(500) % 4
    ends = []
    for steps in (gaussians.EXACT_STEPS, 2 * gaussians.EXACT_STEPS):
        grid = karras_grid(steps, sigma_min=0.01, sigma_max=10.0).tolist()
        ends.append(heun_solve(lambda x, s: answer(x, s, labels), 10 * noise, grid))
    assert float((ends[0] - ends[1]).norm(dim=1).median()) < 1e-3 * 0.1


def test_stages_are_those_of_the_network_and_an_exact_teacher_has_none():
    problem = suite.SUITE.problem(TrainContext("digits", DIGITS, SEEDS))
    x, s, c = torch.randn(3, 1, 8, 8), torch.ones(3), torch.arange(3)
    output, stages = staged(problem.student, x, s, c)
    assert torch.equal(output, problem.student(x, s, c))
    assert [tuple(t.shape) for t in stages] == [(3, 256)] * 3
    x.requires_grad_(True)
    sum(t.sum() for t in problem.teacher.stages(x, s, c)).backward()
    assert float(x.grad.abs().sum()) > 0
    with pytest.raises(UserError, match="declares no stage_names"):
        DenoiserOracle(mixture(0)).stages(torch.randn(3, 2), s)
