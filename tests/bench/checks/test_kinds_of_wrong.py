"""Kinds of subtly wrong methods, each in several disguises: every one is caught by the check that is meant for its kind.

A plant is one change or a few in the text of a method that is right; only the check that is meant is run, so that nothing is caught by
the accident of a score. Comparisons with a method's oracle are in :mod:`test_objectives`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from distillbench.checks import check_method
from tests.bench.checks.planted import ASK, BODY, CE, FIT, KD, LOSS, ORACLE, STUDENT, TERM, Change, write

pytestmark = pytest.mark.slow  # a second or two each, and many

MODULE = "problem.teacher._module"
LEARNER: Change = ("from distillbench.training.run import Losses, Run", "from distillbench.training.run import Learner, Losses, Run")
RUN = "def distill(problem: Classification, run: Run, *, temperature: float) -> Student:\n"
COUNTED = (LOSS, f"    calls = []\n\n{LOSS}        calls.append(1)\n")
LOOP = "    player = Learner(problem.student, loss{more})\n    run.loop([player], problem.batches)\n"
TAUGHT = "kl_divergence(student, teacher, temperature=temperature)"
SHIFTED = ("theirs = batch.predicted.take(problem.teacher.states(batch))", "theirs = batch.predicted.take(problem.teacher.states(batch)){}")


def late(line: str, after: int = 100) -> list[Change]:
    """``line`` at the beginning of every loss from call ``after`` on."""
    return [(LOSS, f"    calls = []\n\n{LOSS}        calls.append(1)\n        if len(calls) > {after}:\n            {line}\n")]


CLASSIFIERS: dict[str, dict[str, tuple[str, list[Change], str]]] = {
    "reversed KL": {
        "student first": ("oracle_value", [(TERM, "(student.exp() * (student - teacher)).sum(1)")], "differs from its oracle"),
        "without an oracle": ("direction", [(TERM, "(student.exp() * (student - teacher)).sum(1)")], "from the student's distribution"),
        "arguments exchanged": (
            "arguments",
            [(KD, "kd=divergence(teacher, student, temperature=temperature),")],
            "are arguments exchanged",
        ),
        "past the objective": (
            "used",
            [
                (
                    KD,
                    "kd=16 * F.kl_div(F.log_softmax(teacher / 4, 1), F.log_softmax(student / 4, 1), "
                    "reduction='none', log_target=True).sum(1),",
                )
            ],
            "what is checked is not what trains",
        ),
    },
    "T^2 lost": {
        "on a term of its own": (
            "temperature_scale",
            [(KD, f"{KD}\n            soft=(F.softmax(teacher / temperature, 1) * -F.log_softmax(student / temperature, 1)).sum(1),")],
            "the term 'soft'",
        ),
        "by tempering before": (
            "temperature_scale",
            [(KD, f"{KD}\n            more=divergence(student / temperature, teacher / temperature, temperature=1.0),")],
            "the term 'more'",
        ),
        "divided out where it is weighed": ("temperature_scale", [(KD, KD.replace("kd=", "kd=temperature**-2 * "))], "the term 'kd'"),
    },
    "the wrong class": {
        "left out by its number": (
            "class_order",
            [(TERM, "(teacher.exp() * (teacher - student))[:, 1:].sum(1)")],
            "left out by its number",
        ),
        "weighed by its number": (
            "class_order",
            [(TERM, "(torch.arange(teacher.shape[1]).ne(2) * teacher.exp() * (teacher - student)).sum(1)")],
            "left out by its number",
        ),
    },
    "a hidden reduction": {
        "over classes": ("class_padding", [(TERM, f"{TERM} / student.shape[1]")], "a mean over classes"),
        "over the batch, per row": ("per_example", [(BODY, f"{BODY}.mean().expand(len(student))")], "changes with the rest of the batch"),
        "over the batch, in the loss": ("micro_batches", [(KD, KD.replace("kd=", "kd=64 / len(batch) * "))], "3 micro-batches"),
    },
    "a teacher in train mode": {
        "from the second half on": (
            "teacher_intact",
            [(LOSS, f"{LOSS}        {MODULE}.train(run.progress >= 0.5)\n")],
            "train mode",
        ),
        "from step 100 on, and back": (
            "teacher_intact",
            late(f"{MODULE}.train()({'batch.inputs'}); {MODULE}.eval()"),
            "answered in train mode",
        ),
        "a copy of it": (
            "teacher_intact",
            [
                (LOSS, f"    mine = copy.deepcopy({MODULE})\n\n{LOSS}"),
                (ASK, "        mine.train(run.progress >= 0.5)\n        teacher = mine(batch.inputs)\n"),
            ],
            "a copy of it that nothing trains answered in train mode",
        ),
        "its trainable copy, with a graph": (
            "teacher_intact",
            [(LOSS, f"    mine = problem.teacher.trainable_copy().eval()\n\n{LOSS}"), (ASK, "        teacher = mine(batch.inputs)\n")],
            "a copy of it that nothing trains was asked with gradients on",
        ),
        "its trainable copy": (
            "teacher_intact",
            [(LOSS, f"    mine = problem.teacher.trainable_copy()\n\n{LOSS}"), (ASK, "        teacher = mine(batch.inputs)\n")],
            "a copy of it that nothing trains",
        ),
    },
    "a seed from the clock": {
        "from step 100 on": (
            "seeds",
            [
                ("import torch\n", "import time\n\nimport torch\n"),
                *late(
                    "batch = dataclasses.replace(batch, inputs=batch.inputs + torch.randn(batch.inputs.shape, "
                    "generator=torch.Generator().manual_seed(time.time_ns() % 2**31)) / 9)"
                ),
            ],
            "same seeds differ",
        ),
        "of the day": (
            "seeds",
            [
                ("import torch\n", "import time\n\nimport torch\n"),
                *late(
                    "batch = dataclasses.replace(batch, inputs=batch.inputs "
                    "+ float(np.random.default_rng(int(time.time() // 86400)).normal()) / 9)"
                ),
            ],
            "same seeds differ",
        ),
    },
    "a constant seed": {
        "of noise": (
            "seeds",
            [
                (
                    STUDENT,
                    STUDENT.replace(
                        "batch.inputs", "batch.inputs + torch.randn(batch.inputs.shape, generator=torch.Generator().manual_seed(7)) / 9"
                    ),
                )
            ],
            "a seed of its own",
        ),
        "of numpy's": (
            "seeds",
            [(STUDENT, STUDENT.replace("batch.inputs", "batch.inputs + float(np.random.default_rng(7).normal()) / 9"))],
            "a seed of its own",
        ),
        "of dropout": (
            "seeds",
            [(STUDENT, "        torch.manual_seed(3)\n        student = problem.student(F.dropout(batch.inputs, 0.1))\n")],
            "a seed of its own",
        ),
    },
    "changed in place": {
        "the batch": ("data_intact", [(STUDENT, f"        batch.inputs.mul_(1.01)\n{STUDENT}")], "batch's inputs in place"),
        "the labels of the batch, by numpy": (
            "data_intact",
            [(STUDENT, f"        batch.labels.numpy()[:2] = 0\n{STUDENT}")],
            "batch's labels in place",
        ),
        "the data set": ("data_intact", late("problem.train.inputs[:5] *= 1.1"), "the training changed problem."),
        "labels of the data set": ("data_intact", [(FIT, f"    problem.train.labels.data[3] = 0\n{FIT}")], "the training changed problem."),
        "the teacher's table": ("data_intact", late("problem.teacher._tables['logits'].mul_(1.01)"), "the table of logits"),
    },
    "kept from one training to the next": {
        "rows in the module": (
            "teacher_matters",
            [
                (RUN, f"KEPT: dict[int, Tensor] = {{}}\n\n\n{RUN}"),
                (ASK, f"{ASK}        teacher = torch.stack([KEPT.setdefault(int(i), t) for i, t in zip(batch.index, teacher)])\n"),
            ],
            "kept in the module",
        ),
        "a cache of a function": (
            "no_memory",
            [
                (RUN, f"@functools.cache\ndef weight(name: str) -> list[float]:\n    return [1.0]\n\n\n{RUN}"),
                ("import torch\n", "import functools\n\nimport torch\n"),
                (STUDENT, f"{STUDENT}        weight('kd')[0] *= 0.9\n"),
                (KD, KD.replace("kd=", "kd=weight('kd')[0] * ")),
            ],
            "depends on those",
        ),
        "a default of an argument": (
            "no_memory",
            [
                (LOSS, LOSS.replace("    def", "    def").replace("batch: Batch", "batch: Batch")),
                (RUN, f"def scale(seen: list[int] = []) -> float:\n    seen.append(1)\n    return 1 / len(seen)\n\n\n{RUN}"),
                (KD, KD.replace("kd=", "kd=scale() * ")),
            ],
            "depends on those",
        ),
    },
    "kept by number": {
        "a table of the data set": (
            "fresh_answers",
            [
                (LOSS, f"    table = problem.teacher.logits(problem.train.take(torch.arange(1000)))\n\n{LOSS}"),
                (ASK, "        teacher = table[batch.index]\n"),
            ],
            "problem.train is None",
        ),
        "a table of a pass": (
            "fresh_answers",
            [
                (
                    LOSS,
                    "    table = torch.zeros(1000, 5)\n    for part in problem.one_pass():\n"
                    "        table[part.index] = problem.teacher.logits(part)\n\n" + LOSS,
                ),
                (ASK, "        teacher = table[batch.index]\n"),
            ],
            "kept by its number",
        ),
        "the first answer in the loop": (
            "fresh_answers",
            [
                (LOSS, f"    kept: dict[int, Tensor] = {{}}\n\n{LOSS}"),
                (ASK, f"{ASK}        teacher = torch.stack([kept.setdefault(int(i), t) for i, t in zip(batch.index, teacher)])\n"),
            ],
            "given to all later ones",
        ),
    },
    "rows that are kept out": {
        "labels of the tune split": (
            "splits",
            [(CE, "ce=cross_entropy(student, problem.tune.labels[batch.index]),")],
            "it learns on them",
        ),
        "the tune split beside the batch": (
            "splits",
            [
                (STUDENT, f"        more = problem.student(problem.tune.inputs[: len(batch)])\n{STUDENT}"),
                (CE, f"{CE}\n            more=cross_entropy(more, problem.tune.labels[: len(batch)]),"),
            ],
            "problem.tune",
        ),
        "the tune split for the batches": (
            "splits",
            [(FIT, FIT.replace("problem.batches", "dataclasses.replace(problem.batches, data=problem.tune)"))],
            "problem.tune",
        ),
    },
    "memory grows": {
        "logits with their graph": (
            "memory",
            [(LOSS, f"    kept = []\n\n{LOSS}"), (STUDENT, f"{STUDENT}        kept.append(student)\n")],
            "memory grows",
        ),
        "one tensor that grows": (
            "memory",
            [
                (LOSS, f"    kept = [torch.zeros(0)]\n\n{LOSS}"),
                (STUDENT, f"{STUDENT}        kept[0] = torch.cat([kept[0], student.detach().flatten()])\n"),
            ],
            "bytes more",
        ),
        "a sum that keeps every graph": (
            "memory",
            [(LOSS, f"    kept = [0.0]\n\n{LOSS}"), (STUDENT, f"{STUDENT}        kept[0] = kept[0] + student.mean()\n")],
            "memory grows",
        ),
    },
    "an average that is none": {
        "never updated": (
            "averages",
            [
                LEARNER,
                (
                    FIT,
                    f"    mean = copy.deepcopy(problem.student)\n{LOOP.format(more='')}    return run.export(mean, averaged='ema 0.99')\n",
                ),
            ],
            "never updated",
        ),
        "a copy of the last weights": (
            "averages",
            [LEARNER, (FIT, f"{LOOP.format(more='')}    return run.export(copy.deepcopy(problem.student), averaged=True)\n")],
            "weights of one moment",
        ),
        "updated in the first half alone": (
            "averages",
            [
                LEARNER,
                (
                    FIT,
                    "    mean = copy.deepcopy(problem.student)\n\n    def follow(_: object) -> None:\n        if run.progress < 0.5:\n"
                    "            with torch.no_grad():\n"
                    "                for a, b in zip(mean.parameters(), problem.student.parameters()):\n"
                    "                    a.lerp_(b, 0.01)\n\n"
                    + LOOP.format(more=", after=follow")
                    + "    return run.export(mean, averaged='ema 0.99')\n",
                ),
            ],
            "is it stale",
        ),
        "whose follower was let go": (
            "averages",
            [
                LEARNER,
                (
                    FIT,
                    "    player = Learner(problem.student, loss, ema=0.99)\n    player.after = lambda _: player._followers.clear()\n"
                    "    run.loop([player], problem.batches)\n    return run.export(player.average, averaged=True)\n",
                ),
            ],
            "from what its decay gives",
        ),
        "from before the last loop": (
            "averages",
            [
                LEARNER,
                (
                    FIT,
                    "    player = Learner(problem.student, loss, ema=0.99)\n    run.loop([player], problem.batches, share=0.5)\n"
                    "    mean = copy.deepcopy(player.average)\n"
                    "    run.loop([player], problem.batches)\n    return run.export(mean, averaged='ema 0.99')\n",
                ),
            ],
            "is it stale",
        ),
    },
    "a teacher that does not count": {
        "never asked": ("teacher_matters", [(ASK, ""), (KD, "kd=0.5 * cross_entropy(student, batch.labels),")], "never asked"),
        "asked for its decision alone": (
            "used",
            [(KD, "kd=cross_entropy(student, teacher.argmax(1)),")],
            "what is checked is not what trains",
        ),
        "asked and ignored": ("teacher_matters", [(KD, "kd=divergence(student, teacher * 0, temperature=temperature),")], "change nothing"),
        "its table overwritten by the labels": (
            "teacher_matters",
            [(KD, "kd=divergence(student, 9 * F.one_hot(batch.labels, 5).float(), temperature=temperature),")],
            "change nothing",
        ),
    },
    "a term of no weight": {
        "by whole numbers": ("terms", [(KD, KD.replace("kd=", "kd=(9 // 10) * "))], "the term 'kd' teaches nothing"),
        "by a schedule that never rises": (
            "terms",
            [(KD, KD.replace("kd=", "kd=max(0.0, run.progress - 1) * "))],
            "the term 'kd' teaches nothing",
        ),
        "by a student that is detached": ("terms", [(KD, KD.replace("(student", "(student.detach()"))], "the term 'kd' teaches nothing"),
    },
    "labels of others": {
        "the teacher's decision for the label": (
            "arguments",
            [
                ("teacher_logits: Tensor, *", "teacher_logits: Tensor, labels: Tensor, *"),
                (KD, "kd=divergence(student, teacher, teacher.argmin(1), temperature=temperature),"),
            ],
            "other labels than the batch's",
        ),
        "a suite's": (
            "imports",
            [("import torch\n", "import torch\nfrom distillbench.suites.image_classification import blobs\n")],
            "distillbench.suites",
        ),
        "a data package's, in a function": (
            "imports",
            [(LOSS, f"    from sklearn.datasets import load_digits\n\n{LOSS}")],
            "sklearn.datasets",
        ),
        "a data package's, by name": ("imports", [(LOSS, f"    __import__('sklearn.' + 'datasets')\n\n{LOSS}")], "sklearn.datasets"),
    },
    "hidden updates": {
        "an optimizer of its own": (
            "updates",
            [
                (
                    FIT,
                    "    own = torch.optim.SGD(problem.student.parameters(), lr=0.01)\n"
                    "    cross_entropy(problem.student(problem.train.inputs), problem.train.labels).mean().backward()\n"
                    f"    own.step()\n{FIT}",
                )
            ],
            "SGD made 1 steps",
        ),
        "by hand before the loop": (
            "updates",
            [(FIT, f"    problem.student.head.bias.data.add_(0.1)\n{FIT}")],
            "student before its first loop",
        ),
        "in the loss": ("updates", late("problem.student.head.bias.data.mul_(0.99)"), "while its loss is computed"),
        "after an update": (
            "updates",
            [(FIT, FIT.replace("problem.batches", "problem.batches, after=lambda _: problem.student.head.bias.data.mul_(0.99)"))],
            "after the optimizer's step",
        ),
    },
}
PLANTS = [(kind, disguise) for kind, found in CLASSIFIERS.items() for disguise in found]


@pytest.mark.parametrize(("kind", "disguise"), PLANTS)
def test_a_wrong_classifier(tmp_path: Path, kind: str, disguise: str) -> None:
    check, changes, message = CLASSIFIERS[kind][disguise]
    [result] = [r for r in check_method(write(tmp_path, *changes, oracle=ORACLE), only=[check]) if r.name == check]
    assert result.outcome == "failed", result
    assert message in result.message


@pytest.mark.parametrize("check", sorted({check for found in CLASSIFIERS.values() for check, *_ in found.values()}))
def test_the_method_that_is_changed_is_right(tmp_path: Path, check: str) -> None:
    [result] = check_method(write(tmp_path, oracle=ORACLE), only=[check])[:1]
    assert result.outcome in ("passed", "skipped"), result
