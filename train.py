"""One training loop for all three networks: the teacher, the distilled student and its baseline.

Everything random is a function of the run's settings and the epoch, so a run that was interrupted anywhere and started
again ends with the same bits. What keeps a run safe (its folder, its state, signals) is behind `Progress`, in runs/.
"""

import functools
import itertools
from contextlib import nullcontext

import torch
import torch.nn.functional as F

import models
from data import JoinedViews, Views, split, unlabeled_views
from distill import UNLABELED, distillation_loss, omitted_bias
from models import generator, inference_batch, predict
from runs.graphs import Recorded, recorded_network, side_by_side
from runs.progress import Progress
from runs.streams import start_stream

# Of the optimizer, for each kind of parameter: its learning rate as a share of the run's, and its momentum.
CONVOLUTIONS, HEAD, BIASES = (0.3, 0.6), (1.0, 0.85), (30.0, 0.85)
CLIPPED = 0.1  # the norm of all biases' gradients at most: labels give about 0.06, soft targets 0.2 to 0.6
WARM_UP = 0.05  # of the steps of a network of the user's own: plain SGD at its highest rate from the start may diverge
WHITENED = 2_000  # training images to which the whitening is fitted; of those larger than 64x64 as many pixels
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Muon's quintic iteration, from its source
ITERATIONS = 3
TOGETHER = 4  # A GPU makes the views of so many inference batches at a time.


def train_one_epoch(model, optimizer, views, labels, order, soft_targets, criterion, progress):
    """Trains `model` on the images `order` (a tensor of indices, batch after batch), or on what is left of them after a
    resume, and sets the learning rate before each step.

    `views` are data.Views, `progress` is a runs.progress.Progress; `labels` are (N,) and `soft_targets` the teacher's
    logits (N, classes) for this epoch's `views`, or None for a network without a teacher. `criterion` is
    distillation_loss, or a loss of the user's own that is called like it.
    """
    settings, epoch = progress.settings, progress.epoch
    for batch, images in with_views(progress.batches(order), views, epoch, batches_at_a_time(progress, views)):
        batch_labels = labels[batch]
        share = schedule(progress.steps_done, progress.total_steps, WARM_UP if settings.network else 0.0)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * share
        if settings.loss or settings.network:  # which may draw: the same numbers whenever this step is taken
            start_stream("step", settings.seed, progress.steps_done)
        with progress.machine.autocast():
            logits = model(images)
        logits = logits.to(torch.float32, copy=True)  # on a GPU the next step overwrites what the network gave
        if soft_targets is None:
            loss = F.cross_entropy(logits, batch_labels, label_smoothing=settings.label_smoothing)
        else:
            teacher_logits = soft_targets[batch].float()
            loss = criterion(logits, batch_labels, teacher_logits, settings.temperature, settings.alpha)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        progress.add(loss, logits, batch_labels)  # every few seconds it shows, every few minutes it saves


def batches_at_a_time(progress, views):
    """For how many batches views are made together: on a GPU for several, since launching the kernels takes longer than
    computing the views of one batch."""
    if progress.machine.device.type != "cuda" or progress.settings.unlabeled:
        return 1
    return max(1, TOGETHER * inference_batch(views.device, views.size) // progress.batch_size)


def with_views(batches, views, epoch, together):
    """Pairs of each of `batches`, indices (B,), and its views in `epoch`, made for so many batches `together`."""
    batches = iter(batches)
    while part := tuple(itertools.islice(batches, together)):
        images = views.batch(epoch, torch.cat(part))
        parts = images.split([len(batch) for batch in part])
        yield from zip(part, (each.detach() for each in parts), strict=True)  # so that a network may change them


def train(run, data, machine, options, teacher=None, title=None, later=0, tally=None):
    """Trains a Run, resumes it, or returns what it reached if it is finished: its accuracy on the test set, or on the
    validation part of a run that has one.

    `teacher` gives the soft targets of an epoch (a distill.Ensemble), for a distilled student that needs them. With
    `settings.unlabeled` each batch holds as many images without labels as images with them. `options` are
    runs.progress.Options, `later` is how many images the command trains on after this run, `tally` the
    runs.group.Tally of a group of processes. Raises Failure where the folder holds a run with other settings or the
    training diverges, and Interrupted, with the state saved, on a signal.
    """
    settings = run.settings
    if run.is_finished:
        return run.finished_accuracy()
    transfer_set = data.transfer_set(settings.train_fraction, settings.omit_class)
    parts = split(data.train_labels, settings.val_fraction, transfer_set)
    indices, validation = (part.to(machine.device) for part in parts)
    stream = "teacher " if settings.role == "teacher" else ""  # students share their views; the teacher has its own
    views = Views(data.train_images, data.mean, data.std, f"{stream}views", **settings.augmentation)
    network = new_network(settings, data, transfer_set, run.hooks)
    network = network.to(**machine.place).train()
    if settings.network:
        trained = [p for p in network.parameters() if p.requires_grad] if settings.epochs else [torch.zeros(0)]
        rest = {"momentum": 0.9, "nesterov": True, "weight_decay": settings.weight_decay}
        optimizer = torch.optim.SGD(trained, settings.learning_rate, **rest)
    else:
        optimizer = Muon(network, settings.learning_rate, settings.weight_decay, machine.dtype, machine.records)
    model = compile_network(network) if machine.compiled else network
    plain = functools.partial(distillation_loss, label_smoothing=settings.label_smoothing)
    criterion = run.hooks.loss.loaded if settings.loss else plain

    about = run, network, optimizer, machine, options, len(indices), title or run.name, later, tally
    with run.hooks.explained(f"fails while {run.name} is trained"), Progress(*about) as progress:
        if machine.records and not settings.network:
            like = torch.zeros(progress.images_per_step, 3, data.image_size, data.image_size).to(**machine.place)
            model = recorded_network(model, like, machine)
        labels, others = data.train_labels, None
        if settings.unlabeled:
            others = unlabeled_views(data, settings.augmentation, len(indices), settings.batch_size)
            views = JoinedViews(views, others, progress.batch_size)
            labels = torch.cat([labels, labels.new_full((others.count,), UNLABELED)])
        while progress.epoch < settings.epochs:
            soft_targets = None
            if teacher is not None:
                with progress.time_of_teacher():
                    asked = progress.epoch, f"{run.name}: soft targets of epoch {progress.epoch + 1}"
                    soft_targets = teacher.epoch(*asked)
                    if others:
                        soft_targets = torch.cat([soft_targets, teacher.unlabeled.epoch(*asked)])
            draws = generator(f"{stream}order", settings.seed, progress.epoch)
            order = indices[torch.randperm(len(indices), generator=draws).to(machine.device)]
            if others:  # beside the very batches of plain distillation and of the baseline
                draws = generator("unlabeled order", settings.seed, progress.epoch)
                more = len(data.train_labels) + torch.randperm(others.count, generator=draws).to(machine.device)
                batches = order[: others.count].view(progress.steps, -1), more.view(progress.steps, -1)
                order = torch.cat(batches, 1).flatten()
            with options.stop.deferred():  # a signal waits for the end of a step; then the state is saved
                train_one_epoch(model, optimizer, views, labels, order, soft_targets, criterion, progress)
                progress.end_epoch(validate(network, data, validation))
            options.stop.raise_pending()

        if settings.val_fraction:
            return progress.finish(data)
        logits = evaluate(network, data.test_images, data.mean, data.std)  # the test set, read once
        bias = bias_of_omitted(network, data, settings.omit_class) if settings.omit_class else None
        return progress.finish(data, logits, accuracy(logits, data.test_labels), bias)


def new_network(settings, data, transfer_set, hooks):
    """The network of a run before its first step, on the CPU: of the user's own where the settings name one."""
    if settings.network:
        hook = getattr(hooks, settings.architecture)
        return models.build(hook.loaded, settings.architecture, len(data.classes), settings.seed)
    count = WHITENED * 64**2 // max(64, data.image_size) ** 2
    some = transfer_set[:: max(1, len(transfer_set) // count)].to(data.train_images.device)
    some = models.normalize(data.train_images[some].cpu(), data.mean, data.std)
    return models.create(settings.architecture, len(data.classes), settings.seed, some, settings.width)


def evaluate(network, images, mean, std):
    """The float32 logits (N, classes) of uint8 images (N, S, S, 3), uncropped and unflipped; computed in float32
    whatever the training's precision: bfloat16 is so coarse that equal logits would decide images."""
    training = network.training
    network.eval()
    batches = images.split(inference_batch(images.device, images.shape[1]))
    logits = predict(network, (models.normalize(batch, mean, std) for batch in batches), nullcontext())
    network.train(training)
    return logits


def validate(network, data, indices):
    """The accuracy on the training images `indices`, or None where there are none."""
    if not len(indices):
        return None
    parts = indices.split(inference_batch(indices.device, data.image_size))  # a copy of a batch at a time, not of all
    logits = torch.cat([evaluate(network, data.train_images[part], data.mean, data.std) for part in parts])
    return accuracy(logits, data.train_labels[indices])


def bias_of_omitted(network, data, names):
    """What to add to the logits of the classes `names`, which the transfer set lacks (distill.omitted_bias)."""
    classes = [data.classes.index(name) for name in names]
    count = sum((data.train_labels == number).sum().item() for number in classes)
    return omitted_bias(evaluate(network, data.train_images, data.mean, data.std), classes, count)


def accuracy(logits, labels):
    """The share of rows of `logits` (N, classes) whose largest entry is at the label (N,): a float from 0 to 1."""
    return (logits.argmax(1) == labels).sum().item() / len(labels)


def schedule(step, steps, warm_up=0.0):
    """The share of the learning rate at `step` of `steps` (from 0): from 1 in a line to zero, after it has risen to 1
    in a line over a share `warm_up` of the steps."""
    rise = round(warm_up * steps)
    return (step + 1) / (rise + 1) if step < rise else (steps - step) / (steps - rise)


def compile_network(network):
    """The network, compiled but for its `models.largest`. On CUDA some kernels are chosen by timing them there: two
    compiled runs on a GPU may differ in last bits. Each size of batches is compiled by itself, so that a run's bits do
    not depend on the runs that its process trained before."""
    models.largest = uncompiled_largest()
    return torch.compile(network, dynamic=False)


@functools.cache
def uncompiled_largest():
    """models.largest, left out by the compiler. Compiled, its gradient is NaN in bfloat16 (pytorch issue 186799): what
    it is the maximum of is computed once more, unrounded, so that none of it equals the maximum, which was rounded, and
    the gradient is divided by their number, 0."""
    return torch.compiler.disable(models.largest)


class Muon(torch.optim.Optimizer):
    """Muon (K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024), in the form that the
    repository cifar10-airbench uses.

    For a network's convolutions: Nesterov momentum, made orthogonal (`orthogonalize`); before each step the weights
    (outputs, inputs, 3, 3) are brought to the Frobenius norm sqrt(outputs), which batch norm makes free to choose.
    For all else: SGD with Nesterov momentum, with weight decay on the head. Muon's steps are as long whatever the loss,
    SGD's are not; so the gradients of all biases together are clipped to the norm CLIPPED (Pascanu et al., arXiv
    1211.5063), or soft targets, at the learning rate of labels, would drive the biases of a small student to where its
    channels answer nothing.

    The learning rate of all groups is set to the schedule's, of which each takes its own share. Steps are made
    orthogonal in `dtype`; weights and momenta stay float32.
    """

    def __init__(self, network, learning_rate, weight_decay, dtype=torch.float32, records=False):
        """`records` is whether `directions`, on an NVIDIA GPU, is recorded (runs.graphs.Recorded)."""
        self.dtype, self.recorded = dtype, Recorded() if records else None
        trained = [p for p in network.parameters() if p.requires_grad]
        groups = []
        for dimensions, (share, momentum) in ((4, CONVOLUTIONS), (2, HEAD), (1, BIASES)):
            decay = weight_decay if dimensions == 2 else 0.0
            parameters = [p for p in trained if p.ndim == dimensions]
            groups.append({"params": parameters, "share": share, "momentum": momentum, "weight_decay": decay})
        super().__init__(groups, {"lr": learning_rate})

    @torch.no_grad()
    def step(self):
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        groups = [(group, parameters) for group, parameters in groups if parameters]
        trained = [parameter for _, parameters in groups for parameter in parameters]
        for parameter in trained:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        compute, gradients = functools.partial(self.directions, groups), [parameter.grad for parameter in trained]
        directions = iter(self.recorded(compute, gradients) if self.recorded else compute(gradients))
        for group, parameters in groups:
            steps = [next(directions) for _ in parameters]
            torch._foreach_add_(parameters, steps, alpha=-group["lr"] * group["share"])

    def directions(self, groups, gradients):
        """The steps at a learning rate of 1 that `gradients`, a list, make of the parameters of `groups`, pairs of a
        group and those of its parameters that have one, in their order; convolutions are brought to their norm
        before."""
        directions, gradients = [], iter(gradients)
        for group, parameters in groups:
            own = [next(gradients) for _ in parameters]
            if parameters[0].ndim == 1:
                norm = torch.nn.utils.get_total_norm(own)
                own = torch._foreach_mul(own, (CLIPPED / (norm + 1e-6)).clamp(max=1.0))
            if group["weight_decay"]:
                own = torch._foreach_add(own, parameters, alpha=group["weight_decay"])
            momenta = [self.state[p]["momentum_buffer"] for p in parameters]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, own)
            own = torch._foreach_add(own, momenta, alpha=group["momentum"])
            if parameters[0].ndim == 4:
                own = side_by_side(self.orthogonal, parameters, own)
            directions += own
        return directions

    def orthogonal(self, parameter, step):
        """Brings a convolution (outputs, inputs, 3, 3) to its norm; returns its `step`, made orthogonal as a matrix of
        `outputs` rows."""
        parameter.mul_(len(parameter) ** 0.5 / parameter.norm())
        rows = step.permute(0, 2, 3, 1)  # as channels-last weights lie in memory; the order of columns is free
        return orthogonalize(rows.flatten(1).to(self.dtype)).view(rows.shape).permute(0, 3, 1, 2)


def orthogonalize(matrix):
    """A matrix (rows, columns) brought near U V^T of its singular value decomposition U S V^T: directions stay,
    singular values above an eightieth of the norm come near 1 (0.5 to 1.2), smaller ones grow up to 41 times.

    Newton-Schulz iterations X <- (a + b X X^T + c (X X^T)^2) X. Their factors are polynomials of the first X X^T and
    commute, so they are multiplied with each other, small and square as they are, and with X only once. In bfloat16,
    in which Muon was published, the result is the same up to that type's rounding.
    """
    a, b, c = COEFFICIENTS
    matrix = matrix / (matrix.norm() + 1e-7)
    gram, product = matrix @ matrix.T, None
    for iteration in range(ITERATIONS):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor if product is None else factor @ product
        if iteration < ITERATIONS - 1:
            gram = factor @ gram @ factor
    return product @ matrix
