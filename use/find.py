"""Which model and which images a command uses, found before PyTorch is imported."""

import os
import stat
import sys
from pathlib import Path

from runs.files import Damaged, Failure, read_json, reason
from runs.settings import RunRecord

OF_SHELLS = ("/dev/fd/", "/proc/")  # where the pipe of a shell's <(command) is


def find_model(arguments):
    """The path of the model.pt that --model names, or of the output folder's only distilled student; raises Failure
    where there is none or more than one."""
    if arguments.model:
        return _named_model(Path(arguments.model))
    output = Path(arguments.output_dir)
    students = sorted(output.glob("kd-*/model.pt"))
    if len(students) == 1:
        return students[0]
    if students:
        raise Failure(f"{output} holds several distilled students. Name one with --model:\n{_lines(students)}")
    others = sorted(output.glob("*/model.pt"))
    named = f", such as:\n{_lines(others)}" if others else "."
    raise Failure(
        f"There is no finished distilled student in {output}. Train one with python main.py, choose another "
        f"--output-dir, or name a model with --model{named}"
    )


def _named_model(path):
    if path.is_file():
        return path
    if not path.is_dir():
        raise Failure(f"--model {path} does not exist.")
    if (path / "model.pt").is_file():
        return path / "model.pt"
    if (path / "run.json").is_file():
        try:
            record = read_json(path / "run.json", RunRecord)
            progress = f"epoch {record.epochs_done} of {record.settings.epochs}"
        except Damaged:
            progress = "its run.json is damaged"
        raise Failure(f"The run in {path} is unfinished ({progress}). Finish it with the command that began it.")
    inside = sorted(path.glob("*/model.pt"))
    if inside:
        raise Failure(f"--model {path} is not a run's folder, but it holds models. Name one:\n{_lines(inside)}")
    raise Failure(f"--model {path} holds no model.pt.")


def _lines(models):
    return "\n".join(f"  {each.parent}" for each in models)


def find_images(paths):
    """All images that `paths` name, files and folders: a list of (image path, folder names), the names being those of
    the folders around the image, from the one that was named inwards.

    Raises Failure where a path does not exist, or a folder cannot be read or holds no image.
    """
    from sources import listing  # only here, since importing Pillow takes a moment

    images = []
    for path in paths:
        if os.path.isdir(path):
            try:
                inside = listing.find_images(path)
            except OSError as error:
                raise Failure(f"cannot read {error.filename or path}: {reason(error)}.") from error
            found, passed_over = inside.paths, inside.passed_over()
            if not found:
                raise Failure(
                    f"{path} holds no image{f' that can be read, only {passed_over}' if passed_over else ''}."
                )
            if passed_over:
                print(f"{path}: {len(found):,} images taken; passed over: {passed_over}", file=sys.stderr)
        elif os.path.exists(path):
            if stat.S_ISFIFO(os.stat(path).st_mode) and not str(path).startswith(OF_SHELLS):
                raise Failure(f"--predict {path} is a named pipe, which may never end: save what it gives as a file.")
            found = [path]
        else:
            raise Failure(f"--predict {path} does not exist.")
        images += ((image, _around(image, path)) for image in found)
    return images


def _around(image, named):
    """The names of the folders around an image, from the folder `named` inwards; of a single file, its folder's."""
    image, named = Path(os.path.abspath(image)), Path(os.path.abspath(named))
    top = named.parent if image != named else named.parent.parent
    return image.relative_to(top).parts[:-1]
