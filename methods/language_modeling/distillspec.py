"""DistillSpec (Zhou et al. 2023): the draft of speculative decoding is distilled, on text and by a divergence chosen for the task."""

from __future__ import annotations

from bench.card import Beats, Card, Choice, Paper, Real
from bench.problems.language_modeling import LanguageModeling
from bench.run import Losses, Run
from bench.student import Student
from bench.texts import TokenBatch

CARD = Card(
    slug="distillspec",
    version=1,
    problem="language-modeling",
    title="Distillation of the draft of speculative decoding",
    paper=Paper(
        title="DistillSpec: Improving Speculative Decoding via Knowledge Distillation",
        year=2023,
        arxiv="2310.08461",
        catalogue="distillspec",
        row=79,
    ),
    equations={
        "distill": "L = E_{y ~ G} (1/|y|) sum over t of D(p_t || q_t);  "
        "forward_kl KL(p||q), reverse_kl KL(q||p), js (KL(p||m) + KL(q||m)) / 2 with m = (p + q) / 2, tv sum |p - q| / 2 = 1 - acceptance"
    },
    hyperparameters={
        "divergence": Choice(
            "js",
            options=["forward_kl", "reverse_kl", "js", "tv"],
            note="D; the paper finds the best to depend on task and decoding",
        ),
        "data": Choice(
            "student",
            options=["references", "teacher", "student", "mixed"],
            note="G; student is the paper's on-policy text, mixed is half teacher, half student",
        ),
        "temperature": Real(1.0, gt=0, note="of the sampling of responses, the paper's 1"),
        "reduction": Choice("token", options=["token", "sequence"], note="what weighs the same; the paper's is sequence"),
    },
    claims=[
        Beats("undistilled", metric="acceptance", source="abstract: 10 to 45% faster than with the same draft before distillation"),
        Beats("scratch", metric="acceptance", source="the draft that was fine-tuned on the references is where the paper starts"),
        Beats("seqkd", metric="acceptance", source="the paper's comparison of data policies"),
    ],
    deviations=[
        "The draft starts from the track's initial weights; the paper first fine-tunes it on the references.",
        "Every token weighs the same, as in the acceptance that is judged; the paper takes the mean over each response first "
        "(reduction sequence).",
        "mixed draws whole batches, and its given half is sampled from the teacher; ImitKD, one of the paper's mixes, takes references.",
        "No code of the authors was found.",
    ],
    results="markov, mean +- sd of 3 seeds (undistilled, scratch, seqkd): acceptance 0.705 +- 0.009 (0.442, 0.592, 0.607), "
    "kl 0.493 +- 0.003 (1.055, 0.645, 0.551). The divergence was chosen on the tune split, acceptance of 2 seeds on own text: js 0.692, "
    "forward_kl 0.680, tv 0.645. There own text was the worst of the four kinds for js (teacher 0.710, mixed 0.708, references 0.708), "
    "against the paper; it is the default because it is the paper's. tv is stuck where it starts badly, reverse_kl is the worst. "
    "With the teacher's text, 3 seeds of the test split: 0.719.",
)


def distill(problem: LanguageModeling, run: Run, *, divergence: str, data: str, temperature: float, reduction: str) -> Student:
    """A token divergence between target and draft on responses of the policy; no gradient flows through the sampling."""

    def loss(batch: TokenBatch) -> Losses:
        reduced = batch.per_sequence if reduction == "sequence" else batch.per_example
        return run.loss(distillspec=reduced(problem.divergence(batch, divergence)))

    if data == "references":
        return run.fit(problem.student, loss, problem.data)
    if data == "teacher":
        return run.fit(problem.student, loss, problem.teacher_text(temperature=temperature))
    fraction = 0.5 if data == "mixed" else 1.0
    return run.fit(problem.student, loss, problem.sampled(run, problem.student, fraction=fraction, temperature=temperature))
