"""A small run for tests of the loop: a linear map of 40 examples."""

import torch
from torch import nn

from distillbench.cards.card import Budget, Training
from distillbench.problems.classification.losses import cross_entropy
from distillbench.training.data import Arrays, Shuffled
from distillbench.training.nets import Architecture
from distillbench.training.run import Run
from distillbench.training.student import tensor_digest

SEEDS = {"noise": 1, "order": 2, "init": 3}
SGD = Training(batch_size=8, optimizer="sgd", learning_rate=0.1)


class Killed(BaseException):
    """Stands for kill -9: nothing after it runs."""


def linear(inputs=3, outputs=2, seed=0):
    torch.manual_seed(seed)
    net = nn.Linear(inputs, outputs)
    net.architecture = Architecture("linear", {"inputs": inputs, "outputs": outputs})
    return net


def examples(count=40, inputs=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, inputs, generator=generator)
    labels = torch.randint(2, (count,), generator=generator)
    return Arrays(rows, labels, torch.ones(count, dtype=torch.bool), tensor_digest({"rows": rows}))


def batches(size=8, data=None):
    data = data or examples()
    return Shuffled(data, torch.arange(len(data)), size, seed=5)


def make(budget=80, training=SGD, **options):
    caps = budget if isinstance(budget, Budget) else Budget(student_examples=budget)
    return Run(seeds=SEEDS, budget=caps, training=training, **options)


def fit(run, net, data=None, loss=None, **options):
    data = data or batches()
    return run.fit(net, loss or (lambda b: run.loss(b, ce=cross_entropy(net(b.inputs), b.labels))), data, **options)
