"""DistiLLM: skewed divergences, and the student's own text from a replay buffer where its validation loss asks for it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from distillbench.cards.card import Beats, Card, Choice, Integer, Paper, Real
from distillbench.problems.language_modeling.mixed_texts import MixedBatch, beside
from distillbench.problems.language_modeling.oracle import chosen_log_probs
from distillbench.problems.language_modeling.oracle import token_divergence as token_divergence
from distillbench.problems.language_modeling.problem import LanguageModeling
from distillbench.problems.language_modeling.texts import TextBatches, TokenBatch
from distillbench.training.data import Batches, Request
from distillbench.training.reduction import Term
from distillbench.training.run import Losses, Run
from distillbench.training.student import Student

CARD = Card(
    slug="distillm",
    version=2,
    supersedes=1,
    problem="language-modeling",
    title="DistiLLM: skew divergences, adaptive off-policy",
    paper=Paper(
        title="DistiLLM: Towards Streamlined Distillation for Large Language Models",
        year=2024,
        arxiv="2402.03898",
        code="https://github.com/jongwooko/distillm/blob/d47e77ff9d27721783b32213be38c1204230cc0a/finetune.py",
        catalogue="distillm",
    ),
    objective="token_divergence",
    equations={
        "distill": "L = (1/N) sum over response tokens KL(p || alpha p + (1 - alpha) q)  or  KL(q || alpha q + (1 - alpha) p), "
        "+ lm_weight nll on the references",
        "fresh_chance": "a batch is sampled where u < phi g(step / steps), g = 1 - x, 1/2, x or 1; from the buffer if u < phi; else given",
        "raised": "phi rises by 0.1 to at most 1 where the validation loss is epsilon above the loss it is compared with",
    },
    hyperparameters={
        "divergence": Choice("skew_kl", options=["skew_kl", "skew_reverse_kl"], note="the authors' script has the first"),
        "alpha": Real(0.1, ge=0, le=1, note="skew; 0 is the plain KL"),
        "threshold": Real(0.0, ge=0, le=1, note="phi at the beginning"),
        "epsilon": Real(0.1, ge=0, note="nats per token that the validation loss must be above the one it is compared with"),
        "compared": Choice("first", options=["first", "best"], note="with which loss: see raised"),
        "interval": Real(0.1, gt=0, le=1, note="part of the run between validations; an epoch of 20 in the authors' script"),
        "replay": Choice(
            "decreasing", options=["decreasing", "constant", "increasing", "off"], note="chance of new text, see fresh_chance"
        ),
        "capacity": Integer(1000, ge=1, note="responses in the buffer"),
        "data": Choice("teacher", options=["teacher", "references"], note="what is given: the teacher's text, or the references"),
        "lm_weight": Real(0.0, ge=0, note="of the term on references, 1 on OpenWebText in the paper; above 0, half of every batch"),
    },
    claims=[
        Beats("scratch"),
        Beats("gkd", source="section 4: instruction following, in Rouge-L"),
        Beats("minillm", source="section 4: instruction following, in Rouge-L"),
    ],
    deviations=[
        "Given text is the teacher's, as for the other methods of a track; the paper's is the data's own responses (data=references).",
        "No pre-training corpus: the language-modelling term, on the references, is off by default.",
        "The validation loss is taken ten times per run instead of once per epoch. Its forward passes (the validation references, ten "
        "times) are not metered as student examples.",
        "The loss it is compared with moves only when phi rises, as in the authors' code; compared=best follows the lowest loss.",
        "Divergences are true ones: the authors' skew KL leaves the teacher's entropy out, with the same gradient. Every token of the "
        "whole batch weighs the same; the authors average each device's tokens.",
        "The paper's Rouge-L numbers are not on this card: they could not be read at the time of writing.",
    ],
    notes="On markov the validation loss only falls, so phi stays 0 and all text is given.",
)


def fresh_chance(phi: float, done: float, replay: str) -> float:
    """The chance that a batch is sampled anew once the buffer is full; ``done`` in [0, 1) of the run. Paper, section 3.2."""
    return phi * {"decreasing": 1 - done, "constant": 0.5, "increasing": done, "off": 1.0}[replay]


def raised(phi: float, before: float, loss: float, *, epsilon: float, compared: str) -> tuple[float, float]:
    """phi and the loss to compare with next, after a validation ``loss``.

    ``first``: as in the authors' code, the loss of the last rise (in the beginning that of the start). ``best``: the lowest since then.
    """
    if loss >= before + epsilon:
        return min(phi + 0.1, 1.0), loss
    return phi, min(before, loss) if compared == "best" else before


@dataclass(frozen=True)
class Adaptive(Batches[MixedBatch]):
    """Batches that are given, sampled now, or drawn from a buffer of responses sampled before. All that changes is in ``run.state``."""

    problem: LanguageModeling
    run: Run
    threshold: float
    epsilon: float
    compared: str
    interval: float
    replay: str
    capacity: int
    data: str
    references: bool
    batch_size: int = field(init=False)

    regular = False
    together = True  # the buffer is one for all rows

    def __post_init__(self) -> None:
        beside_them = self._references()
        object.__setattr__(self, "batch_size", self._given().batch_size + (beside_them.batch_size if beside_them else 0))

    def rows(self, position: int) -> Tensor:
        """Places in the batch."""
        return torch.arange(self.batch_size)

    def take(self, request: Request) -> MixedBatch:
        """The batch of a position; the validation loss is asked for before the first batch of each interval."""
        given, beside_them, state = self._given(), self._references(), self.run.state
        if "phi" not in state:
            state.update(phi=self.threshold, compare=self._validation(), validated=0)
        while self.run.progress + 1e-9 >= (state["validated"] + 1) * self.interval:
            state["validated"] += 1
            found = raised(state["phi"], state["compare"], self._validation(), epsilon=self.epsilon, compared=self.compared)
            state["phi"], state["compare"] = found
        index = self.problem.prompt_rows(request.position, given.batch_size)
        u, phi = request.coin("whose text"), state["phi"]
        missing = self.replay == "off" or len(state.get("index", ())) < max(self.capacity, len(index))
        if u < fresh_chance(phi, self.run.progress, self.replay) or (u < phi and missing):
            batch = self._sampled(index, request.uniform((len(request), self.problem.length), "responses")[: len(index)])
        elif u < phi:
            batch = self._again(torch.randperm(len(state["index"]), generator=request.generator("replayed"))[: len(index)])
        else:
            batch = given.texts.take(given.rows(request.position))
        return beside(batch, beside_them.texts.take(beside_them.rows(request.position)) if beside_them else None)

    def _given(self) -> TextBatches:
        size = max(1, self.problem.batch_size // 2) if self.references else self.problem.batch_size
        problem = replace(self.problem, batch_size=size)
        return problem.teacher_text() if self.data == "teacher" else problem.data

    def _references(self) -> TextBatches | None:
        return replace(self.problem, batch_size=max(1, self.problem.batch_size // 2)).data if self.references else None

    def _sampled(self, index: Tensor, uniforms: Tensor) -> TokenBatch:
        """Responses of the student as it is now, which also go into the buffer; the oldest leave it."""
        state, problem = self.run.state, self.problem
        ids, real = problem.sampled(self.run, problem.student).responses(index, uniforms)
        if self.replay != "off":
            space = (0, problem.length - ids.shape[1])
            for name, new in {"index": index, "ids": F.pad(ids, space), "real": F.pad(real, space)}.items():
                state[name] = torch.cat([state[name], new] if name in state else [new])[-self.capacity :]
        return TokenBatch.fresh(problem.prompts, index, ids, real)

    def _again(self, rows: Tensor) -> TokenBatch:
        """Rows of the buffer."""
        state = self.run.state
        return TokenBatch.fresh(self.problem.prompts, state["index"][rows], state["ids"][rows], state["real"][rows])

    def _validation(self) -> float:
        """-log q of the validation references, nats per token."""
        problem, total, tokens = self.problem, 0.0, 0
        was = problem.student.training
        problem.student.eval()
        with torch.no_grad():
            for rows in torch.arange(len(problem.validation)).split(problem.batch_size):
                values = problem.nll(problem.validation.take(rows).to(self.run.device))
                total, tokens = total + float(values.double().sum()), tokens + len(values)
        problem.student.train(was)
        return total / max(1, tokens)


def distill(
    problem: LanguageModeling,
    run: Run,
    *,
    divergence: str,
    alpha: float,
    threshold: float,
    epsilon: float,
    compared: str,
    interval: float,
    replay: str,
    capacity: int,
    data: str,
    lm_weight: float,
) -> Student:
    """A skewed divergence on text that is given, sampled or replayed; phi, the chance of the student's own, follows the validation loss."""
    batches = Adaptive(problem, run, threshold, epsilon, compared, interval, replay, capacity, data, lm_weight > 0)

    def loss(batch: MixedBatch) -> Losses:
        own, labels = batch.own_tokens, batch.predicted.labels
        states = batch.predicted.take(problem.student(batch.ids, batch.attention))
        theirs = batch.predicted.take(problem.teacher.states(batch))
        terms: dict[str, Term] = {"distillm": (problem.compare(states[own], theirs[own], divergence, alpha=alpha), "own")}
        if lm_weight:
            nll = -chosen_log_probs(problem.student, states[~own], labels[~own], vocab=problem.vocab)
            terms["nll"] = (lm_weight * nll, "beside")
        return run.loss(batch, **terms)

    return run.fit(problem.student, loss, batches)
