"""Where pictures come from, and the augmented views of an epoch.

CIFAR-10, pictures in folders or drawn shapes all end as one uint8 tensor (N, S, S, 3) a split; from there on a whole
batch is cropped, flipped and normalised at a time, on the device, without workers.
"""

import functools
import hashlib
import http.client
import json
import math
import os
import sys
import tarfile
import urllib.error
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import models
from files import Damaged, Failure, load_arrays, lock, make_folder, reason, remove, save_arrays
from models import generator

VIEWS_VERSION = 1  # of the recipe below: another recipe is another version, and soft targets are kept by it
DECODER_VERSION = 1  # of `read_picture`: decoded pictures are kept by it
NETWORK_TIMEOUT = 30  # seconds without a byte
MAX_PIXELS = 100_000_000  # Pillow refuses pictures of more than twice as many


@dataclass(frozen=True)
class Data:
    """Pictures as uint8 (N, S, S, 3), labels as int64 (N,); `mean` and `std` by channel, of the training pictures on a
    scale of 0 to 1; `digest`, the SHA-256 of all of it."""

    classes: tuple[str, ...]
    train_pictures: torch.Tensor
    train_labels: torch.Tensor
    test_pictures: torch.Tensor
    test_labels: torch.Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str

    @property
    def image_size(self):
        return self.train_pictures.shape[1]

    def to(self, device):
        """The same data with its tensors on `device`."""
        names = ("train_pictures", "train_labels", "test_pictures", "test_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def _data(classes, train_pictures, train_labels, test_pictures, test_labels):
    """Data from NumPy arrays: statistics and digest are computed here."""
    total, squares = np.zeros(3), np.zeros(3)
    for start in range(0, len(train_pictures), 4096):  # in parts, so that no wider copy of all pictures is ever held
        rows = train_pictures[start : start + 4096].reshape(-1, train_pictures.shape[2] * 3)  # long enough to vectorise
        total += rows.sum(0, dtype=np.uint32).reshape(-1, 3).sum(0, dtype=np.float64)
        squares += np.square(rows, dtype=np.uint16).sum(0, dtype=np.uint64).reshape(-1, 3).sum(0, dtype=np.float64)
    count = train_pictures.size / 3
    mean = total / count / 255
    std = np.sqrt(np.maximum(squares / count / 255**2 - mean**2, 0))
    content = hashlib.sha256(json.dumps([list(classes), train_pictures.shape, test_pictures.shape]).encode())
    for array in (train_pictures, train_labels, test_pictures, test_labels):
        content.update(np.ascontiguousarray(array))
    return Data(
        tuple(classes),
        *(torch.from_numpy(array) for array in (train_pictures, train_labels, test_pictures, test_labels)),
        tuple(mean.tolist()),
        tuple(np.maximum(std, 1 / 255).tolist()),  # pictures of a single colour have no spread to divide by
        content.hexdigest(),
    )


def load(dataset, *, data_dir="data", data_url=None, image_size=32, workers=2, cache=None):
    """The Data of `dataset` ("cifar10", "folder" or "shapes").

    `cache` is the folder where decoded pictures of a "folder" are kept. Raises Failure where the data cannot be had or
    is damaged, with its path and what to do.
    """
    if dataset == "cifar10":
        return cifar10(data_dir, data_url, image_size)
    if dataset == "folder":
        return folder(data_dir, image_size, workers, cache)
    return shapes(image_size)


# CIFAR-10 ------------------------------------------------------------------------------------------------------------


def cifar10(data_dir, url=None, image_size=32, dataset=None):
    """CIFAR-10 as torchvision reads it from `data_dir`, downloaded once (from `url`, a mirror, where given).

    `dataset` is torchvision's class or a subclass with other checksums. Its pickles are read only after their MD5
    matched.
    """
    from torchvision.datasets import CIFAR10

    dataset = dataset or CIFAR10
    root = Path(data_dir)
    batches = root / dataset.base_folder
    archive = root / dataset.filename
    wanted = {batches / name: md5 for name, md5 in dataset.train_list + dataset.test_list}
    wanted[batches / dataset.meta["filename"]] = dataset.meta["md5"]

    def damaged():
        return [path for path, md5 in wanted.items() if not path.is_file() or _md5(path) != md5]

    if damaged():
        with lock(root, ".unpacking"):  # two first runs must not write to one file
            bad = damaged()
            if bad:
                _unpack(dataset, root, url, [path for path in bad if path.is_file()])
        for path in damaged():
            raise Damaged(f"{path} is damaged even though it was unpacked from {archive} just now.")
    train, test = (dataset(root, train=part, download=False) for part in (True, False))
    pictures = [resize(part.data, image_size) for part in (train, test)]
    labels = [np.asarray(part.targets, dtype=np.int64) for part in (train, test)]
    return _data(train.classes, pictures[0], labels[0], pictures[1], labels[1])


def _unpack(dataset, root, url, damaged):
    """Unpacks the archive, downloaded where it is not there; `damaged` are the files that are there and not whole."""
    archive, batches = root / dataset.filename, root / dataset.base_folder
    if damaged and not archive.is_file():
        raise Damaged(
            f"{damaged[0]} is damaged: its MD5 is not the official one.\n"
            f"Remove the folder {batches} and run the command again: it is then downloaded anew."
        )
    if not archive.is_file():
        _download(url or dataset.url, archive, dataset.tgz_md5)
    elif _md5(archive) != dataset.tgz_md5:
        raise Damaged(
            f"{archive} is damaged: its MD5 is not {dataset.tgz_md5}.\n"
            "Remove it and run the command again, or put the whole archive in its place."
        )
    try:
        with tarfile.open(archive) as content:
            if hasattr(tarfile, "data_filter"):  # not in the first releases of Python 3.11
                content.extraction_filter = tarfile.data_filter
            content.extractall(root)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise Failure(f"cannot unpack {archive}: {error}.") from error


def _md5(path):
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError as error:
        raise Failure(f"cannot read {path}: {reason(error)}.") from error


def _download(url, path, md5):
    """Downloads `url` to `path`, which appears only when the MD5 matched; what has come is kept and continued."""
    part = path.with_name(path.name + ".part")
    try:
        _fetch(url, part)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: everything had come already
            raise Failure(_unreachable(url, path, f"HTTP status {error.code}")) from error
    except Failure:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
        why = getattr(error, "reason", None) or str(error) or type(error).__name__
        raise Failure(_unreachable(url, path, why)) from error
    if _md5(part) != md5:
        remove(part)
        raise Failure(_unreachable(url, path, f"what it sent does not have the MD5 {md5}"))
    os.replace(part, path)


def _fetch(url, part):
    """Downloads the rest of `url` to the file `part`. Raises what urllib raises, and Failure where it cannot write."""
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=NETWORK_TIMEOUT) as answer:
        if answer.status != 206:  # a server that cannot continue sends everything
            have = 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        come = have
        with tqdm(desc=part.stem, total=total, initial=have, unit="B", unit_scale=True, disable=None) as bar:
            try:
                file = open(part, "ab" if have else "wb")  # noqa: SIM115 (closed below, whichever side fails)
            except OSError as error:
                raise Failure(f"cannot write {part}: {reason(error)}.") from error
            with file:
                while chunk := answer.read(1 << 16):
                    try:
                        file.write(chunk)
                    except OSError as error:
                        raise Failure(f"cannot write {part}: {reason(error)}.") from error
                    come += len(chunk)
                    bar.update(len(chunk))
                file.flush()
                os.fsync(file.fileno())
    if total is not None and come < total:
        raise TimeoutError(f"the connection ended after {come:,} of {total:,} bytes")


def _unreachable(url, path, why):
    return (
        f"cannot download {url}: {why}.\n"
        f"Run the command again to continue, name a mirror with --data-url, or place {path.name} in {path.parent} by\n"
        "hand (any archive with the official MD5 will do). To see the program at work without: python main.py --demo"
    )


def resize(pictures, image_size):
    """uint8 pictures (N, H, H, 3) as NumPy array -> (N, image_size, image_size, 3), bicubic with antialiasing."""
    if pictures.shape[1] == image_size:
        return pictures
    result = np.empty((len(pictures), image_size, image_size, 3), np.uint8)
    for start in range(0, len(pictures), 1000):
        part = torch.from_numpy(pictures[start : start + 1000]).permute(0, 3, 1, 2).float()
        part = torch.nn.functional.interpolate(part, (image_size, image_size), mode="bicubic", antialias=True)
        result[start : start + 1000] = part.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return result


# Pictures in folders -------------------------------------------------------------------------------------------------


# Formats that Pillow only recognises, and EPS, which it hands to Ghostscript to run.
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


@functools.cache
def _formats():
    """(the formats that are decoded, their file name suffixes), with Pillow set up for large pictures."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # from here to twice as many
    suffixes = {suffix: kind for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    formats = sorted(set(suffixes.values()) - NOT_DECODED)
    return formats, frozenset(suffix for suffix, kind in suffixes.items() if kind in formats)


def _listing(directory, split):
    """{class name: [picture paths]} of one split, sorted; hidden files and other suffixes are passed over."""
    top, suffixes = directory / split, _formats()[1]

    def unreadable(error):
        raise error

    if not top.is_dir():
        raise Failure(
            f"{top} is not there. A picture folder has one sub-folder a class in train and in test:\n"
            f"{directory}/train/CLASS/PICTURE and {directory}/test/CLASS/PICTURE"
        )
    try:
        names = sorted(entry.name for entry in top.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        listing = {}
        for name in names:
            found = listing[name] = []
            for parent, folders, file_names in os.walk(os.path.join(directory, split, name), onerror=unreadable):
                folders[:] = sorted(each for each in folders if not each.startswith("."))
                for file_name in sorted(file_names):
                    if not file_name.startswith(".") and os.path.splitext(file_name)[1].lower() in suffixes:
                        found.append(os.path.join(parent, file_name))  # as text: 60,000 Paths take a second
    except OSError as error:
        raise Failure(f"cannot read {error.filename or top}: {reason(error)}.") from error
    if len(names) < 2:
        raise Failure(f"{top} has {len(names)} class folder(s), but two classes are the least to tell apart.")
    for name, found in listing.items():
        if not found:
            raise Failure(f"{top / name} holds no picture. Put pictures there, or remove the folder.")
    return listing


def read_picture(path, image_size):
    """One picture of any size and mode -> uint8 array (image_size, image_size, 3).

    EXIF orientation is obeyed, 16-bit grey scaled to 8 bits, transparency laid over white; the picture is resized so
    that it covers the square, and centre-cropped. Raises Damaged with the path where Pillow cannot decode it.
    """
    from PIL import Image, ImageOps

    formats, _ = _formats()
    try:
        with Image.open(path, formats=formats) as picture:
            picture.draft(None, (2 * image_size, 2 * image_size))  # JPEG: decodes to an eighth of the size and up
            picture.load()
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I"):
                picture = Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
            picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
            if picture.size != (image_size, image_size):
                picture = ImageOps.fit(picture, (image_size, image_size), Image.Resampling.BICUBIC)
            if picture.mode == "RGBA":
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
            return np.array(picture)
    except FileNotFoundError:
        raise Failure(f"cannot read {path}: No such file or directory.") from None
    except Exception as error:  # Pillow's plugins raise nearly every kind on a damaged file
        raise Damaged(f"{path} cannot be decoded as a picture: {str(error) or type(error).__name__}.") from error


def folder(directory, image_size=32, workers=2, cache=None):
    """Data from `directory`/train/CLASS/… and `directory`/test/CLASS/…, decoded once by `workers` threads.

    The decoded pictures are kept in the folder `cache` and read back while the pictures' names, sizes and times are
    unchanged.
    """
    directory = Path(directory)
    splits = {split: _listing(directory, split) for split in ("train", "test")}
    # A name that is no UTF-8 is Python's secret: no other reader of the output files could take it.
    classes = [os.fsencode(name).decode("utf-8", "backslashreplace") for name in splits["train"]]
    if list(splits["train"]) != list(splits["test"]):
        odd = sorted(splits["train"].keys() ^ splits["test"].keys())
        raise Failure(f"the classes in {directory}/train and {directory}/test differ: {', '.join(odd)} is in one only.")

    paths = [path for listing in splits.values() for found in listing.values() for path in found]
    labels = {
        split: np.repeat(np.arange(len(classes)), [len(found) for found in listing.values()])
        for split, listing in splits.items()
    }
    kept = None
    if cache is not None:
        listed = hashlib.sha256(json.dumps([DECODER_VERSION, image_size, classes]).encode())
        beginning = len(os.path.join(directory, ""))
        for path in paths:
            try:
                status = os.stat(path)
            except OSError as error:
                raise Failure(f"cannot read {path}: {reason(error)}.") from error
            listed.update(os.fsencode(f"{path[beginning:]}\0{status.st_size}\0{status.st_mtime_ns}\0"))
        place = hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:12]
        kept = Path(cache) / f"pictures-{place}-{image_size}.npz"
        if kept.is_file():
            try:
                arrays = load_arrays(kept)
                if arrays.get("listed", np.empty(0)).tobytes() == listed.digest():
                    return _data(classes, arrays["train"], labels["train"], arrays["test"], labels["test"])
            except Failure as error:
                tqdm.write(f"{error} The pictures are decoded again.", file=sys.stderr)

    with tqdm(total=len(paths), desc="decoding pictures", unit=" pictures", disable=None) as bar:
        pictures = np.empty((len(paths), image_size, image_size, 3), np.uint8)

        def decode(position):
            pictures[position] = read_picture(paths[position], image_size)

        if workers == 0:
            for position in range(len(paths)):
                decode(position)
                bar.update()
        else:  # threads: Pillow decodes outside the interpreter's lock, and a thread dies with its process
            pool = ThreadPoolExecutor(workers)
            try:
                for _ in pool.map(decode, range(len(paths))):
                    bar.update()
            finally:
                pool.shutdown(cancel_futures=True)
    train, test = np.split(pictures, [len(labels["train"])])
    if kept is not None:
        make_folder(cache)
        save_arrays(kept, listed=np.frombuffer(listed.digest(), np.uint8), train=train, test=test)
    return _data(classes, train, labels["train"], test, labels["test"])


# Drawn shapes --------------------------------------------------------------------------------------------------------

SHAPES = ("circle", "ring", "triangle", "square", "pentagon", "star", "cross", "crescent")


def shapes(image_size=32, train=2400, test=1200):
    """Data that the program draws itself: eight shapes at any place, angle, size and colour, half of them with
    another shape's piece in front, in noise."""
    pictures, labels = [], []
    for split, count in (("train", train), ("test", test)):
        random = np.random.default_rng([len(split), count, 7])
        kinds = np.arange(count) % len(SHAPES)
        random.shuffle(kinds)
        drawn = np.empty((count, image_size, image_size, 3), np.uint8)
        for start in range(0, count, 400):  # in parts, to stay in the cache
            drawn[start : start + 400] = _draw(kinds[start : start + 400], image_size, random)
        pictures.append(drawn)
        labels.append(kinds.astype(np.int64))
    return _data(SHAPES, pictures[0], labels[0], pictures[1], labels[1])


def _draw(kinds, size, random):
    """uint8 pictures (len(kinds), size, size, 3) of the shapes whose numbers are given."""
    count = len(kinds)
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1

    def uniform(low, high, *shape):
        return random.uniform(low, high, (count, *shape, 1, 1)).astype(np.float32)

    def mask(kinds, scale, place):
        angle = uniform(0, 2 * math.pi)
        x, y = grid - uniform(-place, place), grid[:, None] - uniform(-place, place)
        x, y = (x * np.cos(angle) - y * np.sin(angle)) / scale, (x * np.sin(angle) + y * np.cos(angle)) / scale
        radius, turn = np.hypot(x, y), np.arctan2(y, x)

        def polygon(sides):  # the edge's distance from the centre, over that of a corner
            sector = 2 * math.pi / sides
            return math.cos(sector / 2) / np.cos(turn % sector - sector / 2)

        insides = (
            radius < 0.85,
            (radius < 0.95) & (radius > 0.55),
            radius < 1.1 * polygon(3),
            radius < polygon(4),
            radius < 0.95 * polygon(5),
            radius < 0.75 + 0.35 * np.cos(5 * turn),
            (np.minimum(abs(x), abs(y)) < 0.28) & (np.maximum(abs(x), abs(y)) < 0.9),
            (radius < 0.95) & (np.hypot(x - 0.45, y) > 0.7),
        )
        return np.select([kinds[:, None, None] == k for k in range(len(SHAPES))], insides)[:, None]

    background, colour, front = uniform(0, 1, 3), uniform(0, 1, 3), uniform(0, 1, 3)
    far = np.abs(colour - background).max(axis=1, keepdims=True) < 0.25
    colour = np.where(far, (background + 0.5) % 1, colour)
    picture = np.where(mask(kinds, uniform(0.45, 0.8), 0.25), colour, background)
    other = random.integers(0, len(SHAPES), count)
    piece = mask(other, uniform(0.15, 0.35), 0.8) & (uniform(0, 1, 1) < 0.5)
    picture = np.where(piece, front, picture)
    picture = picture + random.normal(0, 0.08, picture.shape).astype(np.float32)
    return (picture.clip(0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)


# Views ---------------------------------------------------------------------------------------------------------------


class Views:
    """The augmented views of a training set: reflect-padded, cropped, flipped and normalised, a batch at a time.

    A picture's view in an epoch is a function of `purpose`, the epoch and the picture's index alone: it is the same for
    every student, seed, order of pictures and subset, so the teacher need be asked about it only once (Beyer et al.,
    arXiv 2106.05237: the teacher must see the very view that the student sees).
    """

    def __init__(self, pictures, mean, std, purpose="views", padding=None):
        """`padding` is how many pixels crops are moved by at most [an eighth of the size]."""
        count, size = pictures.shape[:2]
        self.count, self.size, self.purpose = count, size, purpose
        self.mean, self.std, self.device = mean, std, pictures.device
        self.padding = size // 8 if padding is None else padding
        edge = torch.arange(-self.padding, size + self.padding, device=self.device).abs()
        edge = (size - 1) - ((size - 1) - edge).abs()
        padded = torch.empty(count, 2, len(edge), len(edge), 3, dtype=torch.uint8, device=self.device)
        for part in torch.arange(count, device=self.device).split(4096):
            padded[part, 0] = pictures[part].index_select(1, edge).index_select(2, edge)
            padded[part, 1] = padded[part, 0].flip(2)
        picture, side, row, column, channel = padded.stride()
        places = 2 * self.padding + 1
        self.windows = padded.as_strided(  # every crop of every picture and its mirror image, without copying any
            (count, 2, places, places, size, size * 3), (picture, side, row, column, row, channel)
        )
        self.epoch = None

    def start(self, epoch):
        """Draws every picture's crop and flip for `epoch`, counted from 0."""
        draws = generator(self.purpose, VIEWS_VERSION, epoch)
        places = 2 * self.padding + 1
        offsets = torch.randint(0, places, (2, self.count), generator=draws)
        # Alternating flip (arXiv 2404.00498): a random half is flipped in even epochs, the other half in odd ones.
        half = torch.rand(self.count, generator=generator(self.purpose, VIEWS_VERSION, "flip")) < 0.5
        self.rows, self.columns = offsets.to(self.device)
        self.flips = (half ^ bool(epoch % 2)).long().to(self.device)
        self.epoch = epoch

    def batch(self, indices):
        """The views of the pictures `indices` (B,) in the epoch begun: float32 (B, 3, S, S), channels_last."""
        crops = self.windows[indices, self.flips[indices], self.rows[indices], self.columns[indices]]
        return models.normalise(crops.view(len(indices), self.size, self.size, 3), self.mean, self.std)


def split(labels, fraction):
    """(training rows, validation rows) of a training set: `fraction` of each class, drawn once and for all.

    `labels` is (N,); both results are sorted index tensors. A class keeps at least one picture for training.
    """
    if not fraction:
        return torch.arange(len(labels)), torch.arange(0)
    labels, chosen = labels.cpu(), []
    draws = generator("validation")
    for number in range(int(labels.max()) + 1):
        rows = (labels == number).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=draws)]
        chosen.append(rows[: min(max(1, round(fraction * len(rows))), len(rows) - 1)])
    validation = torch.cat(chosen).sort().values
    training = torch.ones(len(labels), dtype=torch.bool)
    training[validation] = False
    return training.nonzero()[:, 0], validation
