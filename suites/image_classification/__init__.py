"""Image classification: the judge (accuracy, likelihood, calibration, agreement) and its four kinds of setting."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from distillbench.cards.card import Metric, Setting, SuiteCard
from distillbench.cards.reading import read_settings
from distillbench.cards.worlds import Worlds
from distillbench.runs.suite import Context, JudgeContext, Judgement, Suite, TrainContext

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distillbench.problems.classification.problem import Classification
    from distillbench.training.student import Student

CARD = SuiteCard(
    slug="image-classification",
    version=1,
    problem="classification",
    title="Image classification",
    summary="One frozen classifier, one small student, one budget: how much of the teacher does each method carry over?",
    metrics=[
        Metric(name="top1", unit="fraction", better="higher", range=(0, 1), meaning="fraction of the split's images classified right"),
        Metric(name="nll", unit="nats", better="lower", range=(0, None), meaning="mean negative log-likelihood of the true class"),
        Metric(name="ece", unit="fraction", better="lower", range=(0, 1), meaning="expected calibration error, 15 equal-width bins"),
        Metric(
            name="agreement",
            unit="fraction",
            better="higher",
            range=(0, 1),
            meaning="fraction of images on which student and teacher decide alike",
        ),
    ],
    primary="top1",
    controls=["scratch", "pseudo_label", "teacher", "shuffled_teacher"],
    floor="scratch",
    ceiling="teacher",
    strongest=["scratch", "pseudo_label", "shuffled_teacher"],
    settings=read_settings(__file__),
)

# Options that make a fingerprint small (see distillbench.checks.fingerprints): the arithmetic is the same, on fewer examples.
FINGERPRINT = {"blobs": {"tune": 200, "test": 1000}, "digits": {"transfer": 300}, "digits-tiny": {"transfer": 300}}


class World(Protocol):
    """The functions of a world's module."""

    def problem(self, ctx: TrainContext) -> Classification:
        """What a method gets."""
        ...

    def teacher(self, ctx: Context) -> nn.Module:
        """A teacher of the caller's own, in evaluation mode."""
        ...

    def evaluation_batches(self, ctx: JudgeContext) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs (B, ...) and labels (B,) of the split that is judged."""
        ...


WORLDS: Worlds[World] = Worlds(__name__, ("blobs", "digits", "published"))
OF_TIER = {"analytic": "blobs", "embedded": "digits", "paper": "published"}


def _world(setting: Setting) -> World:
    return WORLDS.named(OF_TIER.get(setting.tier, setting.tier))


class ImageClassification(Suite):
    """The judge of classifiers."""

    def problem(self, ctx: TrainContext) -> Classification:
        """As :meth:`Suite.problem`."""
        return _world(ctx.setting).problem(ctx)

    def rebuild(self, student: Student, ctx: Context) -> nn.Module:
        """As :meth:`Suite.rebuild`."""
        from distillbench.suites.image_classification.nets import rebuild

        return rebuild(student)

    def evaluate(self, student: Student, ctx: JudgeContext) -> Judgement:
        """top1, nll, ece and agreement with the teacher, with per-example values.

        Raises:
            UserError: the student cannot be rebuilt, or gives NaN.
        """
        import torch
        import torch.nn.functional as F
        from torchmetrics.functional.classification import multiclass_calibration_error

        from distillbench.errors import UserError
        from distillbench.runs.record import Measurement

        world = _world(ctx.setting)
        net, teacher = self.rebuild(student, ctx).to(ctx.device), world.teacher(ctx).to(ctx.device)
        logits, labels, decisions = [], [], []
        with torch.no_grad():
            for inputs, truth in world.evaluation_batches(ctx):
                logits.append(net(inputs.to(ctx.device)).float().cpu())
                decisions.append(teacher(inputs.to(ctx.device)).argmax(1).cpu())
                labels.append(truth)
        scores, truths, theirs = torch.cat(logits), torch.cat(labels), torch.cat(decisions)
        if not bool(torch.isfinite(scores).all()):
            raise UserError("the student's logits are not finite on the evaluation split")
        guess = scores.argmax(1)
        ece = multiclass_calibration_error(scores.softmax(1), truths, num_classes=scores.shape[1], n_bins=15)
        return Judgement(
            [
                Measurement.mean("top1", (guess == truths).float().tolist()),
                Measurement.mean("nll", F.cross_entropy(scores, truths, reduction="none").tolist()),
                Measurement("ece", float(ece), len(guess)),
                Measurement.mean("agreement", (guess == theirs).float().tolist()),
            ]
        )


SUITE = ImageClassification()
