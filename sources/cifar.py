"""CIFAR-10 and CIFAR-100 as torchvision reads them: downloaded once, verified by their official MD5s, read as one
tensor per split."""

import hashlib
import http.client
import os
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100
from tqdm import tqdm

from runs.costs import free_memory
from runs.files import Damaged, Failure, reason, remove, replace
from runs.lock import lock

DATASETS = {"cifar10": CIFAR10, "cifar100": CIFAR100}  # the latter with its 100 fine labels
NETWORK_TIMEOUT = 30  # seconds without a byte


def load(data_dir, url=None, image_size=32, dataset=CIFAR10, processes=1):
    """A data set of DATASETS from `data_dir`, downloaded once (from `url`, a mirror, where given), resized to
    `image_size`.

    `dataset` is torchvision's class or a subclass with other checksums. Its pickles are read only after their MD5
    matched. Raises Failure where it cannot be downloaded or unpacked or the memory is too small for `processes` of it,
    and Damaged where a file has another MD5.
    """
    root = Path(data_dir)
    batches = root / dataset.base_folder
    archive = root / dataset.filename
    wanted = {batches / name: md5 for name, md5 in dataset.train_list + dataset.test_list}
    wanted[batches / dataset.meta["filename"]] = dataset.meta["md5"]

    def damaged():
        return [path for path, md5 in wanted.items() if not path.is_file() or _md5(path) != md5]

    if bad := damaged():
        folders = [name for name in ("train", "test") if (root / name).is_dir()]
        if folders and len(bad) == len(wanted) and not archive.is_file():
            raise Failure(
                f"{root} holds a folder {folders[0]}, but nothing of {dataset.__name__}. For images of your own add "
                "--dataset folder."
            )
        with lock(root, ".unpacking"):  # two first runs must not write to one file
            bad = damaged()
            if bad:
                _unpack(dataset, root, url, [path for path in bad if path.is_file()])
        for path in damaged():
            raise Damaged(f"{path} is damaged even though it was unpacked from {archive} just now.")
    train, test = (dataset(root, train=part, download=False) for part in (True, False))
    size = 3 * image_size**2 * (len(train) + len(test)) * processes
    free = free_memory(torch.device("cpu"))
    if image_size != train.data.shape[1] and free is not None and size > free:
        each = f" for {processes} processes" if processes > 1 else ""
        raise Failure(
            f"Resized to {image_size}x{image_size} the images take {size / 1e9:.1f} GB of memory{each}, but only "
            f"{free / 1e9:.1f} GB are free. Choose a smaller --image-size."
        )
    images = [np.ascontiguousarray(resize(part.data, image_size)) for part in (train, test)]
    labels = [np.asarray(part.targets, dtype=np.int64) for part in (train, test)]
    return train.classes, images[0], labels[0], images[1], labels[1]


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
    replace(part, path)


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


def resize(images, image_size):
    """uint8 images (N, H, H, 3) as NumPy array -> (N, image_size, image_size, 3), bicubic with antialiasing: by Pillow,
    whose whole numbers are the same on every processor, as the data set's digest must be."""
    size = image_size, image_size
    if images.shape[1:3] == size:
        return images
    result = np.empty((len(images), *size, 3), np.uint8)
    for position, image in enumerate(images):
        result[position] = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    return result
