"""Images in folders: DIRECTORY/train/CLASS/… and DIRECTORY/test/CLASS/…, decoded once and memory-mapped afterwards."""

import hashlib
import itertools
import os
from collections import Counter
from pathlib import Path

import numpy as np

from runs.files import Damaged, Failure, reason, remove, write
from sources import Facts, kept
from sources.decode import ALPHA, plain
from sources.listing import Found, find_images, has_class_folders, is_class_folder, is_image

HELD_OUT = ("test", "val", "valid", "validation")  # the first that exists holds the test images
NAMED = 20  # damaged images named on the screen


def load(
    directory, image_size=32, workers=2, cache=None, *, test_fraction=None, skip_damaged=False, say=lambda line: None
):
    """The images of `directory`, decoded by `workers` threads, as (arrays, Facts): the arrays are (classes, training
    images, training labels, test images, test labels).

    Decoded images are kept in the folder `cache` and memory-mapped from there; an image file whose name, size and time
    are unchanged is not decoded again. Without `cache` they are held in memory. `test_fraction` of each class's images
    become the test set of a folder that has none; with `skip_damaged` images that cannot be decoded are left out. What
    was found is told to `say`, line by line. Raises Failure where the folders are not as they should be, and Damaged
    where images cannot be decoded.
    """
    directory, cache = Path(directory), cache and Path(cache)
    places = _places(directory, test_fraction, say)
    splits = [_listing(place, say) for place in places]
    names = list(splits[0])
    if names != list(splits[-1]):
        odd = ", ".join(sorted(splits[0].keys() ^ splits[1].keys()))
        raise Failure(f"the classes in {places[0]} and {places[1]} differ: {odd} is in one only.")
    place = hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:12]
    if test_fraction:
        splits = _split(directory, splits[0], test_fraction, workers, cache and cache / f"contents-{place}.json")
    paths = [path for listing in splits for found in listing.values() for path in found]
    counts = [[len(found) for found in listing.values()] for listing in splits]
    labels = np.repeat(np.tile(np.arange(len(names)), 2), [*counts[0], *counts[1]])
    is_test = np.arange(len(paths)) >= sum(counts[0])

    keys = kept.file_keys(directory, paths)
    decoded = kept.load(paths, keys, image_size, workers, cache and cache / f"images-{place}-{image_size}.npy")
    ranges = decoded.record.ranges
    _say_ranges(decoded.record, say)
    record = {"test_fraction": test_fraction} if test_fraction else {"test_folder": places[1].name}
    identity = {"test_fraction": test_fraction} if test_fraction else {}
    if ranges:
        record["ranges"] = ranges
    whole = np.array([key not in decoded.damaged for key in keys])
    bad = {paths[number]: decoded.damaged[keys[number]] for number in np.flatnonzero(~whole)}
    listed = _list_damaged(bad, cache)
    if bad:
        if not skip_damaged:
            raise Damaged(_damage(bad, len(paths), listed))
        record["skipped"] = _skipped(names, labels, is_test, whole)
        record["skipped_files"] = identity["skipped"] = sorted(_relative(path, directory) for path in bad)
        say(_left_out(record["skipped"], len(bad), len(paths), listed))

    images, labels, train = decoded.images, labels[whole], int((whole & ~is_test).sum())
    arrays = ([_readable(name) for name in names], images[:train], labels[:train], images[train:], labels[train:])
    good = [_relative(path, directory) for path in itertools.compress(paths, whole)]
    sizes = dict(Counter(decoded.record.sizes).most_common())
    return arrays, Facts(identity, ranges, record, (good[:train], good[train:]), sizes)


def _readable(name):
    """A class name as other programs can read it: what is not UTF-8 is escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _relative(path, directory):
    return _readable(kept.relative(path, directory)).replace(os.sep, "/")


def _places(directory, test_fraction, say):
    """The folders of classes: of the training and of the test images, or, with `test_fraction`, the only one."""
    train = directory / "train"
    held_out = [directory / name for name in HELD_OUT if (directory / name).is_dir()]
    if test_fraction:
        if held_out:
            raise Failure(f"{held_out[0]} holds test images already: leave --test-fraction out, or remove that folder.")
        place = train if train.is_dir() else directory
        if not place.is_dir():
            raise Failure(
                f"{place} does not exist. --test-fraction needs one folder of classes: {directory}/CLASS/IMAGE"
            )
        return [place]
    if not train.is_dir() or not held_out:
        what = f"{train} does not exist"
        if train.is_dir():
            what = f"{directory / 'test'} does not exist, nor {', '.join(HELD_OUT[1:-1])} or {HELD_OUT[-1]} beside it"
        raise Failure(
            f"{what}. An image folder has one sub-folder per class in train and in test:\n"
            f"{directory}/train/CLASS/IMAGE and {directory}/test/CLASS/IMAGE\n"
            "Of one folder of classes --test-fraction 0.2 takes a fifth of each class for the test."
        )
    test = next(filter(has_class_folders, held_out), held_out[0])
    if test.name != "test":
        why = "has no class folders" if held_out[0].name == "test" else "does not exist"
        say(f"{directory / 'test'} {why}: the images of {test} are the test set")
    for other in held_out:
        if other not in (test, directory / "test"):
            say(f"{other} is not used: the test set is {test}")
    return [train, test]


def _listing(top, say):
    """{class name: [image paths]} of the folder `top`, sorted."""
    seen, real = {os.path.realpath(top)}, os.path.realpath(top)
    try:
        with os.scandir(top) as entries:
            inside = sorted(entries, key=lambda entry: entry.name)
        names = [entry.name for entry in inside if is_class_folder(entry)]
        listing = {name: find_images(os.path.join(top, name), real, seen) for name in names}
        beside = Counter("beside the class folders" for entry in inside if is_image(entry))
    except OSError as error:
        raise Failure(f"cannot read {error.filename or top}: {reason(error)}.") from error
    if len(names) < 2:
        count = f"{len(names) or 'no'} class folder{'s' * (len(names) != 1)}"
        raise Failure(f"{top} has {count}, but at least two classes are needed.")
    for name, found in listing.items():
        if not found.paths:
            only = f" that can be read, only {found.passed_over()}" if found.passed else ""
            raise Failure(f"{top / name} holds no image{only}. Put images there, or remove the folder.")
    every = Found([path for found in listing.values() for path in found.paths], beside)
    for found in listing.values():
        every.passed.update(found.passed)
    words = every.passed_over()
    say(f"{top}: {len(every.paths):,} images taken" + (f"; passed over: {words}" if words else ""))
    return {name: found.paths for name, found in listing.items()}


def _split(directory, listing, fraction, workers, contents):
    """The listing as two, training and test images: of each class `fraction` are test images, those whose files have
    the lowest SHA-256. So names and order decide nothing, and copies of a file stay together."""
    paths = [path for found in listing.values() for path in found]
    hashes = kept.content_hashes(paths, kept.file_keys(directory, paths), workers, contents)
    hashes = dict(zip(paths, hashes, strict=True))
    train, test = {}, {}
    for name, found in listing.items():
        different = sorted({hashes[path] for path in found})
        if len(different) < 2:
            raise Failure(f"class {name} has one image only (copies aside): --test-fraction needs two or more of each.")
        wanted, taken, chosen = max(1, round(fraction * len(found))), 0, set()
        copies = Counter(hashes[path] for path in found)
        for each in different[:-1]:  # at least one is left for training
            if taken >= wanted:
                break
            chosen.add(each)
            taken += copies[each]
        train[name] = [path for path in found if hashes[path] not in chosen]
        test[name] = [path for path in found if hashes[path] in chosen]
    return [train, test]


# In words -------------------------------------------------------------------------------------------------------------


def _say_ranges(record, say):
    """One line for each kind of samples of more than 8 bits."""
    for kind, (black, white) in record.ranges.items():
        found = [(low, high) for each in record.samples.values() for other, low, high in each if other == kind]
        low, high = min(low for low, _ in found), max(high for _, high in found)
        names = ("transparent", "opaque") if kind == ALPHA else ("black", "white")
        say(
            f"Images with {kind} samples: {len(found):,}, from {plain(low)} to {plain(high)}. "
            f"In all of them {plain(black)} becomes {names[0]} and {plain(white)} {names[1]}"
        )


def _list_damaged(bad, cache):
    """Writes the list of damaged images, {path: why}, to damaged.txt in `cache`, or removes it where there are none;
    returns its path, or None without `cache`."""
    if cache is None:
        return None
    path = cache / "damaged.txt"
    if bad:
        content = "".join(f"{each} {why}\n" for each, why in bad.items()).encode(errors="backslashreplace")
        if not (path.is_file() and path.read_bytes() == content):  # of a group one process writes
            write(path, content)
    else:
        remove(path)
    return path


def _damage(bad, count, listed):
    """What to say of images that cannot be decoded."""
    lines = [f"  {path} {why}" for path, why in itertools.islice(bad.items(), NAMED)]
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
