"""Which runs a command needs, and whether what exists of them can be used; nothing is trained or changed here but by
`prepare`."""

import itertools
from pathlib import Path

from runs.files import read_json
from runs.hooks import settings_of
from runs.run import Run
from runs.settings import SPLIT_VERSION, RunRecord, Settings, default_augmentation, default_learning_rate


def _settings(arguments, data, role, seed, images, network, **rest):
    size = min(arguments.batch_size, images)
    return Settings(
        role=role,
        data=data.digest,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        learning_rate=arguments.lr or default_learning_rate(size, network),
        weight_decay=arguments.weight_decay,
        seed=seed,
        image_size=arguments.image_size,
        label_smoothing=arguments.label_smoothing,
        width=width(arguments, role),
        **augmentation(arguments, role),
        **settings_of("network", network),
        **rest,
    )


def augmentation(arguments, role):
    """What is done to the views of a command's runs of this `role`: `padding`, `cutout` and `mirror` of data.Views."""
    usual = default_augmentation(role, arguments.epochs, arguments.image_size)
    return usual | {name: given for name in usual if (given := getattr(arguments, name)) is not None}


def width(arguments, role):
    """By what the channels of a command's networks of this `role` are multiplied: --width is for those that the command
    is about, teachers with --train-teacher, else students."""
    return arguments.width if (role == "teacher") == bool(arguments.train_teacher) else 1.0


def seeds(arguments):
    """The seeds of a command's runs."""
    return range(arguments.seed, arguments.seed + arguments.seeds)


def pairs(arguments):
    """All pairs of temperature and alpha that were asked for."""
    return list(itertools.product(arguments.temperature, arguments.alpha))


def omitted(arguments, data):
    """The names of the classes that students do not see, in the order of the data's; what is no class comes last."""
    asked = set(arguments.omit_class or ())
    return (*(name for name in data.classes if name in asked), *sorted(asked.difference(data.classes)))


def val_fraction(arguments):
    """The part of the training images on which a sweep is judged."""
    return arguments.val_fraction or 0.1


def teacher_runs(arguments, data, hooks):
    """The runs of the teachers that a command trains: with --train-teacher one for each seed, and with --val-fraction
    those for a sweep, which do not see that part; with --demo one."""
    wanted, fraction = [arguments.seed], 0.0
    if arguments.train_teacher:
        wanted, fraction = seeds(arguments), arguments.val_fraction or 0.0
    about = len(data.train_labels), hooks.teacher
    settings = [_settings(arguments, data, "teacher", seed, *about, val_fraction=fraction) for seed in wanted]
    folder = Path(arguments.output_dir) / ("selection" if fraction else "")
    return [Run(folder / each.name, each, hooks) for each in settings]


def student_runs(arguments, data, teacher, pairs, hooks, fraction=0.0, sweep_teacher=None, plain_pairs=None):
    """The runs of students: for every seed those with distillation for each of `pairs`, with the loss of the user's own
    if `hooks` has one, or with images without labels if `data` has some; those of plain distillation, for each of
    `plain_pairs` [`pairs`]; and the baseline. `teacher` is a digest. With `fraction` they are those of a sweep, which
    are judged on that part of the training images, and `sweep_teacher` is the digest of the teacher that has not seen
    it, where there is one."""
    folder = Path(arguments.output_dir) / ("selection" if fraction else "")
    shared = {"train_fraction": arguments.train_fraction, "omit_class": omitted(arguments, data)}
    images = len(data.transfer_set(*shared.values()))
    part = fraction and images < len(data.train_labels)
    judged = {"val_fraction": fraction, "split": SPLIT_VERSION if part else None}
    taught = {"teacher": teacher, "sweep_teacher": sweep_teacher}
    variant = {"unlabeled": data.unlabeled.digest} if data.unlabeled else settings_of("loss", hooks.loss)
    ways = [(pair, variant) for pair in pairs] if variant else []
    ways += [(pair, {}) for pair in plain_pairs or pairs]
    distilled = [{"role": "kd", "temperature": t, "alpha": a, **taught, **more} for (t, a), more in ways]
    runs = []
    for seed in seeds(arguments):
        for rest in (*distilled, {"role": "baseline"}):
            common = {"seed": seed, "images": images, "network": hooks.student, **judged}
            settings = _settings(arguments, data, **common, **shared, **rest)
            runs.append(Run(folder / settings.name, settings, hooks))
    return runs


def all_student_runs(arguments, data, hooks):
    """All runs of students that a command may train, its sweep's too, as far as their folders tell them apart."""
    fractions = [0.0, val_fraction(arguments)] if arguments.sweep else [0.0]
    return [run for each in fractions for run in student_runs(arguments, data, None, pairs(arguments), hooks, each)]


def epochs_left(runs):
    """How many epochs each of `runs` has still to train: 0 for a finished one."""
    left = []
    for run in runs:
        begun = run.record.is_file() and run.state.is_file()
        done = read_json(run.record, RunRecord).epochs_done if begun and not run.is_finished else 0
        # an unfinished run that has all its epochs has yet to write its results
        left.append(0 if run.is_finished else max(1, run.settings.epochs - done))
    return left


def are_finished(runs):
    """Whether this machine sees that all of `runs` are finished."""
    return all(run.is_finished and run.record.is_file() and read_json(run.record, RunRecord).finished for run in runs)


def prepare(runs, machine, overwrite):
    """Before any of `runs` is trained: removes what exists of them with `overwrite`, or else raises Failure at the
    first that can be neither reused nor resumed."""
    for run in runs:
        if overwrite:
            run.remove()
        else:
            run.check(machine)
