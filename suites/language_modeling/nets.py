"""Networks of the analytic settings, and how any student of language modelling is rebuilt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distillbench.errors import UserError
from distillbench.problems.language_modeling import models as language_models
from distillbench.problems.language_modeling.models import LanguageModel
from distillbench.training import student as students
from distillbench.training.nets import Architecture
from distillbench.training.student import Student


def contexts(ids: Tensor, attention: Tensor, order: int, before: Tensor | None = None) -> Tensor:
    """The last ``order`` tokens at every position, (B, T, order), oldest first; token 0 stands for what is padding or before the text.

    ``before``: (B, order - 1), what preceded ``ids``.
    """
    seen = ids.where(attention, 0)
    before = seen.new_zeros(len(seen), order - 1) if before is None else before
    return torch.cat([before, seen], 1).unfold(1, order, 1)


class Windowed(LanguageModel):
    """A model that sees the last ``order`` tokens only. Token 0 is the end of sequence, and stands for what is before the text."""

    order: int

    def of_contexts(self, context: Tensor) -> Tensor:
        """States (..., D) of contexts (..., order)."""
        raise NotImplementedError

    def forward(self, ids: Tensor, attention: Tensor) -> Tensor:
        """States (B, T, D)."""
        return self.of_contexts(contexts(ids, attention, self.order))

    def decode(self, ids: Tensor, attention: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """As :meth:`LanguageModel.decode`; the cache is the last tokens (B, order - 1)."""
        newest = attention[:, -ids.shape[1] :]
        seen = contexts(ids, newest, self.order, cache)
        return self.of_contexts(seen), seen[:, -1, 1:]


class Chain(Windowed):
    """A Markov chain with exact distributions.

    log_law: (V ** order, V), a row of log-probabilities for each context, oldest token first; saved students hold it under this name.
    """

    def __init__(self, vocab: int, order: int) -> None:
        super().__init__()
        self.vocab, self.order = vocab, order
        self.log_law = nn.Parameter(torch.zeros(vocab**order, vocab))

    def of_contexts(self, context: Tensor) -> Tensor:
        """One-hot contexts (..., V ** order): the state of a chain is the context itself."""
        index = torch.zeros_like(context[..., 0])
        for i in range(self.order):
            index = index * self.vocab + context[..., i]
        return nn.functional.one_hot(index, self.vocab**self.order).to(self.log_law.dtype)

    @property
    def head(self) -> tuple[Tensor, Tensor | None]:
        """The table: row v holds log P(v | context)."""
        return self.log_law.T, None


class WindowLM(Windowed):
    """A neural n-gram model (Bengio et al. 2003): the embeddings of the last ``order`` tokens, one hidden layer, ``width`` features.

    Its logits have rank ``width``, which is what it lacks beside a chain.
    """

    def __init__(self, vocab: int, order: int, width: int, hidden: int = 32) -> None:
        super().__init__()
        self.order = order
        self.embedding = nn.Embedding(vocab, hidden)
        self.mix = nn.Sequential(nn.Linear(order * hidden, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.output = nn.Linear(width, vocab)

    def of_contexts(self, context: Tensor) -> Tensor:
        """Features (..., width)."""
        features: Tensor = self.mix(self.embedding(context).flatten(-2))
        return features

    @property
    def head(self) -> tuple[Tensor, Tensor | None]:
        """The output layer."""
        return self.output.weight, self.output.bias


NETS: dict[str, type[LanguageModel]] = {"chain": Chain, "window-lm": WindowLM}


def build(architecture: Architecture, seed: int) -> LanguageModel:
    """The network an :class:`Architecture` names, with fresh weights from ``seed``.

    Raises:
        UserError: an unknown name, or arguments it cannot be built from.
    """
    if architecture.name == "transformers":
        return language_models.build(architecture, seed)
    if architecture.name not in NETS:
        raise UserError(f"unknown architecture {architecture.name!r}; known: transformers, {', '.join(sorted(NETS))}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the GPUs, whose state is not put back
        net = NETS[architecture.name](**architecture.arguments)
    net.architecture = architecture  # type: ignore[assignment]
    return net


def rebuild(student: Student) -> LanguageModel:
    """As :func:`distillbench.training.student.rebuild`."""
    return students.rebuild(student, build)
