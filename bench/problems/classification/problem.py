"""Classification: images or vectors with one of C classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distillbench.errors import NotApplicable
from distillbench.problems.classification.examples import EXAMPLES
from distillbench.problems.classification.oracle import ClassifierOracle
from distillbench.training.data import Arrays, Batch, Batches
from distillbench.training.examples import Input
from distillbench.training.nets import Outputs, outputs_of
from distillbench.training.problem import Problem
from distillbench.training.trees import Tree


@dataclass(frozen=True)
class Classification(Problem):
    """A classifier to distil.

    Attributes:
        classes: C.
        teacher: answers with logits, embeddings and feature maps.
        batches: all training examples. Where an example's label was not observed, ``batch.labels`` holds the teacher's
            decision and ``batch.labelled`` is False, so every method sees the same labels.
        labelled: the examples with an observed label only (what ``scratch`` may use).
        tune: a validation split (never the reported one) for methods that choose something, or None.
        train: the training set in memory, or None where it is streamed from disk.
        once: where it is streamed, one pass over it without augmentation, in batches of the given size.
    """

    classes: int
    teacher: ClassifierOracle
    batches: Batches[Batch]
    labelled: Batches[Batch]
    tune: Arrays | None = None
    train: Arrays | None = None
    once: Callable[[int], Iterator[Batch]] | None = None

    @classmethod
    def examples(cls) -> Mapping[str, Input]:
        """See :mod:`.examples`."""
        return EXAMPLES

    def call(self) -> tuple[Tree, ...] | None:
        """One input."""
        return (next(self.batches.stream(0)).inputs[:1],)

    def outputs(self, student: nn.Module, inputs: Tensor) -> Outputs:
        """One forward pass of ``student`` with its embedding and stages."""
        return outputs_of(student, inputs)

    def one_pass(self, size: int = 256) -> Iterator[Batch]:
        """Every training example once, without augmentation, for class means, centroids and other statistics.

        Raises:
            NotApplicable: the setting offers no such pass.
        """
        if self.train is not None:
            for rows in torch.arange(len(self.train)).split(size):
                yield self.train.take(rows)
        elif self.once is not None:
            yield from self.once(size)
        else:
            raise NotApplicable(f"setting {self.setting!r} offers no pass over its training set; this method needs statistics of all of it")
