"""Decoded images, kept in one file of the output folder and memory-mapped from there.

All files are decoded, whatever happens to some of them; those that cannot be are named together. A file whose name,
size and time are unchanged is not decoded again.
"""

import contextlib
import hashlib
import io
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import numpy as np
from tqdm import tqdm

from runs.files import Damaged, Failure, make_folder, read_json, reason, remove, replacing, write_json
from sources.decode import DECODER_VERSION, NotDecoded, decide, decode

CHUNK = 512  # images decoded before they are written


@dataclass
class Record:
    """What is known of the images kept, all but `samples` and `ranges` in their order: the `keys` of their files (see
    `file_keys`) and `sizes` in pixels, "640x480". `samples` are (kind, low, high) of those whose kind needs a range, by
    key; `ranges` are (black, white) by kind; `sha256` is that of the images."""

    decoder: int = 0  # DECODER_VERSION at that time
    sha256: str = ""
    keys: list[str] = field(default_factory=list)
    sizes: list[str] = field(default_factory=list)
    samples: dict[str, tuple[str, float, float]] = field(default_factory=dict)
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass
class Kept:
    """The `images`, uint8 (N, S, S, 3), of the files that could be decoded, `record` of them, and for the others
    `damaged`: {key: why}."""

    images: np.ndarray
    record: Record
    damaged: dict[str, str]


def file_keys(directory, paths):
    """A text for each of `paths` that changes with its name in `directory`, its size and its time."""
    beginning, keys = len(os.path.join(directory, "")), []
    for path in paths:
        try:
            status = os.stat(path)
            state = f"{status.st_size}\0{status.st_mtime_ns}"
        except OSError:  # said when it is read
            state = ""
        keys.append(hashlib.sha256(os.fsencode(f"{path[beginning:]}\0{state}")).hexdigest()[:32])
    return keys


def load(paths, keys, image_size, workers, file=None):
    """The Kept of the image files `paths` with their `keys`, decoded by `workers` threads where they are not in `file`,
    which then holds those of these paths alone; without `file` they are held in memory."""
    old = _read(file, image_size) if file else None
    if old:
        there = set(old.record.keys)
        new = [(key, path) for key, path in zip(keys, paths, strict=True) if key not in there]
        same = len(new) + len(old.record.keys) == len(keys) and _are_in_order(keys, old.record.keys)
        if same and (damaged := _all_damaged(new, image_size)) is not None:
            return Kept(old.images, old.record, damaged)
    old = old or Kept(np.empty((0, image_size, image_size, 3), np.uint8), Record(), {})
    if file is None:
        output = io.BytesIO()
        record, damaged = _write(output, paths, keys, image_size, workers, old)
        output.seek(0)
        return Kept(np.load(output), record, damaged)
    make_folder(file.parent)
    with replacing(file) as temporary, open(temporary, "wb+") as output:
        record, damaged = _write(output, paths, keys, image_size, workers, old)
        old = None  # Windows replaces no file that is mapped
        remove(file.with_suffix(".json"))  # which would call the new images damaged, if this process ended in between
    write_json(file.with_suffix(".json"), asdict(record))
    return Kept(np.load(file, mmap_mode="c"), record, damaged)


def _are_in_order(keys, wanted):
    """Whether `wanted` are among `keys` in the same order."""
    left = iter(keys)
    return all(key in left for key in wanted)


def _all_damaged(files, image_size):
    """{key: why} where none of `files`, pairs (key, path), can be decoded; None at the first one that can."""
    damaged = {}
    for key, path in files:
        try:
            decode(path, image_size, {})
            return None
        except NotDecoded as error:
            damaged[key] = error.why
    return damaged


def _read(file, image_size):
    """The Kept in `file`, or None where there is none of this decoder; where it cannot be used, that is said."""
    record = file.with_suffix(".json")
    if not (file.is_file() and record.is_file()):
        return None
    try:
        kept = read_json(record, Record)
        if kept.decoder != DECODER_VERSION:
            return None
        try:
            images = np.load(file, mmap_mode="c")
        except OSError as error:
            raise Failure(f"cannot read {file}: {reason(error)}.") from None
        except Exception:  # ValueError, EOFError, BadZipFile, TokenError, ...
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


def _write(output, paths, keys, image_size, workers, old):
    """Writes the images of `paths` to a file as .npy, what `old` holds of them not decoded again; returns the Record
    and {key: why} of the damaged ones."""
    rows = {key: row for row, key in enumerate(old.record.keys)}
    record, damaged, late = (
        Record(DECODER_VERSION),
        {},
        {},
    )  # late: (path, kind, is it old) of rows that wait for a range
    blank = np.zeros((image_size, image_size, 3), np.uint8)

    def attempt(file):
        key, path = file
        try:
            return key, path, None if key in rows else decode(path, image_size, {})
        except NotDecoded as error:
            error.__traceback__ = error.__cause__ = None  # which hold what was read of the file
            return key, path, error

    begin, files = _header(output, image_size), list(zip(keys, paths, strict=True))
    with _progress(len(files), workers, "decoding images") as run:
        for key, path, found in run(attempt, files):
            if isinstance(found, NotDecoded):
                damaged[key] = found.why
                continue
            if found is None:
                row, samples = rows[key], old.record.samples.get(key)
                pixels, size = old.images[row], old.record.sizes[row]
            else:
                samples = found.kind and (found.kind, found.low, found.high)
                pixels, size = found.pixels, "x".join(map(str, found.size))
            if samples:
                record.samples[key] = samples
                late[len(record.keys)] = path, samples[0], found is None
            output.write(blank if pixels is None else np.ascontiguousarray(pixels))
            record.keys.append(key)
            record.sizes.append(size)
    record.ranges = decide(record.samples.values())
    changed = {kind for kind, span in record.ranges.items() if old.record.ranges.get(kind) != span}
    again = {row: path for row, (path, kind, is_old) in late.items() if kind in changed or not is_old}
    _write_late(output, again, record.ranges, image_size, workers, begin)
    _header(output, image_size, len(record.keys))
    record.sha256 = _sha256_of_rest(output)
    return record, damaged


def _write_late(output, paths, ranges, image_size, workers, begin):
    """Writes the images of `paths`, {row: path}, over their rows, scaled by `ranges`."""
    files = list(paths.items())
    with _progress(len(files), workers, "scaling images") as run:
        for row, found in run(lambda file: (file[0], decode(file[1], image_size, ranges)), files):
            if found.pixels is None:
                raise Failure(f"{paths[row]} was changed while it was read. Run the command again.")
            output.seek(begin + row * found.pixels.size)
            output.write(found.pixels)


@contextlib.contextmanager
def _progress(total, workers, title):
    """Gives a function like `map` that runs in threads, a chunk of items at a time, below a progress bar."""
    with (
        tqdm(total=total, desc=title, unit=" images", disable=None if total else True) as bar,
        ThreadPoolExecutor(max(1, workers)) as pool,  # Pillow decodes outside the interpreter's lock
    ):

        def run(function, items):
            for start in range(0, total, CHUNK):
                for result in pool.map(function, items[start : start + CHUNK]):
                    bar.update()
                    yield result

        try:
            yield run
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


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
        except OSError:  # said when it is decoded
            return ""

    with _progress(len(paths), workers, "reading images") as run:
        found = list(run(digest, list(zip(keys, paths, strict=True))))
    result = {key: value for key, value in zip(keys, found, strict=True) if value}
    if file and result != kept:
        make_folder(file.parent)
        write_json(file, result)
    return found
