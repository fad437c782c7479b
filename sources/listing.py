"""Which files of a folder are images, and what of it is passed over."""

import os
from collections import Counter
from dataclasses import dataclass, field

from sources.decode import image_formats

# What file managers, cameras' cards and network drives put beside images.
SYSTEM_FOLDERS = {
    "@eadir", "@__thumb", "@recycle", "#recycle", "#snapshot", "__macosx", "$recycle.bin", "system volume information",
    "lost+found", ".thumbnails", ".thumb", ".trash", ".trashes",
}  # fmt: skip
SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", ".ds_store"}

ADVICE = {
    ("heic", "heif", "hif"): "pip install pillow-heif to read them",
    ("avif", "avifs"): "pip install --upgrade pillow to read them",
    ("arw", "cr2", "cr3", "crw", "dng", "nef", "nrw", "orf", "pef", "raf", "rw2", "srw"): "raw images of a camera: "
    "export them as JPEG or TIFF",
    ("jxl", "jxr", "svg", "svgz", "ai", "eps", "ps", "pdf", "xcf", "wmf", "emf"): "export them as PNG",
    ("exr", "hdr", "dcm", "nii", "fits", "fit", "npy", "npz", "mat", "h5", "hdf"): "export them as TIFF or PNG",
    ("avi", "mkv", "mov", "mp4", "mpeg", "mpg", "webm"): "videos: export single frames",
    ("7z", "gz", "rar", "tar", "tgz", "zip"): "archives: unpack them",
}
AGAIN = "folder(s) met again through a link"
WRITTEN = "folder(s) where this program writes"
RECORD, WEIGHTS = "run.json", ("model.pt", "state.pt")  # in the folder of a run
WRITES = {"data", "figures", "selection", "targets"}  # folders that it writes beside runs
AROUND = "link(s) to a folder around this one"
LONGEST = 8  # kinds of files that a line names


@dataclass
class Found:
    """The `paths` of a folder's images, as text (60,000 Paths take a second), and what was `passed` over: counts by
    suffix, or by other words."""

    paths: list[str] = field(default_factory=list)
    passed: Counter = field(default_factory=Counter)

    def passed_over(self):
        """What was passed over, in words; "" where it was nothing."""
        kinds = sorted(self.passed.items(), key=lambda item: (-item[1], item[0]))
        words = [f"{count:,} {kind}{_advice(kind)}" for kind, count in kinds[:LONGEST]]
        if rest := sum(count for _, count in kinds[LONGEST:]):
            words.append(f"{rest:,} of other kinds")
        return ", ".join(words)


def _advice(kind):
    return next((f" ({advice})" for suffixes, advice in ADVICE.items() if kind[1:] in suffixes), "")


def is_class_folder(entry):
    """Whether an entry of os.scandir may be the folder of a class."""
    return _is(entry.is_dir) and not _is_hidden(entry.name)


def class_folders(top):
    """The names of the class folders in a folder, sorted. Raises OSError where it cannot be read."""
    with os.scandir(top) as entries:
        return sorted(entry.name for entry in entries if is_class_folder(entry))


def is_image(entry):
    """Whether an entry of os.scandir is a file with the suffix of an image, and not hidden."""
    return _is(entry.is_file) and not entry.name.startswith(".") and _suffix(entry.name) in image_formats()[1]


def is_run(entry):
    """Whether an entry of os.scandir is the folder of a run of this program."""
    paths = (os.path.join(entry.path, name) for name in WEIGHTS)
    return _is(entry.is_dir) and os.path.exists(os.path.join(entry.path, RECORD)) and any(map(os.path.exists, paths))


def find_images(folder, top=None, seen=None, output=None):
    """The images in `folder` and below it: a Found, sorted within each folder. Raises OSError where a folder cannot be
    read.

    What this program wrote is passed over, in any folder with runs in it and in the real path `output`. Links are
    followed. A folder is read once, whatever links lead there: `seen` are the real paths of those read so far, {path:
    the `folder` it was read for}; `top` is the real path of the folder [this one] whose inside needs no link to be
    read.
    """
    suffixes, found = image_formats()[1], Found()
    real = os.path.realpath(folder)
    left = [(os.fspath(folder), real, top is not None and os.path.islink(folder))]
    top, seen = top or real, {} if seen is None else seen
    while left:
        path, real, is_link = left.pop()
        if is_link and inside(top, real):
            found.passed[AROUND] += 1
            continue
        if real in seen or (is_link and is_walked(real, top)):
            found.passed[AGAIN] += 1
            continue
        seen[real] = os.fspath(folder)
        folders = []
        with os.scandir(path) as there:
            entries = sorted(there, key=lambda entry: entry.name)
        runs = {entry.name for entry in entries if is_run(entry)}
        written = runs | WRITES if runs or real == output else set()
        if written:
            found.passed[WRITTEN] += 1
        for entry in entries:
            name = entry.name
            if _is(entry.is_dir):
                if name in written:
                    continue
                if name.lower() in SYSTEM_FOLDERS:
                    found.passed[f"folder {name} of the system"] += 1
                elif _is_hidden(name):
                    found.passed["hidden"] += 1
                else:
                    linked = entry.is_symlink()
                    target = os.path.realpath(entry.path) if linked else os.path.join(real, name)
                    folders.append((entry.path, target, linked))
                continue
            suffix = _suffix(name)
            if name.lower() in SYSTEM_FILES or name.startswith("._") or (written and not is_image(entry)):
                continue
            if name.startswith("."):
                found.passed["hidden"] += 1
            elif not _is(entry.is_file) and not entry.is_symlink():  # a pipe would never end
                found.passed["neither file nor folder"] += 1
            elif suffix in suffixes:  # even of a link that leads nowhere, which is then named as damaged
                found.paths.append(entry.path)
            else:
                found.passed[suffix or "without a suffix"] += 1
        left += reversed(folders)
    return found


def _suffix(name):
    return os.path.splitext(name)[1].lower()


def _is(check):
    try:
        return check()
    except OSError:  # a link to itself
        return False


def _is_hidden(folder_name):
    return folder_name.startswith(".") or folder_name.lower() in SYSTEM_FOLDERS


def inside(path, folder):
    """Whether a real path is another one or below it."""
    return path == folder or path.startswith(os.path.join(folder, ""))


def is_walked(path, top):
    """Whether all that is read below `top` without any link holds `path`, both being real paths."""
    return inside(path, top) and not any(map(_is_hidden, os.path.relpath(path, top).split(os.sep)))
