"""How near a student comes to its teacher, right or wrong: the same class, and the KL from teacher to student.

A student may be as accurate as its teacher and yet answer otherwise (Stanton et al., "Does knowledge distillation
really work?", arXiv 2106.05945), so both are told beside the accuracy.
"""

import numpy as np

from reports.statistics import kl_divergence


def fidelity(teacher_logits, logits, temperature):
    """What comparison.json says of students whose test `logits` are a list of (N, classes): in nats, one a seed."""
    return {
        "kl_from_teacher": [kl_divergence(teacher_logits, each) for each in logits],
        "kl_from_teacher_softened": [kl_divergence(teacher_logits, each, temperature) for each in logits],
    }


def rows(comparison):
    """The rows of the printed table: means over the seeds."""
    found = [("Fidelity to the teacher", "agreement", "KL, T = 1", "KL at its T")]
    for name, entry in comparison.students:
        keys = ("agreement_with_teacher", "kl_from_teacher", "kl_from_teacher_softened")
        found.append((name, *(f"{np.mean(entry[key]):.4f}" for key in keys)))
    return found


def where(comparison):
    """What the table means, in words."""
    temperature = comparison.kd[0]["temperature"]
    return (
        "KL: from teacher to student in nats, without T^2, mean over test images; its T: what it was distilled at,\n"
        f"for the baseline {temperature:g}"
    )
