"""A loss of the user's own is tried before anything is trained, removed or decoded."""

import torch

from models import generator
from runs.files import Failure

IMAGES = 8  # in the batch that is tried


def try_loss(hook, classes, temperature, alpha):
    """Calls the loss in a Hook as training does, on drawn logits on the CPU; raises Failure, with what is wrong,
    unless it returns a finite scalar with a finite gradient for the student's logits."""
    draws = generator("trial")
    student, teacher = (3 * torch.randn(IMAGES, classes, generator=draws) for _ in range(2))
    student.requires_grad_()
    labels = torch.arange(IMAGES) % classes
    with hook.explained(f"fails on a batch of {IMAGES} images and {classes} classes"):
        loss = hook.loaded(student, labels, teacher - teacher.amax(1, keepdim=True), temperature, alpha)
    if not isinstance(loss, torch.Tensor):
        raise Failure(f"{hook} returns {type(loss).__name__}, but a loss is a scalar tensor.")
    if loss.ndim:
        raise Failure(f"{hook} returns a tensor of shape {tuple(loss.shape)}, but a loss is a scalar: take its mean.")
    if not loss.requires_grad:
        raise Failure(f"{hook} returns a loss without a gradient for student_logits.")
    with hook.explained("fails where its gradient is computed"):
        loss.backward()
    gradient = student.grad
    if gradient is None or not gradient.any():
        raise Failure(f"{hook} returns a loss without a gradient for student_logits.")
    if not loss.isfinite() or not gradient.isfinite().all():
        raise Failure(f"{hook} is not finite on a batch of drawn logits: {loss.item()}, or its gradient is not.")
