"""Images in folders: DIRECTORY/train/CLASS/… and DIRECTORY/test/CLASS/…, decoded once and memory-mapped afterwards."""

import functools
import hashlib
import json
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from runs.files import Damaged, Failure, make_folder, read_json, reason, replacing, write_json

DECODER_VERSION = 2  # of `read_image`: raise it with any change of what it returns
MAX_PIXELS = 100_000_000  # Pillow refuses images of more than twice as many
CHUNK = 4096  # images decoded before they are written

# Formats that Pillow only identifies, and EPS, which it hands to Ghostscript to run.
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


def load(directory, image_size=32, workers=2, cache=None):
    """The images of `directory`, decoded by `workers` threads.

    Decoded images are kept in the folder `cache`, memory-mapped from there, and used again while names, sizes and times
    of the image files are unchanged; without `cache` they are held in memory. Raises Failure where the folders are not
    as they should be, and Damaged where an image cannot be decoded.
    """
    directory = Path(directory)
    splits = {split: _listing(directory, split) for split in ("train", "test")}
    if list(splits["train"]) != list(splits["test"]):
        odd = sorted(splits["train"].keys() ^ splits["test"].keys())
        raise Failure(f"the classes in {directory}/train and {directory}/test differ: {', '.join(odd)} is in one only.")
    # Class names that are not UTF-8 are escaped, since no other program could read them in the output files.
    classes = [os.fsencode(name).decode("utf-8", "backslashreplace") for name in splits["train"]]
    paths = [path for listing in splits.values() for found in listing.values() for path in found]
    labels = [np.repeat(np.arange(len(classes)), [len(found) for found in each.values()]) for each in splits.values()]
    if cache is None:
        images = np.concatenate([*_decoded(paths, image_size, workers)])
    else:
        listed = _fingerprint(directory, paths, classes, image_size)
        place = hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:12]
        images = _cached(Path(cache) / f"images-{place}-{image_size}.npy", listed, paths, image_size, workers)
    train, test = images[: len(labels[0])], images[len(labels[0]) :]
    return classes, train, labels[0], test, labels[1]


@functools.cache
def _formats():
    """(the formats that are decoded, their file name suffixes), with Pillow set up for large images."""
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # from here to twice as many
    suffixes = {suffix: kind for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    formats = sorted(set(suffixes.values()) - NOT_DECODED)
    return formats, frozenset(suffix for suffix, kind in suffixes.items() if kind in formats)


def find_images(folder):
    """The paths of the images in `folder` and below it, as text (60,000 Paths take a second), sorted within each
    folder; hidden files and other suffixes are passed over. Raises OSError where a folder cannot be read."""
    suffixes = _formats()[1]

    def unreadable(error):
        raise error

    for parent, folders, file_names in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        for file_name in sorted(file_names):
            if not file_name.startswith(".") and os.path.splitext(file_name)[1].lower() in suffixes:
                yield os.path.join(parent, file_name)


def _listing(directory, split):
    """{class name: [image paths]} of one split, sorted."""
    top = directory / split
    if not top.is_dir():
        raise Failure(
            f"{top} does not exist. An image folder has one sub-folder per class in train and in test:\n"
            f"{directory}/train/CLASS/IMAGE and {directory}/test/CLASS/IMAGE"
        )
    try:
        names = sorted(entry.name for entry in top.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        listing = {name: list(find_images(os.path.join(directory, split, name))) for name in names}
    except OSError as error:
        raise Failure(f"cannot read {error.filename or top}: {reason(error)}.") from error
    if len(names) < 2:
        count = f"{len(names) or 'no'} class folder{'s' * (len(names) != 1)}"
        raise Failure(f"{top} has {count}, but at least two classes are needed.")
    for name, found in listing.items():
        if not found:
            raise Failure(f"{top / name} holds no image. Put images there, or remove the folder.")
    return listing


def _fingerprint(directory, paths, classes, image_size):
    """The SHA-256 of what decoded images depend on: the files' names, sizes and times, classes, size, decoder."""
    listed = hashlib.sha256(json.dumps([DECODER_VERSION, image_size, classes]).encode())
    beginning = len(os.path.join(directory, ""))
    for path in paths:
        try:
            status = os.stat(path)
        except OSError as error:
            raise Failure(f"cannot read {path}: {reason(error)}.") from error
        listed.update(os.fsencode(f"{path[beginning:]}\0{status.st_size}\0{status.st_mtime_ns}\0"))
    return listed.hexdigest()


def _cached(file, listed, paths, image_size, workers):
    """The images of `paths` as a memory map of `file`, decoded first unless `file` holds them already."""
    record, shape = file.with_suffix(".json"), (len(paths), image_size, image_size, 3)
    if file.is_file() and record.is_file():
        try:
            images = _kept(file, record, listed, shape)
            if images is not None:
                return images
        except Failure as error:
            tqdm.write(f"{error} The images are decoded again.", file=sys.stderr)
    make_folder(file.parent)
    total = hashlib.sha256()
    with replacing(file) as temporary, open(temporary, "wb") as output:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(output, header)
        for images in _decoded(paths, image_size, workers):
            output.write(images)
            total.update(images)
    write_json(record, {"listed": listed, "sha256": total.hexdigest()})
    return np.load(file, mmap_mode="c")


def _kept(file, record, listed, shape):
    """The images kept in `file`, memory-mapped, or None where they are not those that are `listed`; raises Failure
    where they cannot be read, and Damaged where they are damaged."""
    kept = read_json(record, dict[str, str])
    if kept.get("listed") != listed:
        return None
    try:
        images = np.load(file, mmap_mode="c")
    except OSError as error:
        raise Failure(f"cannot read {file}: {reason(error)}.") from None
    except Exception:  # ValueError, EOFError, BadZipFile, TokenError, ...
        raise Damaged(f"{file} is damaged: it does not hold an array.") from None
    if images.shape != shape or images.dtype != np.uint8 or _sha256(images) != kept.get("sha256"):
        raise Damaged(f"{file} is damaged: its checksum does not match.")
    return images


def _sha256(images):
    return hashlib.sha256(np.ascontiguousarray(images)).hexdigest()


def _decoded(paths, image_size, workers):
    """The images of `paths` as uint8 arrays (up to CHUNK, S, S, 3), one after another."""
    with (
        tqdm(total=len(paths), desc="decoding images", unit=" images", disable=None) as bar,
        ThreadPoolExecutor(max(1, workers)) as pool,  # Pillow decodes outside the interpreter's lock
    ):
        for start in range(0, len(paths), CHUNK):
            part = paths[start : start + CHUNK]
            images = np.empty((len(part), image_size, image_size, 3), np.uint8)
            try:
                for position, image in enumerate(pool.map(lambda path: read_image(path, image_size), part)):
                    images[position] = image
                    bar.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            yield images


def read_image(path, image_size):
    """One image of any size and mode -> uint8 array (image_size, image_size, 3).

    EXIF orientation is applied, 16-bit grey scaled to 8 bits, transparency laid over white; the image is resized so
    that it covers the square, and centre-cropped. Raises Damaged with the path where Pillow cannot decode it.
    """
    formats, _ = _formats()
    try:
        with Image.open(path, formats=formats) as image:
            image.draft(None, (2 * image_size, 2 * image_size))  # JPEG: decodes to an eighth of the size and up
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
            if image.size != (image_size, image_size):
                image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
            if image.mode == "RGBA":
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
            return np.array(image)
    except FileNotFoundError:
        raise Failure(f"cannot read {path}: No such file or directory.") from None
    except UnidentifiedImageError:
        raise Damaged(f"{path} cannot be decoded: it is not an image of a known format.") from None
    except Exception as error:  # Pillow's plugins raise nearly every kind of exception on a damaged file
        why = str(error).rstrip(".") or type(error).__name__
        raise Damaged(f"{path} cannot be decoded as an image: {why}.") from error
