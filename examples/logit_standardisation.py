"""Logit standardisation (Sun et al., arXiv 2403.01427): --loss examples/logit_standardisation.py:standardised

Each image's logits are brought to mean 0 and standard deviation 1 before they are softened, so that the student need
not be as sure as the teacher, only rank and space the classes alike. `temperature` is the paper's base temperature, 2,
and its weights 9 (KL times T^2) and 0.1 (cross-entropy) are those of --temperature 2 --alpha 0.989.
"""

import torch.nn.functional as F


def standardised(student_logits, labels, teacher_logits, temperature, alpha):
    """Logits (B, classes), labels (B,), logits (B, classes) -> a scalar."""

    def soften(logits):
        z_scores = (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7)
        return F.log_softmax(z_scores / temperature, dim=1)

    student, teacher = soften(student_logits), soften(teacher_logits)
    soft = temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return alpha * soft + (1 - alpha) * F.cross_entropy(student_logits, labels)
