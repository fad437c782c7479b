"""What students learn from: the teachers, checked, their soft targets, and what the report needs to know of them."""

from functools import partial
from pathlib import Path

import torch

import data
import distill
import models
from reports import records
from runs import plan
from runs.files import Failure
from runs.machine import describe
from runs.session import untrained
from runs.settings import measured, other_width
from runs.speed import speeds
from runs.teachers import check_answers, check_sweep_teacher, check_teacher, find_sweep_teachers
from train import accuracy, evaluate


def checked(session, teachers, role="teacher"):
    """The teachers, checked and on the device, by their digests and in the order of these; so however they are named,
    their mean is the same to the last bit. `role` is what is said of them."""
    paths, networks = {}, {}
    for path, network in teachers:
        check_teacher(session.arguments, session.data, path, network)
        digest = models.identity(network.state_dict(), network.settings)
        if digest in paths:
            raise Failure(f"{path} and {paths[digest]} are the same teacher: name it once.")
        paths[digest], networks[digest] = path, network
        smoothing = network.settings.get("label_smoothing")
        note = smoothing and f"; labels smoothed by {smoothing:g}, which makes a worse teacher, arXiv 1906.02629"
        session.group.say(f"{path}: {measured(network.settings)} accuracy {network.accuracy:.4f} ({role}{note or ''})")
    return {digest: networks[digest].to(**session.machine.place) for digest in sorted(networks)}


def sweep_networks(session, teachers, fraction):
    """The `teachers` as trained without the `fraction` of the training images on which a sweep is judged, as
    checked; {} where there is one that was not, which is said."""
    with session.group.first():
        paths, missing = find_sweep_teachers(session.arguments, teachers, fraction)
        if missing:
            session.group.say(missing)
            return {}
        found = [(path, models.load(path, hooks=session.hooks)) for path in paths]
        for (path, network), (original, teacher) in zip(found, teachers, strict=True):
            check_sweep_teacher(session.arguments, path, network, original, teacher, fraction)
        return checked(session, found, "teacher of the sweep")


def soft_targets(session, networks):
    """The distill.Ensemble of teachers, {digest: network}, for the views of the command's students."""
    arguments, loaded, several = session.arguments, session.data, session.group.size > 1
    place = Path(arguments.output_dir) / "targets", session.machine, several

    def ensemble(data_digest, views, transfer_set, unlabeled=None):
        about = data_digest, views, *place, transfer_set
        members = [distill.SoftTargets(network, digest, *about) for digest, network in networks.items()]
        return distill.Ensemble(members, unlabeled)

    augmentation, others = plan.augmentation(arguments, "kd"), None
    if loaded.unlabeled:
        views = data.unlabeled_views(loaded, augmentation, len(session.transfer_set), arguments.batch_size)
        others = ensemble(loaded.unlabeled.digest, views, None)
    views = data.Views(loaded.train_images, loaded.mean, loaded.std, **augmentation)
    return ensemble(loaded.digest, views, session.transfer_set, others)


def say_size(session, targets, which=""):
    """Says how much room soft targets take."""
    size, folder = session.arguments.epochs * targets.bytes_per_epoch, Path(session.arguments.output_dir) / "targets"
    session.group.say(f"Soft targets{which}: {size / 1e6:.1f} MB in {folder}")


def keep_for_report(session, networks, teachers):
    """Keeps the test set, the teachers' test logits and how fast teacher and student are, from which --report works
    without data and PyTorch. `networks` are those of `teachers`, pairs of path and network, by digest."""
    output, loaded, machine = session.arguments.output_dir, session.data, session.machine
    images, labels = loaded.test_images.cpu().numpy(), loaded.test_labels.cpu().numpy()
    records.save_test_set(output, loaded.digest, images, labels, loaded.classes)

    def test_logits(network):
        logits = evaluate(network, loaded.test_images, loaded.mean, loaded.std)
        path = next(path for path, each in teachers if each is network)
        check_answers(path, network, accuracy(logits, loaded.test_labels), len(labels))
        return logits

    for digest, network in networks.items():
        records.save_teacher_logits(output, digest, loaded.digest, partial(test_logits, network))
    sizes = sum(Path(path).stat().st_size for path, _ in teachers)
    place = {"device": describe(machine.device), "threads": torch.get_num_threads(), "teacher_bytes": sizes}
    hook = session.hooks.student
    student = untrained(hook, "student", len(loaded.classes), session.arguments.width)
    measure = partial(speeds, list(networks.values()), student, loaded.image_size, machine)
    own = (hook.function, hook.sha256) if hook else other_width(session.arguments.width)
    records.save_speed(output, list(networks), loaded.digest, place, machine.precision, measure, own)
