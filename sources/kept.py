"""Decoded images, kept in one file of the output folder and memory-mapped from there.

All files are decoded, whatever happens to some of them; those that cannot be are named together. A file whose name,
size and time are unchanged is not decoded again.
"""

import functools
import hashlib
import io
import itertools
import os
import sys
from dataclasses import asdict, dataclass, field

import numpy as np
from tqdm import tqdm

from runs.files import Damaged, Failure, make_folder, read_json, reason, remove, replacing, write_json
from runs.files import decode as convert
from sources.decode import DECODER_VERSION, NO_FAULT, NotDecoded, decode, reader
from sources.ranges import decide, out_of_range
from sources.threads import in_threads


@dataclass
class Record:
    """What is known of the images kept. In their order the `keys` of their files (see `file_keys`) and `sizes` in
    pixels, "640x480". By key the `samples` that need a range, lists of (kind, low, high), and of files that hold no
    image why, `damaged`, as found by `reader`. `waiting` are the keys of images that are still to be scaled, where the
    decoding was interrupted; `ranges` are (black, white) by kind; `sha256` is that of the images."""

    decoder: int = 0  # DECODER_VERSION at that time
    reader: str = ""
    sha256: str = ""
    keys: list[str] = field(default_factory=list)
    sizes: list[str] = field(default_factory=list)
    samples: dict[str, list[tuple[str, float, float]]] = field(default_factory=dict)
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    waiting: list[str] = field(default_factory=list)


@dataclass
class Kept:
    """The `images`, uint8 (N, S, S, 3), of the files that could be decoded, `record` of them, and for the others
    `damaged`: {key: why}."""

    images: np.ndarray
    record: Record
    damaged: dict[str, str]


def relative(path, directory):
    """The path of a file below `directory` as seen from there, however that is written: "." or "a/../b"."""
    folder, name = os.path.split(path)
    below = _folder_below(folder, directory)
    return name if below == os.curdir else os.path.join(below, name)


_folder_below = functools.lru_cache(1024)(os.path.relpath)  # which takes long, and many files are in a folder


def file_keys(directory, paths):
    """A text for each of `paths` that changes with its name in `directory`, its size and its time."""
    keys = []
    for path in paths:
        try:
            status = os.stat(path)
            state = f"{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}"  # renaming changes the last
        except OSError:  # said when it is read
            state = ""
        keys.append(hashlib.sha256(os.fsencode(f"{relative(path, directory)}\0{state}")).hexdigest()[:32])
    return keys


def load(paths, keys, image_size, workers, file=None, given=None):
    """The Kept of the image files `paths` with their `keys`, decoded by `workers` threads where they are not in `file`,
    which then holds those of these paths alone; without `file` they are held in memory. Where the decoding is stopped,
    `file` holds what was decoded until then, and what it held before. Kinds of samples that have a range in `given`,
    {kind: (black, white)}, are scaled by that one and not by their own."""
    given = given or {}
    old = _read(file, image_size) if file else None
    if old:
        there = {*old.record.keys, *old.record.damaged}
        new = [(key, path) for key, path in zip(keys, paths, strict=True) if key not in there]
        same = not old.record.waiting and _are_in_order(keys, old.record.keys)
        same = same and old.record.ranges == _ranges(old.record.samples, given)
        if same and (found := _all_damaged(new, image_size, given)) is not None:
            return _unchanged(file, keys, old, found)
    old = old or Kept(np.empty((0, image_size, image_size, 3), np.uint8), Record(), {})
    if file is None:
        output = io.BytesIO()
        record, damaged, stopped = _write(output, paths, keys, image_size, workers, old, given)
        if stopped:
            raise stopped
        output.seek(0)
        return Kept(np.load(output), record, damaged)
    make_folder(file.parent)
    with replacing(file) as temporary, open(temporary, "wb+") as output:
        record, damaged, stopped = _write(output, paths, keys, image_size, workers, old, given)
        old = None  # Windows replaces no file that is mapped
        remove(file.with_suffix(".json"))  # which would call the new images damaged, if this process ended in between
    write_json(file.with_suffix(".json"), asdict(record))
    if stopped:
        raise stopped
    return Kept(np.load(file, mmap_mode="r"), record, damaged)


def _ranges(samples, given):
    """The range of each kind of `samples`, a Record's: the `given` one, or else the one that suits them."""
    decided = decide(itertools.chain.from_iterable(samples.values()))
    return decided | {kind: tuple(span) for kind, span in given.items() if kind in decided}


def _are_in_order(keys, wanted):
    """Whether `wanted` are among `keys` in the same order."""
    left = iter(keys)
    return all(key in left for key in wanted)


def _all_damaged(files, image_size, given):
    """{key: NotDecoded} where none of `files`, pairs (key, path), can be decoded; None at the first one that can."""
    damaged = {}
    for key, path in files:
        try:
            _check_range(path, decode(path, image_size, {}).samples, given)
            return None
        except NotDecoded as error:
            damaged[key] = error
    return damaged


def _check_range(path, samples, given):
    """Raises NotDecoded where the `samples` of a file lie outside of the ranges that are `given`, as in `load`."""
    if why := out_of_range(samples, given):
        raise NotDecoded(path, f"cannot be scaled as the data set's images are: {why}.", lasting=False)


def _unchanged(file, keys, old, found):
    """The Kept `old` in `file` with its damaged files of these `keys`, and those `found` now, {key: NotDecoded}."""
    damaged = {key: found[key].why if key in found else old.record.damaged[key] for key in keys
               if key in found or key in old.record.damaged}  # fmt: skip
    lasting = {key: why for key, why in damaged.items() if key not in found or found[key].lasting}
    if lasting != old.record.damaged:
        old.record.damaged = lasting
        write_json(file.with_suffix(".json"), asdict(old.record))
    return Kept(old.images, old.record, damaged)


def known_damaged(file):
    """{key: why} of the damaged files that the record beside `file` names."""
    try:
        record = file and _record(file)
    except Damaged:  # said when the images are loaded
        record = None
    return record.damaged if record else {}


def _record(file):
    """The Record beside `file`, or None where there is none of this decoder; raises Damaged."""
    path = file.with_suffix(".json")
    content = read_json(path) if path.is_file() else None
    if content is None or content.get("decoder", DECODER_VERSION) != DECODER_VERSION:
        return None
    record = convert(content, Record, path)
    if record.reader != reader():
        record.reader, record.damaged = reader(), {}
    return record


def _read(file, image_size):
    """The Kept in `file`, or None where there is none of this decoder; where it cannot be used, that is said."""
    record = file.with_suffix(".json")
    try:
        kept = _record(file) if file.is_file() else None
        if kept is None:
            return None
        try:
            images = np.load(file, mmap_mode="r")
        except OSError as error:
            raise Failure(f"cannot read {file}: {reason(error)}.") from None
        except Exception:  # NumPy raises many kinds for a broken header, TokenError among them
            raise Damaged(f"{file} is damaged: it does not hold an array.") from None
        shape = (len(kept.keys), image_size, image_size, 3)
        if images.shape != shape or images.dtype != np.uint8 or _sha256(images) != kept.sha256:
            raise Damaged(f"{file} is damaged: its checksum does not match.")
        if len(kept.sizes) != len(kept.keys):
            raise Damaged(f"{record} is damaged: it has another number of sizes than of images.")
        return Kept(images, kept, {})
    except Failure as error:
        tqdm.write(f"{error} The images are decoded again.", file=sys.stderr)
        return None


def _sha256(images):
    return hashlib.sha256(np.ascontiguousarray(images)).hexdigest()


def _header(output, image_size, count=0):
    """Writes the header of an .npy file of `count` images at the beginning of a file, and returns its length, which is
    the same for all counts (NumPy leaves room for them to grow)."""
    output.seek(0)
    np.lib.format.write_array_header_1_0(
        output, {"descr": "|u1", "fortran_order": False, "shape": (count, image_size, image_size, 3)}
    )
    return output.tell()


def _write(output, paths, keys, image_size, workers, old, given):
    """Writes the images of `paths` to a file as .npy, what `old` holds of them not decoded again; `given` as in
    `load`. Returns the Record, {key: why} of the damaged ones, and what stopped it, an exception, or None. Then the
    Record is that of the images decoded until then, and of those in `old`; the exception is raised here where these are
    all."""
    rows = {key: row for row, key in enumerate(old.record.keys)}
    record = Record(DECODER_VERSION, reader())
    record.damaged = {key: old.record.damaged[key] for key in keys if key in old.record.damaged}
    damaged, written, stopped = dict(record.damaged), {}, None  # written: {key: its size}
    waiting, before = set(), set(old.record.waiting)  # keys of images that wait for a range
    samples_before = old.record.samples  # not `old` in `attempt`, of which errors may hold the frame
    blank = np.zeros((image_size, image_size, 3), np.uint8)
    begin, files = _header(output, image_size), list(zip(keys, paths, strict=True))

    def attempt(file):
        key, path = file
        try:
            found = None if key in rows or key in record.damaged else decode(path, image_size, {})
            _check_range(path, found.samples if found else samples_before.get(key, ()), given)
            return found
        except NotDecoded as error:
            error.__traceback__ = error.__cause__ = None  # which hold what was read of the file
            return error

    def write(key, pixels, size, samples, waits):
        output.write(blank if pixels is None else np.ascontiguousarray(pixels))
        if samples:
            record.samples[key] = list(samples)
        if waits:
            waiting.add(key)
        written[key] = size  # last: what is not here was not written whole

    def write_old(key):
        row = rows[key]
        write(key, old.images[row], old.record.sizes[row], old.record.samples.get(key), key in before)

    try:
        with in_threads(len(files), workers, "decoding images") as run:
            for (key, _), found in zip(files, run(attempt, files), strict=True):
                if isinstance(found, NotDecoded):
                    damaged[key] = found.why
                    if found.lasting:
                        record.damaged[key] = found.why
                elif found:
                    write(key, found.pixels, "x".join(map(str, found.size)), found.samples, bool(found.samples))
                elif key in rows:
                    write_old(key)
    except OSError:  # the new file cannot be written
        raise
    except BaseException as error:
        if written.keys() <= rows.keys():
            raise
        stopped = error.with_traceback(None)  # which holds the images of `old`
        output.seek(begin + len(written) * blank.size)
        for key in keys:
            if key in rows and key not in written and key not in damaged:
                write_old(key)
    record.keys, record.sizes, record.ranges = list(written), list(written.values()), old.record.ranges
    record.samples = {key: samples for key, samples in record.samples.items() if key in written}
    waiting &= written.keys()
    if not stopped:
        record.ranges = _ranges(record.samples, given)
        changed = {kind for kind, span in record.ranges.items() if old.record.ranges.get(kind) != span}
        waiting |= {key for key, samples in record.samples.items() if changed & {kind for kind, _, _ in samples}}
        places = dict(files)
        late = {key: (begin + row * blank.size, places[key]) for row, key in enumerate(written) if key in waiting}
        try:
            for key in _write_late(output, late, record.ranges, image_size, workers):
                waiting.remove(key)
        except OSError:
            raise
        except BaseException as error:
            stopped = error.with_traceback(None)
    record.waiting = sorted(waiting)
    output.seek(begin + len(written) * blank.size)
    output.truncate()
    _header(output, image_size, len(written))
    record.sha256 = _sha256_of_rest(output)
    return record, damaged, stopped


def _write_late(output, images, ranges, image_size, workers):
    """Writes `images`, {key: (their place in the file, path)}, scaled by `ranges`; yields the key of each."""
    with in_threads(len(images), workers, "scaling images") as run:
        decoded = run(lambda item: decode(item[1], image_size, ranges), list(images.values()))
        for (key, (place, path)), found in zip(images.items(), decoded, strict=True):
            if found.pixels is None:
                raise Failure(f"{path} was changed while it was read. Run the command again.")
            output.seek(place)
            output.write(found.pixels)
            yield key


def _sha256_of_rest(output):
    """The SHA-256 of a file from its position on."""
    total = hashlib.sha256()
    while chunk := output.read(1 << 22):
        total.update(chunk)
    return total.hexdigest()


def content_hashes(paths, keys, workers, file):
    """The SHA-256 of each image file's content, kept in `file` by its key; "" for one that cannot be read."""
    try:
        kept = read_json(file, dict[str, str]) if file and file.is_file() else {}
    except Damaged:
        kept = {}

    def digest(item):
        key, path = item
        if key in kept:
            return kept[key]
        try:
            with open(path, "rb") as content:
                return hashlib.file_digest(content, "sha256").hexdigest()
        except OSError as error:
            if error.errno in NO_FAULT:
                raise Failure(f"cannot read {path}: {reason(error)}.") from None
            return ""  # said when it is decoded

    with in_threads(len(paths), workers, "reading images") as run:
        found = list(run(digest, list(zip(keys, paths, strict=True))))
    result = {key: value for key, value in zip(keys, found, strict=True) if value}
    if file and result != kept:
        make_folder(file.parent)
        write_json(file, result)
    return found
