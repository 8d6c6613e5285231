"""GLNN's divergence from its equation, in numpy."""

import numpy as np
from scipy.special import log_softmax


def glnn_loss(student_logits, teacher_logits):
    student, teacher = (log_softmax(z, axis=1) for z in (student_logits, teacher_logits))
    return (np.exp(teacher) * (teacher - student)).sum(1)
