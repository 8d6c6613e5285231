"""``distillbench new``: skeletons that run, and pass every check but for what their author must fill in."""

from __future__ import annotations

from pathlib import Path

from bench import registry
from bench.card import SLUG
from bench.errors import UserError, unknown
from bench.store import write_atomic

CLASSIFICATION = '''"""TODO: one line on the idea."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bench.card import Beats, Card, Paper, Real
from bench.data import Batch
from bench.losses import cross_entropy
from bench.problems.classification import Classification
from bench.run import Losses, Run
from bench.student import Student

CARD = Card(
    slug="{slug}",
    version=1,
    problem="classification",
    title="TODO: its name",
    paper=Paper(title="TODO: the paper's title", year=2026, arxiv=None),
    objective="divergence",
    equations={{"divergence": "TODO: L = T^2 sum_c p_t (log p_t - log p_s), p = softmax(z/T)"}},
    hyperparameters={{"temperature": Real(4.0, gt=0)}},
    claims=[Beats("kd")],
)


def divergence(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """T^2 KL(p_t || p_s).   student_logits, teacher_logits: (B, C) float; returns (B,), nats. No reduction here."""
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(1)


def distill(problem: Classification, run: Run, *, temperature: float) -> Student:
    """Reads like the algorithm box of the paper; defaults live on the card."""

    def loss(batch: Batch) -> Losses:
        teacher = problem.teacher.logits(batch)
        student = problem.student(batch.inputs)
        return run.loss(
            ce=cross_entropy(student, batch.labels),
            kd=divergence(student, teacher, temperature=temperature),
        )

    return run.fit(problem.student, loss, problem.batches)
'''

GENERATION = '''"""TODO: one line on the idea."""

from __future__ import annotations

from torch import Tensor

from bench.card import Beats, Card, Integer, Paper, Real
from bench.data import Batch
from bench.diffusion import row_mean
from bench.matching import Matching
from bench.problems.image_generation import ImageGeneration
from bench.run import Losses, Run
from bench.student import Student

CARD = Card(
    slug="{slug}",
    version=1,
    problem="image-generation",
    title="TODO: its name",
    paper=Paper(title="TODO: the paper's title", year=2026, arxiv=None),
    objective="{slug}_loss",
    equations={{"{slug}_loss": "TODO: L = 1/2 mean (x - sg(x - (mu_fake - mu_real)))^2"}},
    hyperparameters={{
        "generator_rate": Real(0.3, gt=0, note="times the track's learning rate"),
        "fake_rate": Real(1.0, gt=0, note="times the track's learning rate"),
        "fake_updates": Integer(2, ge=1, note="fake-score steps per generator step"),
        "initial_share": Real(0.2, gt=0, lt=1, note="part of the budget for the initialisation, where weights cannot be copied"),
    }},
    claims=[Beats("teacher_one_step")],
)


def {slug}_loss(generated: Tensor, real_denoised: Tensor, fake_denoised: Tensor) -> Tensor:
    """TODO: the equation, where it stands, and each argument's shape.   Returns one value per sample (B,)."""
    return row_mean((generated - (generated - (fake_denoised - real_denoised)).detach()) ** 2) / 2


def distill(
    problem: ImageGeneration, run: Run, *, generator_rate: float, fake_rate: float, fake_updates: int, initial_share: float
) -> Student:
    """TODO: the paper's algorithm box. Here: a generator and the fake score that follows it, in turn."""
    game = Matching(problem, run, initial_share=initial_share)

    def loss(batch: Batch) -> Losses:
        generated = game.generate(batch)
        noisy, sigma = game.perturb(generated.detach())
        return run.loss({slug}={slug}_loss(generated, *game.denoised(noisy, sigma, batch.labels)))

    return game.train(loss, generator_rate=generator_rate, fake_rate=fake_rate, fake_updates=fake_updates, beta1=0.0)
'''

LANGUAGE = '''"""TODO: one line on the idea."""

from __future__ import annotations

from bench.card import Beats, Card, Paper, Real
from bench.problems.language_modeling import LanguageModeling
from bench.run import Losses, Run
from bench.student import Student
from bench.texts import TokenBatch

CARD = Card(
    slug="{slug}",
    version=1,
    problem="language-modeling",
    title="TODO: its name",
    paper=Paper(title="TODO: the paper's title", year=2026, arxiv=None),
    equations={{"distill": "TODO: L = (1/N) sum over response tokens KL(p || q)"}},
    hyperparameters={{"on_policy": Real(0.5, ge=0, le=1, note="chance that a batch holds the student's own responses")}},
    claims=[Beats("seqkd")],
)


def distill(problem: LanguageModeling, run: Run, *, on_policy: float) -> Student:
    """TODO: the paper's algorithm box. Here: forward KL on the student's own responses as they are now, or on the teacher's."""

    def loss(batch: TokenBatch) -> Losses:
        return run.loss({slug}=batch.per_example(problem.divergence(batch, "forward_kl")))

    return run.fit(problem.student, loss, problem.sampled(run, problem.student, fraction=on_policy))
'''

GENERIC = '''"""TODO: one line on the idea."""

from __future__ import annotations

from typing import Any

from bench.card import Card, Paper
from bench.run import Run
from bench.student import Student

CARD = Card(
    slug="{slug}",
    version=1,
    problem="{problem}",
    title="TODO: its name",
    paper=Paper(title="TODO: the paper's title", year=2026, arxiv=None),
    equations={{"distill": "TODO: the objective"}},
)


def distill(problem: Any, run: Run) -> Student:
    """TODO: train problem.student, for example with run.fit or run.loop. As it stands, the untrained student is handed back."""
    return run.export(problem.student)
'''

SUITE = '''"""TODO: one line on what this suite judges."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from bench.card import Budget, Metric, Setting, SuiteCard, Training
from bench.data import Arrays, Shuffled
from bench.nets import Architecture, Marginalized
from bench.oracle import ClassifierOracle
from bench.problems.classification import Classification
from bench.record import Measurement, derive_seed
from bench.student import Student, tensor_digest

CARD = SuiteCard(
    slug="{slug}",
    version=1,
    problem="classification",
    title="TODO: its name",
    metrics=[Metric(name="top1", unit="fraction", better="higher", range=(0, 1), meaning="share classified right")],
    primary="top1",
    controls=["scratch", "pseudo_label", "teacher", "shuffled_teacher"],
    settings={{
        "line": Setting(
            tier="analytic",
            summary="TODO: two overlapping Gaussian classes on a line; replace it by your data",
            budget=Budget(student_examples=6400),
            training=Training(batch_size=64, optimizer="adamw", learning_rate=0.01, schedule="cosine"),
        ),
    }},
)


class Line(nn.Module):
    """A linear classifier.   forward: (B, 1) -> (B, 2)."""

    head_name = "head"
    stage_names = ("head",)

    def __init__(self, outputs: int = 2) -> None:
        super().__init__()
        self.head = nn.Linear(1, outputs)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits (B, outputs)."""
        logits: torch.Tensor = self.head(inputs)
        return logits


def build(architecture: Architecture, seed: int) -> nn.Module:
    """The network an Architecture names, freshly initialised from ``seed`` and tagged for export."""
    groups = int(architecture.arguments.get("groups", 1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = Line(2 * groups)
        net: nn.Module = Marginalized(body, groups) if groups > 1 else body
    net.architecture = architecture  # type: ignore[assignment]
    return net


def draw(count: int, seed: int) -> Arrays:
    """TODO: your data. Classes 0 and 1 at -1 and +1 with unit variance."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator)
    inputs = torch.randn(count, 1, generator=generator) + 2.0 * labels[:, None] - 1.0
    return Arrays(inputs, labels, torch.arange(count) < 20, tensor_digest({{"inputs": inputs}}))


def teacher() -> nn.Module:
    """TODO: your teacher. Here the exact posterior: log p(1|x) - log p(0|x) = 2x."""
    net = build(Architecture("line"), 0)
    net.load_state_dict({{"head.weight": torch.tensor([[-1.0], [1.0]]), "head.bias": torch.zeros(2)}})
    return net.eval()


def problem(
    name: str, setting: Setting, seeds: Mapping[str, int], *, split: str = "test", data: Path | None = None, cache: Path | None = None
) -> Classification:
    """What a method gets: never the split it is judged on."""
    train, net, size = draw(512, seeds["data"]), teacher(), setting.training.batch_size
    with torch.no_grad():
        decided = torch.where(train.labelled, train.labels, net(train.inputs).argmax(1))
    train = Arrays(train.inputs, decided, train.labelled, train.digest)
    rows = torch.arange(len(train))
    return Classification(
        setting=name,
        student=build(Architecture("line"), seeds["init"]),
        build=lambda a: build(a, seeds["init"]),
        classes=2,
        teacher=ClassifierOracle(net, train, cache),
        batches=Shuffled(train, rows, size, seeds["order"]),
        labelled=Shuffled(train, rows[train.labelled], size, seeds["order"]),
        train=train,
    )


def rebuild(student: Student) -> nn.Module:
    """The network of an exported student, in evaluation mode."""
    net = build(student.architecture, 0)
    net.load_state_dict(student.weights)
    return net.eval()


def evaluate(
    student: Student, name: str, setting: Setting, seeds: Mapping[str, int], *, split: str = "test", data: Path | None = None
) -> list[Measurement]:
    """Judge plain weights on a split that no problem contains."""
    examples = draw(2000, derive_seed(f"{slug} {{split}}", 0))
    with torch.no_grad():
        right = rebuild(student)(examples.inputs).argmax(1) == examples.labels
    return [Measurement.mean("top1", right.float().tolist())]
'''


def write_method(slug: str, problem: str, folder: Path) -> Path:
    """Write ``<folder>/<slug>.py``. Raises UserError for a bad slug, an unknown problem, or a file that is there."""
    known = {e.card.problem for e in registry.suites().values() if e.card is not None}
    if problem not in known:
        raise unknown("kind of problem", problem, known)
    text = {"classification": CLASSIFICATION, "image-generation": GENERATION, "language-modeling": LANGUAGE}.get(problem, GENERIC)
    return _write(folder / f"{slug}.py", slug, text.format(slug=slug, problem=problem))


def write_suite(slug: str, folder: Path) -> Path:
    """Write ``<folder>/<slug with underscores>/__init__.py``. Raises UserError for a bad slug or a file that is there."""
    return _write(folder / slug.replace("-", "_") / "__init__.py", slug, SUITE.format(slug=slug))


def _write(path: Path, slug: str, text: str) -> Path:
    if not SLUG.fullmatch(slug):
        raise UserError(f"the slug {slug!r} must be lower-case letters, digits, '-' or '_', beginning with a letter")
    if path.exists():
        raise UserError(f"{path}: is there already; choose another slug or folder")
    write_atomic(path, text.encode())
    return path
