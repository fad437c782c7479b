#!/usr/bin/env python3
"""Knowledge distillation on CIFAR-10 (Hinton, Vinyals and Dean, arXiv 1503.02531), with an honest baseline.

    python main.py --train-teacher --epochs 200
    python main.py --epochs 200 --temperature 4.0 --alpha 0.1

The first command trains the teacher; the second trains the same student with and without it, and compares. Every
command can simply be repeated: a finished run is reused, an interrupted one is resumed.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from runs.command import exit_status
from runs.files import Failure
from runs.lock import lock
from runs.teachers import check_teacher, find_teachers


def import_modules():
    """Imports everything that needs PyTorch. That takes seconds, so it comes after the arguments are checked."""
    global Machine, Options, choose_device, choose_precision, describe, make_deterministic, write_report
    global data, distill, evaluate, models, plan, records, torch, train
    import torch

    import data
    import distill
    import models
    from reports import records
    from reports.report import report as write_report
    from runs import plan
    from runs.machine import Machine, choose_device, choose_precision, describe, make_deterministic
    from runs.progress import Options
    from train import evaluate, train


@dataclass(frozen=True)
class Session:
    """What all steps of a command work with."""

    arguments: object
    data: "data.Data"  # on the device
    machine: "Machine"
    options: "Options"


def main(arguments, stop):
    """The whole story: the teacher, the student with distillation and without it, the comparison. `stop` is the signal
    handler (runs.signals.Stop)."""
    if arguments.task:
        use_runs(arguments)
        return
    demo = arguments.demo and not arguments.train_teacher and not arguments.teacher
    paths = [] if arguments.train_teacher or demo else find_teachers(arguments)
    with lock(arguments.output_dir):
        import_modules()
        teachers = [(path, models.load(path)) for path in paths]
        session = start(arguments, stop)
        if arguments.train_teacher or demo:
            train_teachers(session)
        if not arguments.train_teacher:
            teachers = teachers or [(path, models.load(path)) for path in find_teachers(arguments)]
            asked = train_students(session, teachers)
            write_report(arguments.output_dir, asked)


def start(arguments, stop):
    """Chooses the device and loads the data; prints what the command works with."""
    device = choose_device(arguments.device)
    machine = Machine(device, choose_precision(arguments.precision, device), bool(arguments.compile))
    make_deterministic()
    loaded = data.load(
        arguments.dataset,
        data_dir=arguments.data_dir,
        data_url=arguments.data_url,
        image_size=arguments.image_size,
        workers=arguments.num_workers,
        cache=Path(arguments.output_dir) / "data",
    ).to(device)
    print(
        f"{arguments.dataset}: {len(loaded.train_labels):,} training and {len(loaded.test_labels):,} test images of "
        f"{loaded.image_size}x{loaded.image_size}, {len(loaded.classes)} classes"
    )
    for name in models.ARCHITECTURES:
        costs = models.costs(name, len(loaded.classes), loaded.image_size)
        millions = f"{costs.macs / 1e6:.1f} million multiply-adds"
        print(f"{name.capitalize()}: {costs.parameters:,} parameters, {millions} per image")
    print(f"Device: {describe(device)}, {machine.precision}", flush=True)
    typed = ("dataset", "data_dir", "num_workers", "teacher", "device", "precision", "compile")
    recorded = {name: getattr(arguments, name) for name in typed}
    return Session(arguments, loaded, machine, Options(arguments.save_every, stop, recorded))


def prepare(session, runs):
    """Checks all of `runs` before any is trained, or removes what exists of them with --overwrite."""
    session.options.stop.runs_removed = bool(session.arguments.overwrite)
    plan.prepare(runs, session.machine, session.arguments.overwrite)


def train_teachers(session):
    """Trains the teacher, or with --seeds several of them."""
    arguments, loaded = session.arguments, session.data
    count = arguments.seeds if arguments.train_teacher else 1
    runs = plan.teacher_runs(arguments, loaded, count)
    prepare(session, runs)
    later = []
    if not arguments.train_teacher:  # --demo: the students follow
        later = plan.student_runs(arguments, loaded, None, plan.pairs(arguments))
        if arguments.overwrite:  # removed now, so that they never stop whoever resumes without --overwrite
            prepare(session, later)
    train_all(session, runs, later=later)


def train_students(session, teachers):
    """Trains the students with distillation and without, after the sweep where there is one. Returns what to report:
    the temperature, alpha and seeds. `teachers` are pairs of the path of a model.pt and its network."""
    arguments, loaded, machine = session.arguments, session.data, session.machine
    networks = digests_of(session, teachers)
    teacher, views = "+".join(networks), data.Views(loaded.train_images, loaded.mean, loaded.std)
    folder = Path(arguments.output_dir) / "targets"
    targets = distill.Ensemble(
        [distill.SoftTargets(each, digest, loaded.digest, views, folder, machine) for digest, each in networks.items()]
    )
    if any(arguments.alpha):
        print(f"Soft targets: {arguments.epochs * targets.bytes_per_epoch / 1e6:.1f} MB in {folder}", flush=True)
    keep_for_report(session, networks, sum(Path(path).stat().st_size for path, _ in teachers))

    pair = choose_pair(session, teacher, targets) if arguments.sweep else plan.pairs(arguments)[0]
    runs = plan.student_runs(arguments, loaded, teacher, [pair])
    # With --overwrite the baselines of a sweep were removed before it.
    again = [run for run in runs if run.settings.role == "kd"] if arguments.sweep else runs
    prepare(session, again)
    train_all(session, runs, targets)
    return {"temperature": pair[0], "alpha": pair[1], "seeds": list(plan.seeds(arguments))}


def choose_pair(session, teacher, targets):
    """The sweep: trains students for every pair of temperature and alpha on a part of the training images, and returns
    the pair with the best accuracy on the rest."""
    arguments, loaded, pairs = session.arguments, session.data, plan.pairs(session.arguments)
    selection = plan.student_runs(arguments, loaded, teacher, pairs, selection=True)
    fraction = selection[0].settings.val_fraction
    if not len(data.split(loaded.train_labels, fraction)[1]):
        raise Failure("A sweep needs at least two training images in some class, to judge on one of them.")
    print(f"Sweep: {len(pairs)} pairs of temperature and alpha, judged on {fraction:.0%} of the training images")
    candidates = plan.student_runs(arguments, loaded, teacher, pairs)
    if arguments.overwrite:
        # Which pair will be trained on everything is not known yet: of the candidates only the baselines are removed,
        # and those that would stop whoever resumes this command without --overwrite.
        conflicts = plan.check(candidates, session.machine)
        candidates = [run for run in candidates if run.settings.role == "baseline" or run in conflicts]
    prepare(session, selection + candidates)
    train_all(session, selection, targets, later=plan.student_runs(arguments, loaded, teacher, pairs[:1]))
    pair = records.best_pair(arguments.output_dir, pairs, plan.seeds(arguments))
    print(f"Best on the validation part: temperature {pair[0]}, alpha {pair[1]}")
    return pair


def train_all(session, runs, targets=None, later=()):
    """Trains what is not yet finished of `runs` and prints each one's accuracy; `targets` are the teachers' soft
    targets, `later` the runs that the command trains afterwards, for the time left."""
    images = len(session.data.train_labels)
    for position, run in enumerate(runs):
        finished = run.is_finished
        waiting = [each for each in (*runs[position + 1 :], *later) if not each.is_finished]
        title = run.name if len(runs) == 1 else f"[{position + 1}/{len(runs)}] {run.name}"
        accuracy = train(
            run, session.data, session.machine, session.options,
            teacher=targets if run.settings.alpha else None,
            title=title, later=sum(each.settings.epochs for each in waiting) * images,
        )  # fmt: skip
        kind = "validation" if run.settings.val_fraction else "test"
        print(f"{run.folder}: {kind} accuracy {accuracy:.4f}{' (finished before)' * finished}", flush=True)


def digests_of(session, teachers):
    """The teachers, checked and on the device, by their digests and in the order of these; so however they are named,
    their mean is the same to the last bit."""
    paths, networks = {}, {}
    for path, network in teachers:
        check_teacher(session.arguments, session.data, path, network)
        digest = models.digest(network.state_dict())
        if digest in paths:
            raise Failure(f"{path} and {paths[digest]} are the same teacher: name it once.")
        paths[digest], networks[digest] = path, network
        print(f"{path}: test accuracy {network.accuracy:.4f} (teacher)")
    place = {"device": session.machine.device, "memory_format": torch.channels_last}
    return {digest: networks[digest].to(**place) for digest in sorted(networks)}


def keep_for_report(session, networks, teacher_bytes):
    """Keeps the test set, the teachers' test logits and how fast teacher and student are, from which --report works
    without data and PyTorch. `networks` are the teachers by digest, `teacher_bytes` the size of their files."""
    output, loaded, machine = session.arguments.output_dir, session.data, session.machine
    images, labels = loaded.test_images.cpu().numpy(), loaded.test_labels.cpu().numpy()
    records.save_test_set(output, loaded.digest, images, labels, loaded.classes)
    for digest, network in networks.items():
        test_logits = partial(evaluate, network, loaded.test_images, loaded.mean, loaded.std)
        records.save_teacher_logits(output, digest, loaded.digest, test_logits)
    place = {"device": describe(machine.device), "threads": torch.get_num_threads(), "teacher_bytes": teacher_bytes}
    measure = partial(models.speeds, list(networks.values()), loaded.image_size, machine)
    records.save_speed(output, list(networks), loaded.digest, place, measure)


def use_runs(arguments):
    """--list, --report, --predict, --export: what needs no training."""
    if arguments.task == "list":
        from reports.listing import list_runs

        list_runs(arguments.output_dir)
    elif arguments.task == "report":
        if not Path(arguments.output_dir).is_dir():
            raise Failure(f"{arguments.output_dir} does not exist: --report needs a folder with finished runs.")
        from reports.report import report

        with lock(arguments.output_dir):
            report(arguments.output_dir)
    elif arguments.task == "predict":
        from use.predict import predict

        predict(arguments)
    else:
        from use.export import export

        export(arguments)


if __name__ == "__main__":
    sys.exit(exit_status(main))
