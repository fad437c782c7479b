"""What is of the user's own is tried before anything is trained or removed; of students, before images are decoded."""

import contextlib
import copy

import torch

import models
from models import generator
from runs.files import Failure
from runs.streams import stream

IMAGES = 8  # in the batch that is tried
STEP = 0.01  # the learning rate of a step that is tried
SAME, CLOSE = 1e-4, 1e-2  # by what share of the largest logit answers may differ: computed alike on a CPU, or else


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
    losses, tensors = [], (student, labels, teacher - teacher.amax(1, keepdim=True))
    for _ in range(2):
        given = [each.clone() for each in tensors]
        what = f"fails on {IMAGES} images and {classes} classes, called with {called}"
        with hook.explained(what), stream("trial"):
            losses.append(hook.loaded(*given, temperature, alpha))
        for name, before, after in zip(("student_logits", "labels"), tensors, given, strict=False):
            if not torch.equal(before, after):
                raise Failure(f"{hook} changes {name}, which are used after it. Let it compute with copies.")
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
            "remember earlier calls, nor draw from other than the global generators of PyTorch, NumPy and Python: one "
            "run's would change the next run, and a run that is resumed would differ."
        )


def take_step(hook, network, logits, classes):
    """Takes a small step of training with the gradient of the `logits` (B, classes); raises Failure where it fails."""
    if not logits.requires_grad:
        raise Failure(f"{hook} gives logits without a gradient.")
    with hook.explained("fails where its gradient is computed"):
        labels = torch.arange(len(logits), device=logits.device) % classes
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()
    with hook.explained("has parameters that torch.optim.SGD refuses"):
        torch.optim.SGD([each for each in network.parameters() if each.requires_grad], STEP).step()


def check_state(hook, network, loaded, images, trained):
    """Raises Failure unless a `network` of a Hook answers by its state_dict alone, for each of the `images` (B, 3, S,
    S) apart, and, if it is `trained`, in training, too. `loaded` is another with the same state_dict; both change."""

    same = SAME if images.device.type == "cpu" else CLOSE

    def differ(one, other, share=same):
        return (one - other).abs().max() > share * max(one.abs().max(), other.abs().max())

    with torch.no_grad(), hook.explained(f"fails on {len(images)} images when it is called again"):
        # Of copies, as in training: a network may normalize its images in place.
        answers = [each(images.clone()) for each in (network.eval(), network, loaded.eval())]
        alone = torch.cat([network(image.clone()) for image in images.split(1)])
        steps = []
        for turn in range(4 if trained else 0):  # of what is drawn at random, once may be the same
            for each in (network.train(), loaded.train()):
                with stream("trial", turn):
                    steps.append(each(images.clone()))
    if differ(*answers[:2]):
        raise Failure(f"{hook} answers otherwise when it is asked again, in eval(): dropout that is never off, say.")
    if differ(answers[0], alone, CLOSE):
        raise Failure(
            f"{hook} answers otherwise for an image alone than for the same image among others, in eval(): batch norm "
            "without running statistics, say."
        )
    if differ(answers[1], answers[2]) or any(differ(*pair) for pair in zip(steps[::2], steps[1::2], strict=True)):
        raise Failure(
            f"{hook}: after a step of training, a second one with the same state_dict gives other logits. What it "
            "remembers of earlier batches must be in its state_dict (register_buffer), and what it draws must come "
            "from the global generators of PyTorch, NumPy and Python: else a model that is loaded answers otherwise, "
            "and a run that is resumed differs."
        )


def try_network(hook, role, classes, image_size, machine, trained=True):
    """Builds the network of a Hook for a "teacher" or "student", and takes one small step of training on drawn images,
    on `machine` and in its precision; raises Failure, with what is wrong, unless it can be trained, saved and loaded;
    if it is not going to be `trained`, without that step. Returns what to say of it, else None."""
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
    deep = [name for name, each in state.items() if isinstance(each, torch.Tensor) and each.ndim > 4]
    if deep:
        name = deep[0].removeprefix("network.")
        raise Failure(
            f"{hook}: '{name}' of its state_dict has more than four dimensions, for which there is no channels_last."
        )
    odd = [name for name, each in state.items() if not isinstance(each, torch.Tensor)]
    odd += [name for name, each in state.items() if name not in odd and each.dtype in (torch.float16, torch.bfloat16)]
    if odd:
        raise Failure(f"{hook}: '{odd[0].removeprefix('network.')}' of its state_dict is not a tensor of float32.")
    if trained and not any(each.requires_grad for each in own.parameters()):
        raise Failure(f"{hook} has no parameter that is trained.")
    if models.digest(state) != models.digest(again.state_dict()):
        raise Failure(
            f"{hook} begins with other weights each time: draw them from the global generator of PyTorch, NumPy or "
            "Python, as PyTorch's layers do."
        )
    is_always_the_same = models.digest(state) == models.digest(other.state_dict())
    images = torch.randn(IMAGES, 3, image_size, image_size, generator=generator("trial"))
    images = images.to(**machine.place)
    with hook.explained(f"fails on a batch of {IMAGES} images of {image_size}x{image_size}"):
        network.to(**machine.place)
        with machine.autocast():
            logits = network.train(bool(trained))(images.clone())
        with torch.no_grad():
            single = network.eval()(images[:1].clone())  # in float32, as it is evaluated
    for found, count in ((logits, IMAGES), (single, 1)):
        shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        if shape != (count, classes):
            raise Failure(
                f"{hook} gives {shape} for {count} images, but logits of {classes} classes are {count, classes}."
            )
    if not logits.isfinite().all():
        raise Failure(f"{hook} gives logits that are not finite for drawn images.")
    if trained:
        take_step(hook, own, logits, classes)
    for name, each in own.state_dict().items():
        if not each.isfinite().all():
            raise Failure(
                f"{hook}: '{name}' of its state_dict is not finite, which would be taken for a training that diverged. "
                "Keep a constant such as a mask out of it: register_buffer(name, tensor, persistent=False)."
            )
    with hook.explained("cannot be saved and loaded"):
        again.load_state_dict(copy.deepcopy(network.state_dict()))
    again.to(**machine.place)
    check_state(hook, network, again, images, trained)
    count = models.inference_batch(machine.device, image_size)
    with hook.explained(f"fails on {count} images of {image_size}x{image_size} at once, as it is evaluated"):
        many = torch.zeros(count, 3, image_size, image_size).to(**machine.place)
        models.predict(network, [many], contextlib.nullcontext())
        if role == "teacher":  # which is asked in the precision of the training
            models.predict(network, [many], machine.autocast())
    if trained and is_always_the_same:
        return (
            f"{hook} begins with the same weights whatever the seed (it loads them, or calls torch.manual_seed): an "
            "interval over seeds does not cover other ones"
        )
    return None
