"""Soft targets without the teacher's ranking of the classes: --loss examples/without_ranking.py:without_ranking

Is it that ranking which a student learns from? Of each image the teacher's softened probability of its first choice is
kept, and what is left of 1 is spread evenly over the other classes. So the student still learns how sure the teacher is
of each image, and which class it takes it for (Tang et al., arXiv 2002.03532, take soft targets apart like this).
"""

import math

import torch.nn.functional as F

from distill import distillation_loss


def without_ranking(student_logits, labels, teacher_logits, temperature, alpha):
    """Logits (B, classes), labels (B,), logits (B, classes) -> a scalar."""
    logs = F.log_softmax(teacher_logits / temperature, dim=1)
    first, choice = logs.max(1, keepdim=True)
    others = logs.scatter(1, choice, -math.inf).logsumexp(1, keepdim=True) - math.log(logs.shape[1] - 1)
    even = others.expand_as(logs).scatter(1, choice, first)
    return distillation_loss(student_logits, labels, temperature * even, temperature, alpha)
