"""Which teachers a command uses: found in their folders before PyTorch is imported, verified afterwards."""

import os
import re
import shlex
import subprocess
from pathlib import Path

from arguments import FOLDER_OPTIONS, command
from runs.files import Damaged, Failure, decode, read_json
from runs.settings import (
    RECIPE,
    UNFAIR_SWEEP,
    VIEWS_VERSION,
    RunRecord,
    Settings,
    complete,
    default_augmentation,
    default_learning_rate,
    differences,
    run_name,
)

DIFFER = 0.005  # by what share of the test images two devices' answers may differ in whether they are right
TAKES = "--teacher takes the folder of a finished run, or its model.pt."


def find_teachers(arguments):
    """The paths of the finished teachers' model.pt; raises Failure where one is missing. Needs no PyTorch."""
    return [_find_teacher(arguments, named) for named in arguments.teacher or [None]]


def _find_teacher(arguments, named):
    output = Path(arguments.output_dir)
    if named:
        folder = Path(named)
        if folder.is_file():
            return folder
        if not folder.is_dir():
            raise Failure(f"--teacher {folder} does not exist. {TAKES}")
    else:
        folder = output / _own_name(arguments, arguments.seed)
        if not folder.is_dir():
            own = arguments.teacher_network  # with a network only its own
            pattern = f"{folder.name.rpartition('-')[0]}-s*" if own else "teacher-*"
            others = sorted(
                {each.parent for name in ("model.pt", "run.json") for each in output.glob(f"{pattern}/{name}")}
            )
            if len(others) > 1:
                raise Failure(
                    f"{output} holds several teachers. Name one with --teacher, or several as an ensemble: "
                    f"{' '.join(map(str, others))}"
                )
            folder = others[0] if others else folder
    if (folder / "model.pt").is_file():
        return folder / "model.pt"
    if (folder / "run.json").is_file():
        raise Failure(_unfinished(arguments, folder))
    if named and (inside := sorted(folder.glob("teacher-*/model.pt"))):
        found = " ".join(str(each.parent) for each in inside)
        raise Failure(f"--teacher {named} is not a teacher's folder, but it holds teachers. Name them: {found}")
    if named:
        number = re.fullmatch(r".*-s(\d+)", folder.name)  # is it what the command below would train?
        if not number or folder.name != _own_name(arguments, int(number[1])):
            raise Failure(f"{folder} holds no model.pt. {TAKES}")
    changed = {"output_dir": str(folder.parent), "seed": int(number[1])} if named else {}
    what = f"teacher with the network {arguments.teacher_network}" if arguments.teacher_network else "teacher"
    raise Failure(
        f"There is no {what} in {named or output} yet. Train one first:\n{teacher_command(arguments, **changed)}"
    )


def _own_name(arguments, seed):
    """The name of the folder of the teacher that these arguments would train."""
    own = arguments.teacher_network and (arguments.teacher_network.rpartition(":")[2],)
    return run_name("teacher", None, None, seed, shared=(1.0, (), own))


def _unfinished(arguments, folder, known=()):
    """What to say of a teacher that is not finished: how far it is, and the command that resumes it; `known` are
    options of it, {name: value}, that do not depend on its run.json."""
    changed, resumes = {"output_dir": str(folder.parent), **dict(known)}, True
    try:
        record = read_json(folder / "run.json", RunRecord)
        settings = record.settings
        resumes = settings.role == "teacher"  # a student takes more words than are known here
        progress = f"epoch {record.epochs_done} of {settings.epochs}"
        changed |= _typed(settings)
        if settings.val_fraction:
            changed["output_dir"] = str(folder.parent.parent)
        typed = ("dataset", "data_dir", "device", "precision", "compile", "teacher_network", *FOLDER_OPTIONS)
        changed |= {name: record.recorded[name] for name in typed if name in record.recorded}
    except Damaged:
        progress = "its run.json is damaged"
    if not resumes:
        return f"The student in {folder} is unfinished ({progress}). Finish it with the command that began it."
    return (
        f"The teacher in {folder} is unfinished ({progress}). Finish it with its own command:\n"
        f"{teacher_command(arguments, **changed)}"
    )


def _typed(settings, arguments=None):
    """What to type for a teacher with these Settings, {name of the option: value}; of networks that `arguments` name
    its own."""
    same = ("epochs", "image_size", "batch_size", "weight_decay", "label_smoothing", "seed", "width")
    typed = {name: getattr(settings, name) for name in same}
    usual = default_augmentation("teacher", settings.epochs, settings.image_size)
    typed |= {name: value for name, value in settings.augmentation.items() if value != usual[name]}
    typed["mirror"] = None if settings.mirror else False  # whatever the students' command says
    if settings.learning_rate != default_learning_rate(settings.batch_size, settings.network):
        typed["lr"] = settings.learning_rate
    if settings.val_fraction:
        typed["val_fraction"] = settings.val_fraction
    if not settings.network:
        typed["teacher_network"] = None
    elif arguments:
        named = [*filter(None, [arguments.teacher_network, *arguments.other_networks, arguments.student])]
        named = [name for name in named if name.rpartition(":")[2] == settings.network]
        own = [name for name in named if Path(name.rpartition(":")[0]).name == settings.network_file]
        typed["teacher_network"] = (own or named)[0]
    return typed


def find_sweep_teachers(arguments, teachers, fraction):
    """The paths of the same `teachers`, pairs of path and network, trained without the part `fraction` of the training
    images, on which a sweep is judged; and what to say where one is missing, else None. They are sought in selection/
    beside the teacher and in that of the output folder. Raises Failure where one is unfinished."""
    paths, commands, names = [], [], set()
    for path, network in teachers:
        if network.settings.get("role") != "teacher":
            return [], f"{UNFAIR_SWEEP} Of a student that teaches there is none that was not."
        settings = decode(network.settings, Settings, path)
        if not settings.epochs:
            return [], f"{UNFAIR_SWEEP} (It was trained elsewhere; here it is taken for one that has seen them.)"
        if settings.val_fraction >= fraction:
            paths.append(path)
            continue
        if settings.name in names:
            return [], f"{UNFAIR_SWEEP} Of two teachers named {settings.name} there can be only one that was not."
        names.add(settings.name)
        wanted = {**_typed(settings, arguments), "val_fraction": fraction}
        folders = [Path(output) / "selection" / settings.name for output in (path.parent.parent, arguments.output_dir)]
        folders = [folder for folder in folders if folder.resolve() != path.parent.resolve()]
        found = next((folder for folder in folders if (folder / "model.pt").is_file()), None)
        begun = next((folder for folder in folders if (folder / "run.json").is_file()), None)
        if found:
            paths.append(found / "model.pt")
        elif begun:
            raise Failure(_unfinished(arguments, begun, {**wanted, "output_dir": str(begun.parent.parent)}))
        elif is_old(settings):
            return [], f"{UNFAIR_SWEEP} (An older version trained it, and this one trains none that matches it.)"
        else:
            commands.append(teacher_command(arguments, **wanted))
    if not commands:
        return paths, None
    begun = Path(arguments.output_dir) / "selection" / "kd-*"
    how = f"For a fair sweep stop this one, remove {begun}, train a teacher that has not seen them, and sweep again"
    return [], f"{UNFAIR_SWEEP}\n{how}:\n" + "\n".join(commands)


def is_old(settings):
    """Whether this version of the program trains by another recipe than that of these Settings, or on other views."""
    return (settings.recipe, settings.views) != (RECIPE, VIEWS_VERSION)


def check_sweep_teacher(arguments, path, network, original, teacher, fraction):
    """Raises Failure unless `network`, from `path`, was trained as the `teacher` from `original` was, apart from the
    part `fraction` of the images or more that it did not see."""
    wanted, found = ({**complete(each.settings), "val_fraction": None} for each in (teacher, network))
    phrases = differences(found, wanted)
    if network.settings["val_fraction"] < fraction:
        phrases.append(f"val fraction {network.settings['val_fraction']} instead of {fraction}")
    if phrases:
        settings, output = decode(teacher.settings, Settings, original), str(path.parents[2])
        again = {"val_fraction": fraction, "overwrite": True, "output_dir": output}
        command = teacher_command(arguments, **_typed(settings, arguments) | again)
        train = f"Remove its folder, or train it again:\n{command}"
        older = "Move its folder away: an older version trained that teacher, and this one trains none that matches it."
        raise Failure(
            f"{path} is not {original} trained without the validation images: {', '.join(phrases)}.\n"
            f"{older if is_old(settings) else train}"
        )


def spare_teachers(paths, runs):
    """Raises Failure where --overwrite would remove a teacher: a student that other students are to be distilled from,
    and that is one of the `runs` of this command."""
    models = {run.model.resolve() for run in runs}
    for path in paths:
        if path.resolve() in models:
            raise Failure(
                f"--overwrite would remove {path}, which is named as a teacher. Choose another --output-dir, or leave "
                "--overwrite out."
            )


def teacher_command(arguments, **changed):
    """The command that trains the teacher which these arguments need, some of them `changed`."""
    names = ("dataset", "data_dir", "epochs", "image_size", "mirror", "output_dir", "teacher_network", *FOLDER_OPTIONS)
    values = {name: getattr(arguments, name) for name in names} | changed
    if values["dataset"] != "folder":
        values |= dict.fromkeys(FOLDER_OPTIONS)  # --skip-damaged of --unlabeled, which no teacher sees
    if values["dataset"] == "shapes":
        del values["data_dir"]
    words = command(values)
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def _names(classes, others):
    """The names of `classes`; of many, how many, and a few of those that are not among the `others`."""
    if len(classes) <= 10:
        return ", ".join(classes)
    own = [name for name in classes if name not in others]
    return f"{len(classes)} names" + (f" (among them {', '.join(own[:3])})" if own else "")


def check_image_size(arguments, teachers):
    """Raises Failure where one of the `teachers`, pairs of path and network, takes images of another size: before any
    image is decoded."""
    for path, teacher in teachers:
        size = teacher.image_size
        if size != arguments.image_size:
            raise Failure(
                f"The teacher {path} was trained for the image size {size} instead of {arguments.image_size}. Add "
                f"--image-size {size}, or name another teacher."
            )


def check_networks(hooks, teachers):
    """Raises Failure where a network that is named for a teacher is that of none of the `teachers`, pairs of path and
    network: it would not be used."""
    known = [(teacher.settings.get("network"), teacher.settings.get("network_sha256")) for _, teacher in teachers]
    for hook in (hooks.teacher, *hooks.others):
        if hook and (hook.function, hook.sha256) not in known:
            raise Failure(
                f"{hook} is the network of no teacher here: {', '.join(str(path) for path, _ in teachers)}. Leave it "
                "out, or name its teacher with --teacher."
            )


def check_teacher(arguments, data, path, teacher):
    """Raises Failure where a `teacher`, the network loaded from `path`, does not fit the data."""
    found, wanted = _names(teacher.classes, data.classes), _names(data.classes, teacher.classes)
    if found != wanted:
        raise Failure(f"The teacher {path} was trained for the classes {found} instead of {wanted}.")
    if teacher.settings.get("data") != data.digest:
        kept = {} if teacher.settings.get("epochs") else {"epochs": 0}
        command = teacher_command(arguments, output_dir=f"{Path(arguments.output_dir)}-2", **kept)
        raise Failure(
            f"The teacher {path} was trained on other images than these (or on the same under other names, in another "
            f"order). Train one on these, and students beside it, in another output folder, such as:\n{command}"
        )


def check_answers(path, teacher, accuracy, count):
    """Raises Failure where a `teacher`, the network loaded from `path`, has another `accuracy` on the `count` test
    images than is recorded in it, by more than what another device may differ in."""
    if not teacher.settings.get("val_fraction") and round(abs(accuracy - teacher.accuracy) * count) > max(
        2, DIFFER * count
    ):
        raise Failure(
            f"The teacher {path} answers otherwise than when it was trained: its test accuracy is {accuracy:.4f}, and "
            f"was {teacher.accuracy:.4f}. models.py has changed since, or its network keeps something outside of its "
            "state_dict, or this device computes wrongly (try --device cpu)."
        )
