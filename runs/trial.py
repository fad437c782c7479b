"""What is of the user's own is tried before anything is trained, removed or decoded."""

import contextlib

import torch

import models
from models import generator
from runs.files import Failure

IMAGES = 8  # in the batch that is tried


def try_loss(hook, classes, temperature, alpha, machine):
    """Calls the loss in a Hook as training on `machine` does, on drawn logits in float32; raises Failure, with what is
    wrong, unless it returns a finite scalar with a finite gradient for the student's logits."""
    if isinstance(hook.loaded, torch.nn.Module) and any(each.requires_grad for each in hook.loaded.parameters()):
        raise Failure(f"{hook} has parameters of its own, which would not be trained.")
    draws = generator("trial")
    student, teacher = (3 * torch.randn(IMAGES, classes, generator=draws).to(machine.device) for _ in range(2))
    student.requires_grad_()
    labels = torch.arange(IMAGES, device=machine.device) % classes
    called = "(student_logits, labels, teacher_logits, temperature, alpha)"
    losses = []
    with hook.explained(f"fails on {IMAGES} images and {classes} classes, called with {called}"):
        for _ in range(2):
            given = student.clone(), labels.clone(), teacher - teacher.amax(1, keepdim=True), temperature, alpha
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                losses.append(hook.loaded(*given))
    loss = losses[0]
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
    if not torch.isclose(loss, losses[1], rtol=1e-4):
        raise Failure(
            f"{hook} returns {loss.item():.6g} and then {losses[1].item():.6g} for the same logits. It must not "
            "remember earlier calls: one run's would change the next run, and a run that is resumed would differ."
        )


def try_network(hook, role, classes, image_size, machine):
    """Builds the network of a Hook for a "teacher" or "student", and takes one step of training without the optimizer,
    on drawn images, on `machine` and in its precision; raises Failure, with what is wrong, unless it can be trained,
    saved and loaded. Returns what to say of it, else None."""
    with hook.explained(f"fails for {classes} classes"):
        network, again, other = (models.build(hook.loaded, role, classes, seed) for seed in (0, 0, 1))
    own = network.network
    if not isinstance(own, torch.nn.Module):
        raise Failure(f"{hook} returns {type(own).__name__}, but a network is a torch.nn.Module.")
    for name, each in (*own.named_parameters(), *own.named_buffers()):
        if torch.nn.parameter.is_lazy(each):
            raise Failure(
                f"{hook}: '{name}' has no size before the first image. Give the layer its sizes: a Linear, say, "
                "instead of a LazyLinear."
            )
    state = network.state_dict()
    odd = [name for name, each in state.items() if not isinstance(each, torch.Tensor)]
    odd += [name for name, each in state.items() if name not in odd and each.dtype in (torch.float16, torch.bfloat16)]
    if odd:
        raise Failure(f"{hook}: '{odd[0].removeprefix('network.')}' of its state_dict is not a tensor of float32.")
    if not any(each.requires_grad for each in own.parameters()):
        raise Failure(f"{hook} has no parameter that is trained.")
    if models.digest(state) != models.digest(again.state_dict()):
        raise Failure(
            f"{hook} begins with other weights each time: draw them from PyTorch's generator, as its own layers do."
        )
    is_always_the_same = models.digest(state) == models.digest(other.state_dict())
    images = torch.randn(IMAGES, 3, image_size, image_size, generator=generator("trial"))
    images = images.to(**machine.place)
    with hook.explained(f"fails on a batch of {IMAGES} images of {image_size}x{image_size}"):
        network.to(**machine.place)
        with machine.autocast():
            logits = network.train()(images)
        with torch.no_grad():
            single = network.eval()(images[:1])  # in float32, as it is evaluated
    for found, count in ((logits, IMAGES), (single, 1)):
        shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        if shape != (count, classes):
            raise Failure(
                f"{hook} gives {shape} for {count} images, but logits of {classes} classes are {count, classes}."
            )
    if not logits.isfinite().all():
        raise Failure(f"{hook} gives logits that are not finite for drawn images.")
    if not logits.requires_grad:
        raise Failure(f"{hook} gives logits without a gradient.")
    with hook.explained("fails where its gradient is computed"):
        labels = torch.arange(IMAGES, device=machine.device) % classes
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()
    for name, each in own.state_dict().items():
        if not each.isfinite().all():
            raise Failure(
                f"{hook}: '{name}' of its state_dict is not finite, which would be taken for a training that diverged. "
                "Keep a constant such as a mask out of it: register_buffer(name, tensor, persistent=False)."
            )
    count = models.inference_batch(machine.device, image_size)
    with hook.explained(f"fails on {count} images of {image_size}x{image_size} at once, as it is evaluated"):
        many = torch.zeros(count, 3, image_size, image_size).to(**machine.place)
        models.predict(network, [many], contextlib.nullcontext())
        if role == "teacher":  # which is asked in the precision of the training
            models.predict(network, [many], machine.autocast())
    if is_always_the_same:
        return (
            f"{hook} begins with the same weights whatever the seed (it loads them, or calls torch.manual_seed): an "
            "interval over seeds does not cover other ones"
        )
    return None
