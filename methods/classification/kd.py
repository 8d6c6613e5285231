"""Knowledge distillation (Hinton et al. 2015): soft targets at a temperature beside the hard labels."""

from __future__ import annotations

from distillbench.cards.card import Beats, Card, Paper, Real, Reported
from distillbench.problems.classification.losses import cross_entropy, kl_divergence
from distillbench.problems.classification.problem import Classification
from distillbench.training.data import Batch
from distillbench.training.run import Losses, Run
from distillbench.training.student import Student

CARD = Card(
    slug="kd",
    version=1,
    problem="classification",
    title="Knowledge distillation",
    paper=Paper(
        title="Distilling the Knowledge in a Neural Network",
        year=2015,
        arxiv="1503.02531",
        code="https://github.com/HobbitLong/RepDistiller/blob/b84f547/distiller_zoo/KD.py",
    ),
    objective="kl_divergence",
    equations={"kl_divergence": "L_kd = T^2 sum_c p_t (log p_t - log p_s),  p = softmax(z/T);   L = w_ce CE(y, softmax(z_s)) + w_kd L_kd"},
    hyperparameters={
        "temperature": Real(4.0, gt=0),
        "ce_weight": Real(0.1, ge=0),
        "kd_weight": Real(0.9, ge=0),
    },
    claims=[
        Beats("scratch", source="the paper's claim"),
        Reported(
            suite="image-classification",
            setting="cifar100",
            metric="top1",
            value=0.7333,
            source="CRD benchmark table, ResNet32x4 to ResNet8x4",
        ),
        Reported(
            suite="image-classification", setting="cifar100-resnet56-resnet20", metric="top1", value=0.7066, source="RepDistiller's README"
        ),
        Reported(
            suite="image-classification", setting="cifar100-resnet110-resnet20", metric="top1", value=0.7067, source="RepDistiller's README"
        ),
        Reported(
            suite="image-classification", setting="cifar100-resnet110-resnet32", metric="top1", value=0.7308, source="RepDistiller's README"
        ),
        Reported(
            suite="image-classification", setting="cifar100-wrn_40_2-wrn_16_2", metric="top1", value=0.7492, source="RepDistiller's README"
        ),
        Reported(
            suite="image-classification", setting="cifar100-wrn_40_2-wrn_40_1", metric="top1", value=0.7354, source="RepDistiller's README"
        ),
        Reported(suite="image-classification", setting="cifar100-vgg13-vgg8", metric="top1", value=0.7298, source="RepDistiller's README"),
        Reported(
            suite="image-classification", setting="cifar100-vgg13-MobileNetV2", metric="top1", value=0.6737, source="RepDistiller's README"
        ),
        Reported(
            suite="image-classification",
            setting="cifar100-ResNet50-MobileNetV2",
            metric="top1",
            value=0.6735,
            source="RepDistiller's README",
        ),
        Reported(
            suite="image-classification", setting="cifar100-ResNet50-vgg8", metric="top1", value=0.7381, source="RepDistiller's README"
        ),
        Reported(
            suite="image-classification",
            setting="cifar100-resnet32x4-ShuffleV1",
            metric="top1",
            value=0.7407,
            source="RepDistiller's README",
        ),
        Reported(
            suite="image-classification",
            setting="cifar100-resnet32x4-ShuffleV2",
            metric="top1",
            value=0.7445,
            source="RepDistiller's README",
        ),
        Reported(
            suite="image-classification", setting="cifar100-wrn_40_2-ShuffleV1", metric="top1", value=0.7483, source="RepDistiller's README"
        ),
    ],
    deviations=[
        "The 2015 text states the soft term as a cross-entropy; the divergence differs by the teacher's entropy, and has the same gradient."
    ],
)


def distill(problem: Classification, run: Run, *, temperature: float, ce_weight: float, kd_weight: float) -> Student:
    """One optimizer, two terms."""

    def loss(batch: Batch) -> Losses:
        teacher = problem.teacher.logits(batch)
        student = problem.student(batch.inputs)
        return run.loss(
            batch,
            ce=ce_weight * cross_entropy(student, batch.labels),
            kd=kd_weight * kl_divergence(student, teacher, temperature=temperature),
        )

    return run.fit(problem.student, loss, problem.batches)
