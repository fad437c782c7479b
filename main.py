#!/usr/bin/env python3
"""Knowledge distillation on CIFAR-10 (Hinton, Vinyals and Dean, arXiv 1503.02531), with an honest baseline.

    python main.py --train-teacher --epochs 200
    python main.py --epochs 200 --temperature 4.0 --alpha 0.1

The first command trains the teacher; the second trains the same student with and without it, and compares. Every
command can simply be repeated: a finished run is reused, an interrupted one is resumed. Several processes, GPUs or
machines share the runs of a command:

    torchrun --standalone --nproc-per-node 2 main.py --epochs 200 --seeds 5
"""

import sys
from functools import partial

from runs.command import exit_status
from runs.files import Failure
from runs.group import Tally, join, launched
from runs.hooks import find_hooks
from runs.settings import measured
from runs.teachers import check_image_size, check_networks, find_teachers, spare_teachers
from use.tasks import do_task


def import_modules():
    """Imports everything that needs PyTorch. That takes seconds, so it comes after the arguments are checked."""
    global choose_machine, data, models, plan, records, start, teaching, train, try_hooks
    import data
    import models
    from reports import records
    from runs import plan, teaching
    from runs.session import choose_machine, start, try_hooks
    from train import train


def main(arguments, stop):
    """The whole story: the teacher, the student with distillation and without it, the comparison. `stop` is the signal
    handler (runs.signals.Stop)."""
    if arguments.task:
        _, rank = launched()
        if rank == 0:  # a task is for one of the processes that torchrun started
            do_task(arguments)
        return
    demo = arguments.demo and not arguments.train_teacher and not arguments.teacher
    with join() as group:  # of those that torchrun started; a plain command is a group of one, and never waits
        with group.first():
            hooks = find_hooks(arguments)
            paths = [] if arguments.train_teacher or demo else find_teachers(arguments)
        hooks.check_alike(group)
        with group.lock(arguments.output_dir):
            import_modules()
            with group.first():
                hooks.load()  # before any image is downloaded or decoded
                machine = choose_machine(arguments, group)
                teachers = [(path, models.load(path, hooks=hooks)) for path in paths]
                check_image_size(arguments, teachers)
                if teachers:  # without one the number of classes is not known yet
                    check_networks(hooks, teachers)
                    classes, size = len(teachers[0][1].classes), arguments.image_size
                    try_hooks(arguments, hooks, classes, size, machine, group.say)
                session = start(arguments, stop, group, hooks, machine, [network for _, network in teachers])
            if arguments.train_teacher or demo:
                train_teachers(session)
            if not arguments.train_teacher:
                found = [] if teachers else find_teachers(arguments)  # that --demo has just trained
                teachers += [(path, models.load(path, hooks=hooks)) for path in found]
                asked = train_students(session, teachers)
                if group.leads:
                    from reports.report import report  # only here: it takes a second, which no teacher needs

                    report(arguments.output_dir, asked)


def train_teachers(session):
    """Trains the teacher, or with --seeds several of them."""
    arguments, loaded = session.arguments, session.data
    runs = plan.teacher_runs(arguments, loaded, session.hooks)
    fraction = runs[0].settings.val_fraction
    if fraction and not len(data.split(loaded.train_labels, fraction)[1]):
        raise Failure("--val-fraction needs at least two training images in some class.")
    prepare(session, runs)
    later = []
    if not arguments.train_teacher:  # --demo: the students follow
        later = plan.student_runs(arguments, loaded, None, plan.pairs(arguments), session.hooks)
        if arguments.overwrite:  # removed now, so that they never stop whoever resumes without --overwrite
            prepare(session, plan.all_student_runs(arguments, loaded, session.hooks))
    train_all(session, runs, later=later)


def train_students(session, teachers):
    """Trains the students with distillation and without, after the sweep where there is one. Returns what to report
    (reports.comparison.Comparison's `asked`). `teachers` are pairs of the path of a model.pt and its network."""
    arguments, loaded = session.arguments, session.data
    with session.group.first():
        networks = teaching.checked(session, teachers)
    digest, targets = "+".join(networks), teaching.soft_targets(session, networks)
    if arguments.overwrite:
        spare_teachers([path for path, _ in teachers], plan.all_student_runs(arguments, loaded, session.hooks))
    if any(arguments.alpha) or session.hooks.loss:
        teaching.say_size(session, targets)
    if session.group.leads:
        teaching.keep_for_report(session, networks, teachers)

    pair = plain = plan.pairs(arguments)[0]
    if arguments.sweep:
        pair, plain = choose_pairs(session, teachers, digest, targets)
    runs = plan.student_runs(arguments, loaded, digest, [pair], session.hooks, plain_pairs=[plain])
    if not arguments.sweep:  # before which those of all pairs were prepared
        prepare(session, runs)
    train_all(session, runs, targets)
    asked = {"temperature": pair[0], "alpha": pair[1], "seeds": list(plan.seeds(arguments))}
    return asked | {"variant": runs[0].settings.variant, "shared": runs[0].settings.shared}


def choose_pairs(session, teachers, digest, targets):
    """The sweep: trains students for every pair of temperature and alpha on a part of the training images, and returns
    the pair with the best accuracy on the rest, of the loss of the user's own where there is one, and that of plain
    distillation. The `teachers`, whose digest is `digest`, have seen that rest: where the same ones trained without it
    are there, these give the soft targets, in place of `targets`."""
    arguments, loaded, pairs = session.arguments, session.data, plan.pairs(session.arguments)
    fraction = plan.val_fraction(arguments)
    judged = data.split(loaded.train_labels, fraction, session.transfer_set)[1]
    if not len(judged):
        raise Failure(
            "A sweep needs images to judge on: students see too few of each class. Give a larger --val-fraction or "
            "--train-fraction."
        )
    of_these = " that students see" if len(session.transfer_set) < len(loaded.train_labels) else ""
    session.group.say(
        f"Sweep: {len(pairs)} pairs of temperature and alpha, judged on {len(judged):,} of the "
        f"{len(session.transfer_set):,} training images{of_these}"
    )
    others = teaching.sweep_networks(session, teachers, fraction)
    if others:
        targets = teaching.soft_targets(session, others)
        teaching.say_size(session, targets, " of the sweep")
    other = "+".join(others) or None
    selection = plan.student_runs(arguments, loaded, digest, pairs, session.hooks, fraction, other)
    candidates = plan.student_runs(arguments, loaded, digest, pairs, session.hooks)
    prepare(session, selection + candidates)  # of all pairs: with --overwrite none is found again if this is resumed
    later = plan.student_runs(arguments, loaded, digest, pairs[:1], session.hooks)
    train_all(session, selection, targets, later=later)
    shared, variant = selection[0].settings.shared, selection[0].settings.variant
    best = partial(records.best_pair, arguments.output_dir, pairs, plan.seeds(arguments), shared)
    pair, plain = session.group.agree(lambda: [best(variant), best()])
    words = f"temperature {pair[0]}, alpha {pair[1]}"
    if variant:
        words += f" with {session.hooks.loss.function}; temperature {plain[0]}, alpha {plain[1]} without"
    session.group.say(f"Best on the validation part: {words}")
    return pair, plain


def prepare(session, runs):
    """Before any of `runs` is trained: removes what exists of them with --overwrite, or else refuses what differs.
    Where torchrun restarts a group, nothing is removed again."""
    group, overwrite = session.group, session.arguments.overwrite
    session.options.stop.runs_removed = bool(overwrite)
    with group.first(), group.once(runs[0].folder) as is_new:
        if group.leads and (is_new or not overwrite):
            plan.prepare(runs, session.machine, overwrite)


def train_all(session, runs, targets=None, later=()):
    """Trains what is not yet finished of `runs`, shared by the group, and prints each one's accuracy. `targets` are the
    teachers' soft targets, `later` the runs that the command trains afterwards, for the time left."""
    students = runs[0].settings.role != "teacher"
    group, images, tally = session.group, len(session.transfer_set if students else session.data.train_labels), None
    left, afterwards = group.agree(lambda: [plan.epochs_left(runs), sum(plan.epochs_left(later))])
    work = [count * run.settings.images_per_label for count, run in zip(left, runs, strict=True)]
    order = [position for position in range(len(runs)) if left[position]]
    for run in (runs[position] for position in range(len(runs)) if group.leads and not left[position]):
        reached, code = accuracy_of(run, run.finished_accuracy()), ", ".join(run.changed_code())
        since = f", begun with another {code}; --overwrite trains all runs of this command again" if code else ""
        print(f"{reached} (finished before{since})", flush=True)
    if group.size > 1 and order:
        order.sort(key=lambda position: -work[position])  # the longest first
        if asked := [left[position] for position in order if runs[position].settings.asks_teacher]:
            targets.share(group, range(session.arguments.epochs - max(asked), session.arguments.epochs))
        tally = Tally(group, len(order), sum(work), afterwards)
    for position in group.share(order):
        run = runs[position]
        title = run.name if len(runs) == 1 else f"[{position + 1}/{len(runs)}] {run.name}"
        accuracy = train(
            run, session.data, session.machine, session.options,
            teacher=targets if run.settings.asks_teacher else None, title=group.prefix + title,
            later=(sum(work[position + 1 :]) + afterwards) * images, tally=tally,
        )  # fmt: skip
        print(f"{group.prefix}{accuracy_of(run, accuracy)}", flush=True)
    group.barrier()
    group.wait_for_files(lambda: plan.are_finished(runs), f"a run that is finished in {runs[0].folder.parent}")


def accuracy_of(run, accuracy):
    """The line that says how well a run went."""
    return f"{run.folder}: {measured(vars(run.settings))} accuracy {accuracy:.4f}"


if __name__ == "__main__":
    sys.exit(exit_status(main))
