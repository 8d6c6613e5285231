"""TrigFlow in our variables against the papers' formulas in theirs, the closed Gaussian case, and the discrete limit."""

import numpy as np
import pytest
import torch

from distillbench.problems.image_generation.edm import euler_step
from distillbench.problems.image_generation.trigflow import draw, normalised, scm_loss, tangent, time, velocity, warm
from distillbench.runs.identities import seeds_by_role
from distillbench.runs.plan import track
from distillbench.runs.suite import TrainContext
from distillbench.suites import image_generation as suite
from distillbench.suites.image_generation.nets import build
from distillbench.training.nets import Architecture
from distillbench.training.run import Run
from tests.keyed import stream
from tests.oracles.image_generation import trigflow as oracle

D, B, N = 0.7, 6, 3
STD = 0.4
SIGMA = torch.tensor([0.02, 0.1, 0.5, 1.3, 10.0, 80.0], dtype=torch.float64)
T = torch.atan(SIGMA / D)[:, None]


def draws(seed=0):
    """Samples in the variance-exploding form, of a size that fits their level."""
    generator = torch.Generator().manual_seed(seed)
    clean, noise = (torch.randn(B, N, generator=generator, dtype=torch.float64) for _ in range(2))
    return STD * clean + SIGMA[:, None] * noise


def network(u, t, xp=np):
    """Some smooth F(x_t / d, t)."""
    return 0.8 * xp.tanh(u) * xp.cos(2 * t) + 0.3 * u**2 * xp.sin(t) - 0.2


def teacher_network(u, t, xp=np):
    return 0.5 * xp.sin(u) + 0.4 * t


def denoiser(raw):
    """D(x; sigma) of TrigFlow's F, by f(cos(t) x, t)."""

    def answer(x, sigma):
        t = torch.atan(sigma / D)[:, None]
        return t.cos() ** 2 * x - t.sin() * D * raw(t.cos() * x / D, t, torch)

    return answer


STUDENT, TEACHER = denoiser(network), denoiser(teacher_network)


def exact(x, sigma):
    """The denoiser of N(0, STD^2)."""
    return STD**2 / (STD**2 + sigma[:, None] ** 2) * x


def solution(x, sigma):
    """Its exact consistency function."""
    return STD / (STD**2 + sigma[:, None] ** 2).sqrt() * x


# --- the correspondence ---


def test_edm_preconditioning_is_trigflow():
    """A network of the suite, whatever its weights: D is f with F = -(its raw output), and velocity finds that F again."""
    own = {"shape": [N], "width": 16, "blocks": 1, "sigma_data": D, "sigma_min": 0.02}
    net = build(Architecture("denoiser-mlp", own), 0).double()
    seen = {}
    torch.nn.init.normal_(net.leave.weight, generator=torch.Generator().manual_seed(0))
    net.leave.register_forward_hook(lambda module, inputs, output: seen.update(raw=output))
    net.enter.register_forward_hook(lambda module, inputs, output: seen.update(entered=inputs[0]))
    x = draws()
    with torch.no_grad():
        denoised = net(x, SIGMA)
    trig = T.cos() * x
    assert torch.allclose(seen["entered"], trig / D, rtol=1e-12)
    f = oracle.consistency_function(trig.numpy(), T.numpy(), lambda u, t: -seen["raw"].numpy(), sigma_data=D)
    assert np.allclose(denoised.numpy(), f, rtol=1e-12)
    assert torch.allclose(velocity(denoised, x, SIGMA, sigma_data=D), -seen["raw"], rtol=1e-10)


def test_the_answer_at_no_noise_is_the_input():
    x, none = torch.randn(4, N, dtype=torch.float64), torch.full((4,), 1e-12, dtype=torch.float64)
    assert torch.allclose(STUDENT(x, none), x, atol=1e-11)


def test_the_noise_to_signal_ratio_is_the_tangent_of_time():
    t = time(SIGMA, sigma_data=D)
    assert torch.allclose(D * t.tan(), SIGMA, rtol=1e-12)
    assert bool((t > 0).all() and (t < np.pi / 2).all())


def test_velocity_of_the_exact_denoiser_is_the_flow_of_the_gaussian():
    x = draws()
    flow = oracle.gaussian_teacher((T.cos() * x).numpy(), T.numpy(), std=STD, sigma_data=D)
    assert np.allclose(D * velocity(exact(x, SIGMA), x, SIGMA, sigma_data=D).numpy(), flow, rtol=1e-9)


# --- the tangent ---


@pytest.mark.parametrize("r", [0.0, 0.3, 1.0])
def test_tangent_is_the_papers_rearranged_one(r):
    """Ours is one derivative in the variance-exploding form; theirs are two terms in TrigFlow's own variables."""
    x = draws(1)
    ours = tangent(STUDENT, x, SIGMA, TEACHER(x, SIGMA), sigma_data=D, warmup=r)
    theirs = oracle.tangent((T.cos() * x).numpy(), T.numpy(), network, teacher_network, sigma_data=D, r=r)
    assert np.allclose(ours.numpy(), theirs, rtol=1e-7, atol=1e-9)


def test_the_jvp_of_the_suites_network_is_the_central_difference_along_the_teachers_flow():
    own = {"shape": [N], "width": 16, "blocks": 2, "sigma_data": D, "sigma_min": 0.02, "classes": 4, "normalise": True}
    net = build(Architecture("denoiser-mlp", own), 0).double()
    torch.nn.init.normal_(net.leave.weight, generator=torch.Generator().manual_seed(0))
    x, labels, teacher = draws(2), torch.arange(B) % 4, TEACHER(draws(2), SIGMA)
    ours = tangent(lambda a, s: net(a, s, labels), x, SIGMA, teacher, sigma_data=D)
    assert not ours.requires_grad
    h = 1e-5
    with torch.no_grad():
        step = h * (SIGMA**2 + D**2).sqrt()
        slope = (x - teacher) / SIGMA[:, None]
        ends = [net(x + sign * step[:, None] * slope, SIGMA + sign * step, labels) for sign in (1, -1)]
    assert torch.allclose(ours, (ends[0] - ends[1]) / (2 * h), rtol=1e-6, atol=1e-8)


def test_the_exact_consistency_function_has_no_tangent():
    x = draws(3)
    assert np.allclose(
        solution(x, SIGMA).numpy(),
        oracle.gaussian_solution((T.cos() * x).numpy(), T.numpy(), std=STD, sigma_data=D),
        rtol=1e-12,
    )
    g = tangent(solution, x, SIGMA, exact(x, SIGMA), sigma_data=D)
    assert float(g.abs().max()) < 1e-12
    assert float(tangent(STUDENT, x, SIGMA, exact(x, SIGMA), sigma_data=D).abs().max()) > 0.1


def test_a_cold_tangent_is_zero_at_the_teachers_answer_alone_and_a_warm_one_is_not():
    x = draws(4)
    assert float(tangent(TEACHER, x, SIGMA, TEACHER(x, SIGMA), sigma_data=D, warmup=0.0).abs().max()) < 1e-12
    assert float(tangent(TEACHER, x, SIGMA, TEACHER(x, SIGMA), sigma_data=D, warmup=1.0).abs().max()) > 0.1


def test_single_precision_keeps_the_tangent_at_every_level():
    """No level loses digits, the largest (cos t near 0) and the smallest (sin t near 0) included."""
    x = draws(5)
    whole = tangent(STUDENT, x, SIGMA, TEACHER(x, SIGMA), sigma_data=D)
    half = tangent(STUDENT, x.float(), SIGMA.float(), TEACHER(x, SIGMA).float(), sigma_data=D)
    assert torch.allclose(half.double(), whole, rtol=2e-4, atol=2e-5)


def test_normalised_shortens_to_less_than_one_and_keeps_the_direction():
    g = torch.randn(B, 2, 2, dtype=torch.float64) * torch.logspace(-3, 3, B, dtype=torch.float64).view(-1, 1, 1)
    ours = normalised(g, c=0.1)
    assert np.allclose(ours.numpy(), oracle.normalised(g.numpy(), c=0.1), rtol=1e-12)
    assert float(ours.flatten(1).norm(dim=1).max()) < 1
    assert torch.equal(normalised(torch.zeros(2, 3), c=0.1), torch.zeros(2, 3))


def test_warm_up_rises_to_one_and_can_be_left_out():
    assert [warm(p, 0.2) for p in (0.0, 0.1, 0.2, 0.9)] == [0.0, 0.5, 1.0, 1.0]
    assert warm(0.0, 0.0) == 1.0


# --- the loss ---


def test_scm_loss_matches_the_oracle_in_value_and_gradient():
    rng = np.random.default_rng(0)
    f, g = rng.standard_normal((B, 2, 2)), rng.standard_normal((B, 2, 2))
    student, target = torch.tensor(f, requires_grad=True), torch.tensor(g, requires_grad=True)
    loss = scm_loss(student, target)
    assert np.allclose(loss.detach().numpy(), oracle.scm_loss(f, f, g), rtol=1e-10)
    loss.sum().backward()
    numeric, step = np.zeros_like(f), 1e-5
    for index in np.ndindex(f.shape):
        up, down = f.copy(), f.copy()
        up[index] += step
        down[index] -= step
        numeric[index] = (oracle.scm_loss(up, f, g).sum() - oracle.scm_loss(down, f, g).sum()) / (2 * step)
    assert np.allclose(student.grad.numpy(), numeric, rtol=1e-7, atol=1e-9)
    assert np.allclose(student.grad.numpy(), -2 * g / 4, rtol=1e-12)
    assert target.grad is None


def test_the_gradient_is_the_limit_of_discrete_consistency():
    """mean (f(x_t, t) - sg f(x_t', t'))^2 / step, t' one Euler step of the teacher cleaner, tends to f's part of sCM's gradient."""
    x = draws(6)[2:5]
    sigma = SIGMA[2:5]
    weight = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)

    def student(a, s):
        return denoiser(lambda u, t, xp: weight * network(u, t, xp))(a, s)

    with torch.no_grad():
        g = tangent(student, x, sigma, TEACHER(x, sigma), sigma_data=D)
    t = time(sigma, sigma_data=D)
    # dL/dF = -2 g / N and F = -(f - cos x_t) / (d sin t): in f the gradient is 2 g / (N d sin t), with g = cos(t) df/dt
    loss = scm_loss(velocity(student(x, sigma), x, sigma, sigma_data=D), g)
    (continuous,) = torch.autograd.grad(loss.sum(), weight)
    errors = []
    for step in (1e-2, 1e-3, 1e-4):
        cleaner = D * torch.tan(t - step)
        with torch.no_grad():
            target = student(euler_step(TEACHER, x, sigma, cleaner), cleaner)
        distance = ((student(x, sigma) - target) ** 2).mean(1) / step
        (discrete,) = torch.autograd.grad((distance * t.cos() / (D * t.sin())).sum(), weight)
        errors.append(abs(float(discrete - continuous)) / abs(float(continuous)))
    assert errors[0] < 0.5
    assert errors[1] < 0.2 * errors[0]
    assert errors[2] < 0.2 * errors[1] < 1e-2


# --- what methods call ---


@pytest.mark.parametrize("setting", ["gaussians", "gaussians-guided"])
def test_draw_asks_the_teacher_once_and_leaves_the_graph_to_the_velocity_alone(setting):
    about = track(f"image-generation/{setting}")[2]
    problem = suite.SUITE.problem(TrainContext(setting, about, seeds_by_role(0)))
    run = Run(seeds=seeds_by_role(0), budget=about.budget, training=about.training, oracles=[problem.teacher])
    batch = next(stream(problem.batches))
    f, g, sigma = draw(problem, run, problem.student, batch, mean=0.0, std=1.0, warmup=1.0, c=0.1)
    each = 1 if problem.teacher.guidance == 1 else 2
    assert problem.teacher.meter.counts["teacher_examples"] == each * len(batch)
    assert f.requires_grad
    assert not g.requires_grad
    assert f.shape == g.shape == batch.inputs.shape
    position = (sigma / problem.sigma_data).log()
    assert float(position.mean()) == pytest.approx(0, abs=0.25)
    assert float(position.std()) == pytest.approx(1, abs=0.2)
    assert float(sigma.min()) >= problem.sigma_min
    assert float(sigma.max()) <= problem.sigma_max
