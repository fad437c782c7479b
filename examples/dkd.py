"""Decoupled knowledge distillation (Zhao et al., arXiv 2203.08679): --loss examples/dkd.py:dkd

The KL of plain distillation is split into that of the target class against all others (TCKD) and that among the others
(NCKD), which plain distillation weighs down where the teacher is sure. At alpha 0.9 this is a tenth of the paper's
loss, cross-entropy + T^2 (1 TCKD + 8 NCKD), so that its learning rates and its warm-up do not carry over.
"""

import torch
import torch.nn.functional as F

# The paper's alpha and beta, brought to a sum of 1. Its authors choose beta for each pair of networks: 2 (ResNet-56 and
# -20), 6, mostly 8.
TARGET, OTHERS = 1 / 9, 8 / 9


def dkd(student_logits, labels, teacher_logits, temperature, alpha):
    """Logits (B, classes), labels (B,), logits (B, classes) -> a scalar."""
    target = F.one_hot(labels, student_logits.shape[1])

    def parts(logits):  # log-probabilities: target or not (B, 2); of the others among themselves (B, classes)
        logs = F.log_softmax(logits / temperature, dim=1)
        others = logs - 1000 * target
        return torch.stack(((logs * target).sum(1), others.logsumexp(1)), 1), others.log_softmax(1)

    pairs = zip(parts(student_logits), parts(teacher_logits), strict=True)
    tckd, nckd = (F.kl_div(one, other, reduction="batchmean", log_target=True) for one, other in pairs)
    soft = temperature**2 * (TARGET * tckd + OTHERS * nckd)
    return alpha * soft + (1 - alpha) * F.cross_entropy(student_logits, labels)
