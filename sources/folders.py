"""Images in folders: DIRECTORY/train/CLASS/… and DIRECTORY/test/CLASS/…, decoded once and memory-mapped afterwards."""

import hashlib
import itertools
import os
import re
import socket
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

from runs.files import Damaged, Failure, reason, remove, write
from sources import Facts, kept, one_line
from sources.listing import WRITTEN, Found, class_folders, find_images, is_class_folder, is_image, is_run, is_walked
from sources.ranges import ALPHA, plain

HELD_OUT = ("test", "val", "valid", "validation")  # the first that exists holds the test images
# Words of names of a data set's parts, however they are written: Training, seg_test, pred.
NO_CLASSES = {"train", "training", "testing", "pred", *HELD_OUT}
NAMED = 20  # damaged images named on the screen


def load(
    directory, image_size=32, workers=2, cache=None, *, test_fraction=None, skip_damaged=False, say=lambda line: None,
    agree=lambda find: find(),
):  # fmt: skip
    """The images of `directory`, decoded by `workers` threads, as (arrays, Facts): the arrays are (classes, training
    images, training labels, test images, test labels).

    Decoded images are kept in the folder `cache` and memory-mapped from there; an image file whose name, size and time
    are unchanged is not decoded again. Without `cache` they are held in memory. `test_fraction` of each class's images
    become the test set of a folder that has none; with `skip_damaged` images that cannot be decoded are left out. What
    was found is told to `say`, line by line; `agree` gives what the first of a group of processes finds
    (runs.group.Group). Raises Failure where the folders are not as they should be, and Damaged where images cannot be
    decoded.
    """
    directory, cache = Path(directory), cache and Path(cache)
    places = _places(directory, test_fraction, say)
    splits = [_listing(place, say, cache and cache.parent) for place in places]
    names = list(splits[0])
    if names != list(splits[-1]):
        odd = ", ".join(sorted(splits[0].keys() ^ splits[1].keys()))
        raise Failure(f"the classes in {places[0]} and {places[1]} differ: {odd} is in one only.")
    paths = _paths(splits)
    keys = dict(zip(paths, kept.file_keys(directory, paths), strict=True))
    place = place_of(directory, keys.values(), agree)
    file = cache and cache / f"images-{place}-{image_size}.npy"

    def decode(splits):
        paths = _paths(splits)
        return kept.load(paths, [keys[path] for path in paths], image_size, workers, file)

    if test_fraction:
        found = kept.content_hashes(paths, [*keys.values()], workers, cache and cache / f"contents-{place}.json")
        split = partial(_split, splits[0], dict(zip(paths, found, strict=True)), test_fraction)
        known = kept.known_damaged(file)
        splits = split({path for path in paths if keys[path] in known})
    decoded = decode(splits)
    if test_fraction and skip_damaged:  # what is left out is no part of the fraction
        whole = split({path for path in paths if keys[path] in decoded.damaged})
        if whole != splits:
            splits, decoded = whole, None  # Windows replaces no file that is mapped
            decoded = decode(splits)
    paths = _paths(splits)
    counts = [[len(found) for found in listing.values()] for listing in splits]
    labels = np.repeat(np.tile(np.arange(len(names)), 2), [*counts[0], *counts[1]])
    is_test = np.arange(len(paths)) >= sum(counts[0])
    ranges = decoded.record.ranges
    say_ranges(decoded.record, say)
    identity = {"test_fraction": test_fraction} if test_fraction else {}
    record = {**identity} or {"test_folder": places[1].name}
    if ranges:
        record["ranges"] = ranges
    whole = np.array([keys[path] not in decoded.damaged for path in paths])
    bad = {path: decoded.damaged[keys[path]] for path in itertools.compress(paths, ~whole)}
    listed = list_damaged(bad, cache and cache / "damaged.txt")
    if bad:
        if not skip_damaged:
            raise Damaged(damage(bad, len(paths), listed))
        record["skipped"] = _skipped(names, labels, is_test, whole)
        record["skipped_files"] = sorted(relative(path, directory) for path in bad)
        say(_left_out(record["skipped"], len(bad), len(paths), listed))

    images, labels, train = decoded.images, labels[whole], int((whole & ~is_test).sum())
    arrays = ([_readable(name) for name in names], images[:train], labels[:train], images[train:], labels[train:])
    good = [relative(path, directory) for path in itertools.compress(paths, whole)]
    sizes = dict(Counter(decoded.record.sizes).most_common())
    return arrays, Facts(identity, ranges, record, (good[:train], good[train:]), sizes)


def place_of(directory, keys, agree):
    """What the names of the files begin with that keep what was decoded of `directory`, whose files have these `keys`
    (kept.file_keys); `agree` as in `load`."""
    place = hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:12]
    here = hashlib.sha256("".join(keys).encode()).hexdigest()
    # A machine with a copy of its own, whose files have other times, keeps apart what it decodes.
    return place if agree(lambda: here) == here else f"{place}-{socket.gethostname()}"


def _readable(name):
    """A class name as other programs can read it: what is not UTF-8 is escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def relative(path, directory):
    """The path of a file below `directory` as seen from there, as other programs can read it."""
    return _readable(kept.relative(path, directory)).replace(os.sep, "/")


def _paths(splits):
    return [path for listing in splits for found in listing.values() for path in found]


def _places(directory, test_fraction, say):
    """The folders of classes: of the training and of the test images, or, with `test_fraction`, the only one."""
    train, there = directory / "train", [directory / name for name in HELD_OUT if (directory / name).is_dir()]
    held_out = [place for place in there if class_folders(place)]  # others hold images without labels, or are classes
    layout = (
        "An image folder has one sub-folder per class in train and in test:\n"
        f"{directory}/train/CLASS/IMAGE and {directory}/test/CLASS/IMAGE\n"
    )
    if test_fraction and train.is_dir() and class_folders(train):
        if held_out:
            raise Failure(f"{held_out[0]} holds test images already: leave --test-fraction out, or remove that folder.")
        for place in there:
            say(f"{place} has no class folders: its images are not used")
        return [train]
    if test_fraction:
        if not directory.is_dir():
            raise Failure(
                f"{directory} does not exist. --test-fraction needs one folder of classes: {directory}/CLASS/IMAGE"
            )
        names = class_folders(directory)
        if names and all(NO_CLASSES & {*re.split("[^a-z]+", name.lower())} for name in names):
            raise Failure(f"{train} does not exist, only {', '.join(names)} beside it. {layout}".rstrip())
        for place in held_out:
            if {*names} & {*class_folders(place)}:
                raise Failure(
                    f"{place} seems to hold test images of the classes beside it. Move these into {train} and leave "
                    f"--test-fraction out, or move {place} elsewhere."
                )
        return [directory]
    if not train.is_dir() or not held_out:
        if not train.is_dir():
            what, of = f"{train} does not exist", "Of one folder of classes"
        elif there:
            what, of = f"{there[0]} has no class folders, so that nothing says what its images show", f"Of {train}"
        else:
            others = f"{', '.join(HELD_OUT[1:-1])} or {HELD_OUT[-1]} beside it"
            what = f"{directory / 'test'} does not exist, nor {others}"
            of = f"Of {train}" if class_folders(train) else "Of one folder of classes"
        raise Failure(f"{what}. {layout}{of} --test-fraction 0.2 takes a fifth of each class for the test.")
    test = held_out[0]
    if test.name != "test":
        why = "has no class folders" if there[0].name == "test" else "does not exist"
        say(f"{directory / 'test'} {why}: the images of {test} are the test set")
    for other in there:
        if other not in (test, directory / "test"):
            say(f"{other} is not used: the test set is {test}")
    return [train, test]


def _listing(top, say, output):
    """{class name: [image paths]} of the folder `top`, sorted. A folder in which there are no images, but this program
    writes, to `output` now or elsewhere before, is no class."""
    real, output, passed = os.path.realpath(top), output and os.path.realpath(output), Counter()
    if output == real:
        raise Failure(f"{top} holds the classes: this program's runs must not lie beside them. Name an --output-dir.")
    seen, names = {real: os.fspath(top)}, []
    try:
        with os.scandir(top) as entries:
            there = sorted(entries, key=lambda entry: entry.name)
        for entry in there:
            if is_class_folder(entry):
                names.append(entry.name)
            elif is_image(entry):
                passed["beside the class folders"] += 1
        listing = {name: find_images(os.path.join(top, name), real, seen, output) for name in names}
    except OSError as error:
        raise Failure(f"cannot read {error.filename or top}: {reason(error)}.") from error
    for name in names:
        is_output = os.path.realpath(os.path.join(top, name)) == output
        if is_output and listing[name].paths and not _has_runs(output):
            raise Failure(f"{top / name} holds images: this program must not write among them. Name an --output-dir.")
        if is_output or (not listing[name].paths and listing[name].passed[WRITTEN]):
            passed.update({f"folder {name}, where this program writes": 1})
            del listing[name]
    if len(listing) < 2:
        count = f"{len(listing) or 'no'} class folder{'s' * (len(listing) != 1)}"
        raise Failure(f"{top} has {count}, but at least two classes are needed.")
    for name, found in listing.items():
        if not found.paths:
            _refuse_second_name(top / name, real, seen)
            only = f" that can be read, only {found.passed_over()}" if found.passed else ""
            raise Failure(f"{top / name} holds no image{only}. Put images there, or remove the folder.")
    every = Found([path for found in listing.values() for path in found.paths], passed)
    for found in listing.values():
        every.passed.update(found.passed)
    words = every.passed_over()
    say(f"{top}: {len(every.paths):,} images taken" + (f"; passed over: {words}" if words else ""))
    return {name: found.paths for name, found in listing.items()}


def _has_runs(folder):
    with os.scandir(folder) as entries:
        return any(map(is_run, entries))


def _refuse_second_name(folder, top, seen):
    """Raises Failure where the class `folder` is a link to images that another class has; `seen` as in find_images."""
    target = os.path.realpath(folder)
    owner = os.path.relpath(target, top).split(os.sep)[0] if is_walked(target, top) else seen.get(target)
    if folder.is_symlink() and owner:
        name = os.path.basename(owner)
        raise Failure(f"{folder} links to {target}, whose images are those of the class {name}. Remove that link.")


def _split(listing, hashes, fraction, bad):
    """The listing as two, training and test images. Of each class's different images `fraction` are test images, those
    whose files have the lowest SHA-256, but none with so many copies that more than `fraction` of the files would be.

    So names and order decide nothing, and copies of a file, under whatever classes, stay on one side. `hashes` are the
    SHA-256 by path, "" of a file that cannot be read; such files, and those in `bad`, are left in the training part and
    count for nothing. Raises Failure where a class has too few images.
    """
    copies = {
        name: Counter(hashes[path] for path in found if hashes[path] and path not in bad)
        for name, found in listing.items()
    }
    homes = {}  # the classes of each different file
    for name, counts in copies.items():
        if len(counts) < 2:
            how_many = "one image only" if counts else "no image"
            raise Failure(
                f"class {name} has {how_many} that can be read (copies aside): --test-fraction needs two or more of "
                "each."
            )
        for each in counts:
            homes.setdefault(each, []).append(name)
    most = {name: len(counts) - 1 for name, counts in copies.items()}  # at least one is left for training
    wanted = {name: min(most[name], max(1, round(fraction * len(counts)))) for name, counts in copies.items()}
    files = {name: max(1, round(fraction * counts.total())) for name, counts in copies.items()}
    taken, chosen = Counter(), set()  # how many different ones of each class
    for each in sorted(homes):
        if all(taken[name] < wanted[name] and copies[name][each] <= files[name] for name in homes[each]):
            chosen.add(each)
            for name in homes[each]:
                taken[name] += 1
                files[name] -= copies[name][each]
    for name in copies:
        if not taken[name]:  # all have many copies, or their other classes have test images enough: the fewest, then
            free = [each for each in copies[name] if all(taken[home] < most[home] for home in homes[each])]
            if not free:
                raise Failure(
                    f"class {name} has no image for the test that another class, which has it too, could spare from "
                    "its training. Remove images that stand under two classes."
                )
            each = min(free, key=lambda each: (sum(copies[home][each] for home in homes[each]), each))
            chosen.add(each)
            taken.update(homes[each])
    return [
        {name: [path for path in found if (path not in bad and hashes[path] in chosen) == is_test]
         for name, found in listing.items()}
        for is_test in (False, True)
    ]  # fmt: skip


# In words -------------------------------------------------------------------------------------------------------------


def say_ranges(record, say):
    """One line for each kind of samples of more than 8 bits."""
    for kind, (black, white) in record.ranges.items():
        found = [(low, high) for each in record.samples.values() for other, low, high in each if other == kind]
        low, high = min(low for low, _ in found), max(high for _, high in found)
        names = ("transparent", "opaque") if kind == ALPHA else ("black", "white")
        say(
            f"Images with {kind} samples: {len(found):,}, from {plain(low)} to {plain(high)}. "
            f"In all of them {plain(black)} becomes {names[0]} and {plain(white)} {names[1]}"
        )


def list_damaged(bad, path):
    """Writes the list of damaged images, {path: why}, to the file `path`, unless that is None, or removes it where
    there are none; returns `path`."""
    if path is None:
        return None
    if bad:
        content = "".join(f"{one_line(each)} {why}\n" for each, why in bad.items()).encode(errors="backslashreplace")
        if not (path.is_file() and path.read_bytes() == content):  # of a group one process writes
            write(path, content)
    else:
        remove(path)
    return path


def damage(bad, count, listed):
    """What to say of the images that cannot be decoded, {path: why}, of `count` in all; `listed` is the file that names
    them, or None."""
    lines = [f"  {one_line(path)} {why}" for path, why in itertools.islice(bad.items(), NAMED)]
    return "\n".join(
        [
            f"{len(bad):,} of {count:,} images cannot be decoded{' (what was decoded is kept)' if listed else ''}:",
            *lines,
            *([f"  and {len(bad) - NAMED:,} more"] if len(bad) > NAMED else []),
            (f"All are listed in {listed}. " if listed else "")
            + "Repair or remove them, or train without them: --skip-damaged",
        ]
    )


def _skipped(names, labels, is_test, whole):
    """How many images of each class are left out: {"training": {class: count}, "test": {class: count}}. Raises Failure
    where no image of a class is left."""
    skipped = {}
    for split, part in (("training", ~is_test), ("test", is_test)):
        lost = Counter(labels[part & ~whole].tolist())
        left = Counter(labels[part & whole].tolist())
        empty = next((names[label] for label in lost if not left[label]), None)
        if empty is not None:
            raise Failure(f"--skip-damaged would leave no {split} image of the class {empty}.")
        skipped[split] = {_readable(names[label]): lost[label] for label in sorted(lost)}
    return skipped


def _left_out(skipped, bad, count, listed):
    """The line that says what --skip-damaged leaves out."""
    classes = "; ".join(
        f"{split}: " + ", ".join(f"{name} {number:,}" for name, number in lost.items())
        for split, lost in skipped.items()
        if lost
    )
    where = f", listed in {listed}" if listed else ""
    return f"Left out, since they cannot be decoded: {bad:,} of {count:,} images ({classes}){where}"
