"""What all steps of a command work with: the device, the data, functions of the user's own, and what networks cost."""

from dataclasses import dataclass
from pathlib import Path

import torch

import data
import models
from arguments import FOLDER_OPTIONS
from runs import plan, trial
from runs.costs import describe_memory
from runs.files import Failure, is_out_of_memory
from runs.group import Group
from runs.hooks import Hooks
from runs.machine import Machine, describe, start_machine
from runs.progress import Options
from sources import survey


@dataclass(frozen=True)
class Session:
    """What all steps of a command work with."""

    arguments: object
    data: data.Data  # on the device
    transfer_set: torch.Tensor  # the training images that students see
    machine: Machine
    options: Options
    group: Group
    hooks: Hooks


def choose_machine(arguments, group):
    """The Machine that `arguments` name, with this process of the `group` set up for it."""
    rank = group.local_rank if group.size > 1 else None
    machine = start_machine(arguments.device, arguments.precision, arguments.compile, rank)
    if group.size > 1:
        torch.set_num_threads(group.threads())
    return machine


def try_hooks(arguments, hooks, classes, image_size, machine, say):
    """Raises Failure where a function of the user's own cannot be trained on `machine` with so many classes and images
    so large; what is odd about one is told to `say`."""
    is_trained = arguments.epochs and (arguments.train_teacher or (arguments.demo and not arguments.teacher))
    networks = [(hooks.teacher, "teacher", is_trained), (hooks.student, "student", True)]
    networks += [(hook, "teacher", False) for hook in hooks.others]
    for hook, role, trained in networks:
        if hook and (note := trial.try_network(hook, role, classes, image_size, machine, trained)):
            say(f"Note that {note}")
    for pair in plan.pairs(arguments) if hooks.loss else []:
        trial.try_loss(hooks.loss, classes, *pair, machine)


def start(arguments, stop, group, hooks, machine, teachers):
    """Loads the data; prints what the command works with. `teachers` are networks, as far as there are any yet."""
    about = {
        "workers": arguments.num_workers, "cache": Path(arguments.output_dir) / "data",
        "skip_damaged": arguments.skip_damaged, "say": group.say, "agree": group.agree,
    }  # fmt: skip
    loaded = data.load(
        arguments.dataset,
        data_dir=arguments.data_dir,
        data_url=arguments.data_url,
        image_size=arguments.image_size,
        processes=group.local_size if group.leads else 1,  # the others come when the memory of the first is taken
        test_fraction=arguments.test_fraction,
        **about,
    )
    if arguments.unlabeled:
        refuse_class(arguments, loaded)
        loaded = data.with_unlabeled(loaded, arguments.unlabeled, **about)
    group.say(
        f"{arguments.dataset}: {len(loaded.train_labels):,} training and {len(loaded.test_labels):,} test images of "
        f"{loaded.image_size}x{loaded.image_size}, {len(loaded.classes)} classes"
    )
    images = survey.look(loaded, arguments.output_dir, group.say)
    if loaded.unlabeled:
        images["unlabeled"] = survey.look_at_unlabeled(loaded, arguments.output_dir, group.say)
    views = plan.augmentation(arguments, "teacher" if arguments.train_teacher else "kd")
    blanked = f", a square of {views['cutout']} by {views['cutout']} blanked" if views["cutout"] else ""
    moved = f"{views['padding']} pixel{'s' * (views['padding'] != 1)}"
    mirrored = "mirrored in every second epoch" if views["mirror"] else "not mirrored"
    if arguments.epochs:
        group.say(f"Views: moved by up to {moved}, {mirrored}{blanked}")
    trained = [each.settings for each in teachers if each.settings["epochs"]]  # here, not elsewhere
    if views["mirror"] and not all(each.get("mirror", True) for each in trained):
        group.say(
            "Warning: a teacher was trained with --no-mirror, but is asked about mirrored images, which it has never "
            "seen. Unless they show the same things, stop this command and give it --no-mirror, too (and --overwrite, "
            "where students were begun)."
        )
    if not views["mirror"] and any(each.get("mirror", True) for each in trained):
        group.say(
            "Warning: a teacher was trained without --no-mirror, so on mirrored images, too. If they show other "
            "things, train it again with --no-mirror --overwrite."
        )
    loaded = put(loaded, machine.device)
    transfer_set = loaded.transfer_set(arguments.train_fraction, plan.omitted(arguments, loaded))
    if len(transfer_set) < len(loaded.train_labels):
        group.say(f"Students see {len(transfer_set):,} of the {len(loaded.train_labels):,} training images")
    if loaded.unlabeled:
        count = data.unlabeled_views(loaded, views, len(transfer_set), arguments.batch_size).count
        times = count * arguments.epochs / len(loaded.unlabeled.names)
        group.say(f"In {arguments.epochs} epochs each image without labels is seen {times:,.1f} times")
    if not teachers:
        try_hooks(arguments, hooks, len(loaded.classes), loaded.image_size, machine, group.say)
    networks = {
        role: untrained(getattr(hooks, role), role, len(loaded.classes), plan.width(arguments, role))
        for role in models.ARCHITECTURES
    }
    with hooks.explained("fails on the CPU, where its multiply-adds are counted whatever --device says"):
        costs = costs_of(networks, teachers, loaded.image_size)
    for name in ("teacher", "student"):
        millions = f"{costs[name].macs / 1e6:,.1f} million multiply-adds"
        group.say(f"{name.capitalize()}: {costs[name].parameters:,} parameters, {millions} per image")
    if loaded.image_size > models.LARGE and arguments.epochs:
        largest = "student" if teachers else "teacher"  # of what this command trains
        count = len(transfer_set if teachers else loaded.train_labels)
        batch = min(arguments.batch_size, count) * (2 if loaded.unlabeled and teachers else 1)
        group.say(describe_memory(largest, networks[largest], loaded.image_size, batch, machine, group.local_size))
    processes = f", shared by {group.size} processes" if group.size > 1 else ""
    group.say(f"Device: {describe(machine.device)}, {machine.precision}{processes}")
    typed = ("dataset", "data_dir", "num_workers", "teacher", "loss", "student", "teacher_network", "device")
    typed += ("other_networks", "precision", "compile", "unlabeled", *FOLDER_OPTIONS)
    recorded = {name: getattr(arguments, name) for name in typed}
    options = Options(arguments.save_every, stop, recorded, images, costs)
    return Session(arguments, loaded, transfer_set, machine, options, group, hooks)


def refuse_class(arguments, loaded):
    """Raises Failure where the folder of images without labels is one of the classes, as beside the others."""
    folder, top = Path(arguments.unlabeled).resolve(), Path(arguments.data_dir).resolve()
    if arguments.dataset == "folder" and folder.name in loaded.classes and folder.parent in (top, top / "train"):
        raise Failure(
            f"{arguments.unlabeled} is a class of {arguments.data_dir}. Move it elsewhere, and train the teacher again."
        )


def put(loaded, device):
    """The Data on a device; raises Failure where they do not fit into its memory."""
    try:
        return loaded.to(device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    images = [loaded.train_images, loaded.test_images, *([loaded.unlabeled.images] if loaded.unlabeled else [])]
    raise Failure(
        f"the images, {sum(each.nbytes for each in images) / 1e9:.1f} GB decoded, do not fit into the memory of "
        f"{describe(device)}, which holds all of them. Try a smaller --image-size, or --device cpu."
    )


def untrained(hook, role, classes, width):
    """A new network for a `role`, on the CPU: of the user's own function `hook`, or without one this program's."""
    return models.build(hook.loaded, role, classes, 0) if hook else models.create(role, classes, 0, width=width)


def costs_of(networks, teachers, image_size):
    """The Costs of "teacher" and "student", from a dict of new networks, or of the first of `teachers` where there are
    any yet; then also of "teachers", all of these together."""
    found = {role: models.costs_of(network, image_size) for role, network in networks.items()}
    if teachers:
        members = [models.costs_of(network, image_size) for network in teachers]
        found |= {"teacher": members[0], "teachers": sum(members[1:], members[0])}
    return found
