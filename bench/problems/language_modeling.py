"""Language modelling: a causal language model, to be distilled into a smaller one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.data import epoch_order
from bench.generation import respond
from bench.language_models import LanguageModel
from bench.language_oracle import LanguageOracle, chosen_log_probs
from bench.problems.base import Problem
from bench.record import derive_seed
from bench.run import Run
from bench.texts import Prompts, TextBatches, Texts, TokenBatch
from bench.token_losses import Projection, Teacher, token_losses


@dataclass(frozen=True)
class LanguageModeling(Problem):
    """A language model to distil.

    ``student(ids, attention)`` gives states; :meth:`divergence` and :meth:`nll` compare what its projection makes of them, so that
    no (tokens, vocabulary) tensor is kept. Every method answers the same pool of prompts in the same order, on-policy ones too.

    Attributes:
        teacher: laws of next tokens, states, responses; metered.
        prompts: the pool.  references: responses that the data carry, to some of the prompts (what ``scratch`` may use).
        validation: references to prompts outside the pool and outside the judged split, for methods that watch a loss.
        vocab: entries that are no padding, the same for student and teacher.  eos: end of sequence.
        length: tokens of a response at most.  samples: responses a prompt in the teacher's text.
        batch_size, order: of every stream; the seed of its shuffling.
    """

    student: LanguageModel
    teacher: LanguageOracle
    prompts: Prompts
    references: Texts
    validation: Texts
    vocab: int
    eos: int
    length: int
    samples: int
    batch_size: int
    order: int

    # --- what to train on ---------------------------------------------------------------------------------------

    @property
    def data(self) -> TextBatches:
        """The references."""
        return TextBatches(self.references, self.batch_size, self.order)

    def teacher_text(self, *, temperature: float = 1.0, top_p: float = 1.0) -> TextBatches:
        """The teacher's own responses to the pool, generated once for all methods and seeds."""
        texts = self.teacher.responses(self.prompts, samples=self.samples, length=self.length, temperature=temperature, top_p=top_p)
        return TextBatches(texts, self.batch_size, self.order)

    def sampled(
        self, run: Run, model: LanguageModel, *, fraction: float = 1.0, temperature: float = 1.0, top_p: float = 1.0, share: float = 0.0
    ) -> Sampled:
        """Responses of ``model`` as it is now, one batch an update; with chance 1 - ``fraction`` a batch of the teacher's text instead.

        Both answer the same prompts at the same step. ``share`` of every next-token law is the teacher's (MiniLLM).
        """
        return Sampled(self, run, model, fraction, temperature, top_p, share)

    # --- losses ---------------------------------------------------------------------------------------------------

    def divergence(
        self,
        batch: TokenBatch,
        mix: str | Mapping[str, float] = "forward_kl",
        *,
        teacher: Teacher | None = None,
        student: LanguageModel | None = None,
        temperature: float = 1.0,
        beta: float = 0.5,
        alpha: float = 0.1,
    ) -> Tensor:
        """A divergence of :mod:`bench.token_losses` at each of the N tokens that count, (N,) nats; ``teacher`` defaults to its law."""
        model = self.student if student is None else student
        law = self.teacher.law(batch) if teacher is None else teacher
        states = batch.predicted.take(model(batch.ids, batch.attention))
        weight, bias = model.head
        return token_losses(states, weight, law, mix, bias=bias, temperature=temperature, beta=beta, alpha=alpha, vocab=self.vocab)

    def compare(self, states: Tensor, theirs: Tensor, mix: str, *, alpha: float = 0.1) -> Tensor:
        """The same for n tokens of one's choice, of which student and teacher have the states (n, D) and (n, D'): (n,) nats."""
        (weight, bias), law = self.student.head, Projection(theirs, *self.teacher.module.head)
        return token_losses(states, weight, law, mix, bias=bias, alpha=alpha, vocab=self.vocab)

    def nll(self, batch: TokenBatch, student: LanguageModel | None = None) -> Tensor:
        """-log q of each of the N tokens that count, (N,) nats."""
        model = self.student if student is None else student
        states = batch.predicted.take(model(batch.ids, batch.attention))
        return -chosen_log_probs(model, states, batch.predicted.labels, vocab=self.vocab)


@dataclass(frozen=True)
class Sampled:
    """Batches of fresh responses, a pure function of (seed, step, weights): see :meth:`LanguageModeling.sampled`."""

    problem: LanguageModeling
    run: Run
    model: LanguageModel
    fraction: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    share: float = 0.0

    @property
    def batch_size(self) -> int:
        """As that of the teacher's text."""
        return min(self.problem.batch_size, self.problem.samples * len(self.problem.prompts))

    def stream(self, start: int) -> Iterator[TokenBatch]:
        """Batches from step ``start`` on, each made when it is asked for."""
        fixed = self.problem.teacher_text().stream(start) if self.fraction < 1 else None
        prompts = prompt_order(self.problem, start)
        for step in itertools.count(start):
            index = next(prompts)
            ready = None if fixed is None else next(fixed)
            generator = torch.Generator().manual_seed(derive_seed(f"sampling {step}", self.run.seeds["noise"]))
            if bool(torch.rand(1, generator=generator) < self.fraction):
                yield self.fresh(index, generator)
            else:
                assert ready is not None
                yield ready

    def fresh(self, index: Tensor, generator: torch.Generator) -> TokenBatch:
        """Responses to the prompts of ``index`` (B,), sampled now."""
        return TokenBatch.fresh(self.problem.prompts, index, *self.responses(index, generator))

    def responses(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The same as tokens (B, R) and which of them are real (B, R), without the prompts."""
        problem = self.problem
        uniforms = torch.rand(len(index), problem.length, generator=generator)
        other = problem.teacher.module if self.share else None
        ids, real = respond(
            self.model,
            problem.prompts.take(index),
            uniforms,
            eos=problem.eos,
            temperature=self.temperature,
            top_p=self.top_p,
            vocab=problem.vocab,
            other=other,
            share=self.share,
        )
        problem.teacher.meter.add("generated_tokens", int(real.sum()))
        return ids, real


def prompt_order(problem: LanguageModeling, start: int) -> Iterator[Tensor]:
    """The prompts (B,) of every step from ``start`` on: those that :meth:`LanguageModeling.teacher_text` has at that step."""
    rows = torch.arange(problem.samples * len(problem.prompts))
    size = min(problem.batch_size, len(rows))
    epoch, place = divmod(start, len(rows) // size)
    while True:
        order = epoch_order(rows, problem.order, epoch) % len(problem.prompts)
        for begin in range(place * size, len(order) - size + 1, size):
            yield order[begin : begin + size]
        epoch, place = epoch + 1, 0
