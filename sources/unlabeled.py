"""Images without labels: what a distilled student learns of them it learns from its teacher's answers alone.

Hinton, Vinyals and Dean (arXiv 1503.02531, section 1) name a transfer set of such images alone; here they stand beside
those with labels.
"""

import hashlib
import os
from pathlib import Path

import numpy as np

from runs.files import Damaged, Failure, reason
from sources import Unlabeled, kept
from sources.folders import damage, list_damaged, place_of, relative, say_ranges
from sources.listing import find_images


def load(
    directory, image_size, workers=2, cache=None, ranges=None, *, skip_damaged=False, say=lambda line: None,
    agree=lambda find: find(),
):  # fmt: skip
    """The Unlabeled images in `directory` and all folders below it.

    They are decoded, kept in `cache` and left out as those of sources.folders.load are, which says what the other
    arguments mean; `ranges` are those by which the data set's samples of more than 8 bits were scaled, for these images
    to be scaled alike. Raises Failure where there are none, and Damaged where some cannot be decoded.
    """
    directory, cache = Path(directory), cache and Path(cache)
    if not directory.is_dir():
        what = "is no folder" if directory.exists() else "does not exist"
        raise Failure(f"{directory} {what}. --unlabeled needs a folder of images, in folders of any names.")
    output = cache and os.path.realpath(cache.parent)
    if output == os.path.realpath(directory):
        raise Failure(f"{directory} is where this program writes. Name another --output-dir.")
    try:
        found = find_images(directory, output=output)
    except OSError as error:
        raise Failure(f"cannot read {error.filename or directory}: {reason(error)}.") from error
    words = f"; passed over: {found.passed_over()}" if found.passed else ""
    if not found.paths:
        raise Failure(f"{directory} holds no images{words}.")
    say(f"{directory}: {len(found.paths):,} image{'s' * (len(found.paths) != 1)} without labels{words}")
    keys = dict(zip(found.paths, kept.file_keys(directory, found.paths), strict=True))
    file = cache and cache / f"unlabeled-{place_of(directory, keys.values(), agree)}-{image_size}.npy"
    decoded = kept.load(found.paths, [*keys.values()], image_size, workers, file, ranges)
    say_ranges(decoded.record, say)
    bad = {path: decoded.damaged[key] for path, key in keys.items() if key in decoded.damaged}
    listed = list_damaged(bad, cache and cache / "damaged-unlabeled.txt")
    if bad and not skip_damaged:
        raise Damaged(damage(bad, len(found.paths), listed))
    if len(bad) == len(found.paths):
        raise Failure(f"none of the images in {directory} can be decoded (listed in {listed}).")
    if bad:
        where = f", listed in {listed}" if listed else ""
        say(f"Left out, since they cannot be decoded: {len(bad):,} of the images without labels{where}")
    digest = hashlib.sha256(str(decoded.images.shape).encode())
    digest.update(np.ascontiguousarray(decoded.images))
    names = [relative(path, directory) for path in found.paths if path not in bad]
    return Unlabeled(decoded.images, names, digest.hexdigest(), len(bad))
