"""A look at the data before training: how many images a class has, their sizes, and images that occur twice."""

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import numpy as np

from runs.files import Damaged, make_folder, read_json, write, write_json
from runs.settings import NotNegative
from sources import one_line

FEW = 10  # classes that are all named
ENDS = 3  # classes named at each end, of more


@dataclass(frozen=True)
class Copies:
    """Images that occur more than once, equal in every pixel as they are trained on: test images that are training
    images, too (and those of them under another class there), and different images that stand under two classes.
    `listed` is the file that names them, in the output folder."""

    test_in_training: NotNegative = 0
    under_another_class: NotNegative = 0
    under_two_classes: NotNegative = 0
    listed: str | None = None


@dataclass(frozen=True)
class UnlabeledCopies:
    """Of the images without labels: their `count`, how many files were `skipped` as damaged, how many are `test_images`
    or `training_images` in every pixel as they are trained on, and the file in the output folder that names these."""

    count: NotNegative
    skipped: NotNegative = 0
    test_images: NotNegative = 0
    training_images: NotNegative = 0
    listed: str | None = None


def look(data, output, say):
    """Tells `say` what `data` (a data.Data on the CPU) are, and returns what run.json says of them.

    Copies are looked for once and kept in the folder `output`/data, until an image gets another path; after that only
    warnings are repeated.
    """
    key = hashlib.sha256(json.dumps([data.digest, data.facts.names]).encode()).hexdigest()[:16]
    path = Path(output) / "data" / f"survey-{key}.json"
    try:
        copies = read_json(path, Copies) if path.is_file() else None
    except Damaged:
        copies = None
    if copies is None or (copies.listed and not (Path(output) / copies.listed).is_file()):
        for line in (_classes(data), _sizes(data)):
            if line:
                say(line)
        copies = _find_copies(data, path.with_name(f"duplicates-{key}.txt"))
        make_folder(path.parent)
        write_json(path, asdict(copies))
    for warning in _warnings(copies, len(data.test_labels), output):
        say(f"Warning: {warning}")
    return {**data.facts.record, "copies": asdict(copies)}


def look_at_unlabeled(data, output, say):
    """Tells `say` how many of the images of `data` (on the CPU) without labels are test or training images, too, in the
    folder `output`/data a list of them, and returns what run.json says of the images without labels."""
    unlabeled, splits, places = data.unlabeled, _splits(data), {}
    for number, (_, images, _) in enumerate(splits):  # of an image in both parts the test image is told
        places |= {_digest(image): (number, position) for position, image in enumerate(images.numpy())}
    counts, lines = Counter(), []
    for name, image in zip(unlabeled.names, unlabeled.images.numpy(), strict=True):
        if found := places.get(_digest(image)):
            number, position = found
            counts[number] += 1
            copy = _name(data, splits, number, position, splits[number][2][position].item())
            lines.append(f"{one_line(name)} = {copy}\n")
    path = Path(output) / "data" / f"unlabeled-duplicates-{unlabeled.digest[:16]}-{data.digest[:16]}.txt"
    content = "".join(lines).encode()
    if lines and not (path.is_file() and path.read_bytes() == content):  # of a group one process writes
        make_folder(path.parent)
        write(path, content)
    listed = f"{path.parent.name}/{path.name}" if lines else None
    found = UnlabeledCopies(len(unlabeled.names), unlabeled.skipped, counts[1], counts[0], listed)
    for warning in _unlabeled_warnings(found, output):
        say(f"Warning: {warning}")
    return asdict(found)


def _splits(data):
    """(name, images, labels) of the training and of the test images."""
    return ("train", data.train_images, data.train_labels), ("test", data.test_images, data.test_labels)


def _listed(found, output):
    """Where what was `found` is listed, as words to add."""
    path = found.listed and Path(output) / found.listed
    return f" (listed in {path})" if path and path.is_file() else ""


def _unlabeled_warnings(found, output):
    lines, listed = [], _listed(found, output)
    if found.test_images:
        lines.append(
            f"{found.test_images:,} of {found.count:,} images without labels are test images, too{listed}: test "
            "accuracies with them are not those on new images"
        )
    if found.training_images:
        lines.append(
            f"{found.training_images:,} of {found.count:,} images without labels are training images, too{listed}: "
            "those that students see with labels add nothing new"
        )
    return lines


def notes(record, unlabeled, tests, output):
    """What a comparison on `tests` test images must say of its images, lines, from what `look` returned and, for each
    of the folders `unlabeled`, `look_at_unlabeled`; raises msgspec.ValidationError where that is no such record."""
    copies = msgspec.convert(record.get("copies", {}), Copies)
    skipped = msgspec.convert(record.get("skipped", {}), dict[str, dict[str, int]])
    counts = [f"{sum(lost.values()):,} {split}" for split, lost in skipped.items() if lost]
    found = msgspec.convert(unlabeled, list[UnlabeledCopies])
    counts += [f"{each.skipped:,} without labels" for each in found if each.skipped]
    left_out = [f"images that cannot be decoded were left out: {', '.join(counts)}"] if counts else []
    warnings = [warning for each in found for warning in _unlabeled_warnings(each, output)]
    return _warnings(copies, tests, output) + warnings + left_out


def _warnings(copies, tests, output):
    lines, listed = [], _listed(copies, output)
    if count := copies.test_in_training:
        other = copies.under_another_class
        also = f", {other:,} of them under another class" if other else ""
        lines.append(
            f"{count:,} of {tests:,} test images are training images, too{also}{listed}: test accuracies are not those "
            "on new images"
        )
    if count := copies.under_two_classes:
        is_one = count == 1
        lines.append(f"{count:,} image{'' if is_one else 's'} stand{'s' * is_one} under two classes or more{listed}")
    return lines


def _classes(data):
    """Images a class: all of few classes, else the largest and the smallest."""
    train, test = (
        np.bincount(labels.numpy(), minlength=len(data.classes)).tolist()
        for labels in (data.train_labels, data.test_labels)
    )
    if len({*train}) == 1 and len({*test}) == 1:
        return f"Each class has {train[0]:,} training and {test[0]:,} test images"
    order = sorted(range(len(train)), key=lambda number: -train[number])
    words = [f"{data.classes[number]} {train[number]:,} + {test[number]:,}" for number in order]
    if len(words) > FEW:
        words = [*words[:ENDS], "...", *words[-ENDS:]]
    times = train[order[0]] / train[order[-1]]
    shown = f"{times:.3g}" if times < 100 else f"{times:,.0f}"
    unequal = f"; the largest has {shown} times the training images of the smallest" if times > 1 else ""
    return f"Images a class (training + test): {', '.join(words)}{unequal}"


def _sizes(data):
    """The sizes of the image files, where that is known."""
    sizes = {tuple(map(int, name.split("x"))): count for name, count in data.facts.sizes.items()}
    if not sizes:
        return None
    small = sum(count for size, count in sizes.items() if min(size) < data.image_size)
    if len(sizes) == 1:
        enlarged = f", smaller than {_by((data.image_size, data.image_size))} and enlarged" if small else ""
        return f"Sizes: all {_by(*sizes)}{enlarged}"
    least, most = (choose(sizes, key=lambda size: size[0] * size[1]) for choose in (min, max))
    often = max(sizes, key=sizes.get)
    enlarged = f"; smaller than {_by((data.image_size, data.image_size))} and enlarged: {small:,}" if small else ""
    return f"Sizes: from {_by(least)} to {_by(most)}, most often {_by(often)} ({sizes[often]:,}){enlarged}"


def _by(size):
    return f"{size[0]}x{size[1]}"


def _find_copies(data, path):
    """The Copies in `data`, named in the file `path`."""
    places, splits = {}, _splits(data)
    for number, (_, images, labels) in enumerate(splits):
        for position, (image, label) in enumerate(zip(images.numpy(), labels.tolist(), strict=True)):
            places.setdefault(_digest(image), []).append((number, position, label))
    counts, lines = Counter(), []
    for found in places.values():
        training = [label for number, _, label in found if number == 0]
        tests = [label for number, _, label in found if number == 1]
        labels = {*training, *tests}
        if len(labels) == 1 and not (training and tests):
            continue
        counts["under_two_classes"] += len(labels) > 1
        if training:
            counts["test_in_training"] += len(tests)
            counts["under_another_class"] += sum(label not in training for label in tests)
        lines.append(" = ".join(_name(data, splits, *place) for place in found))
    names = ("test_in_training", "under_another_class", "under_two_classes")
    if lines:
        make_folder(path.parent)
        write(path, "".join(f"{line}\n" for line in lines))
    return Copies(*(counts[name] for name in names), f"{path.parent.name}/{path.name}" if lines else None)


def _digest(image):
    return hashlib.blake2b(np.ascontiguousarray(image), digest_size=16).digest()


def _name(data, splits, split, position, label):
    """An image's path, or its number where it has none, counted from 0."""
    if data.facts.names:
        return one_line(data.facts.names[split][position])
    return f"{splits[split][0]} image {position} ({data.classes[label]})"
