"""What objectives of classification take."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from distillbench.training.examples import PADDING, Draw, Input, columns, far, labels, like, widened

WIDTH = 7  # of an embedding
SURE = 1e4  # a logit of a very confident network


def _logits(d: Draw) -> Tensor:
    return 2 * d.normal(d.rows, d.classes)


def _more_rows(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_zeros(PADDING, *x.shape[1:])])


EXAMPLES: Mapping[str, Input] = {
    # (B, C) before softmax: the student's, those of a head or a teacher that is trained along, and the teacher's
    **{
        name: Input(
            _logits,
            pads=(widened(-SURE),),
            renamed=columns,
            extremes=(far(SURE), far(SURE)),
            of="student" if name == "student_logits" else "",
        )
        for name in ("student_logits", "auxiliary_logits", "logits")
    },
    "teacher_logits": Input(
        _logits,
        "frozen",
        match=like("student_logits", "auxiliary_logits"),
        pads=(widened(-SURE),),
        renamed=columns,
        extremes=(far(SURE), far(SURE, -1)),
        of="teacher",
    ),
    # (B, C, S), the teacher's view of the subclasses of each class
    "subclass_logits": Input(lambda d: 2 * d.normal(d.rows, d.classes, 2), "frozen", renamed=columns, extremes=(far(SURE), far(SURE, -1))),
    # (B, C) probabilities to learn
    "target": Input(
        lambda d: _logits(d).softmax(1),
        "frozen",
        match=like("student_logits", change=lambda z: z.softmax(1)),
        pads=(widened(0.0),),
        renamed=columns,
    ),
    # (B,) int64
    "labels": Input(lambda d: d.integers(d.rows, high=d.classes), "given", renamed=labels),
    # (B, D), the input of the last layer, and (B, K, H, W), a stage
    "student_embedding": Input(lambda d: d.normal(d.rows, WIDTH), of="student"),
    "teacher_embedding": Input(lambda d: d.normal(d.rows, WIDTH), "frozen", match=like("student_embedding"), of="teacher"),
    "student_feature": Input(lambda d: d.normal(d.rows, 3, 4, 4), of="student"),
    "teacher_feature": Input(lambda d: d.normal(d.rows, 3, 4, 4), "frozen", match=like("student_feature"), of="teacher"),
    # of the teacher, by class: mean embeddings (C, D), mean probabilities (C, C)
    "class_means": Input(lambda d: d.normal(d.classes, WIDTH), "frozen", rows=False, pads=(_more_rows,), renamed=lambda x, order: x[order]),
    "centroids": Input(
        lambda d: d.normal(d.classes, d.classes).softmax(1),
        "frozen",
        rows=False,
        pads=(lambda x: widened(0.0)(_more_rows(x)),),
        renamed=lambda x, order: x[order][:, order],
    ),
}
