"""--predict: the classes of any images, as CSV."""

import csv
import io
import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from runs.files import Failure
from runs.hooks import find_hooks
from use.find import find_images, find_model

COLUMNS = ("path", "class", "probability", "second_class", "second_probability")


def predict(arguments):
    """Prints a row of COLUMNS for every image that `arguments.predict` names, in order.

    Where folders are named like the classes, a line on standard error says how many of their images were right. An
    image that cannot be decoded is named there, too, and the others go on; then, at the end, raises Failure.
    """
    path, hooks = find_model(arguments), find_hooks(arguments)
    found = find_images(arguments.predict)

    import torch  # takes seconds, so only once the paths are known to be good

    import models
    from runs.machine import start_machine
    from sources.ranges import DOCUMENTED, plain
    from use.answers import answers, load_to_ask

    network = load_to_ask(path, hooks, arguments.mirror)
    machine = start_machine(arguments.device, "fp32")
    device = machine.device
    network.to(**machine.place)
    classes, labelled, right, failures = network.classes, 0, 0, 0
    numbers = {name: number for number, name in enumerate(classes)}
    ranges, kinds, outside = DOCUMENTED | network.ranges, Counter(), Counter()
    if not sys.stdout.isatty() and hasattr(sys.stdout, "reconfigure"):  # a file: paths as they are, on Windows, too
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    _write([COLUMNS])
    with (
        tqdm(total=len(found), desc=f"{path.parent.name}: predicting", unit=" images", disable=None) as bar,
        ThreadPoolExecutor(max(1, arguments.num_workers)) as pool,
    ):
        size = models.inference_batch(device, network.image_size)  # as for the test set; and memory is bounded
        for start in range(0, len(found), size):
            part = found[start : start + size]
            images = _decode(part, network.image_size, ranges, pool, kinds, outside)
            failures += len(part) - len(images)
            rows = []
            if images:
                batch = torch.from_numpy(np.stack([*images.values()])).to(device)
                logits = answers(network, batch, arguments.mirror).cpu()
                ranked = logits.argsort(dim=1, descending=True, stable=True)[:, :2]  # of equals the first
                values = (logits.double() / arguments.temperature[0]).softmax(1).gather(1, ranked)
                for position, best, likely in zip(images, ranked.tolist(), values.tolist(), strict=True):
                    image, folders = part[position]
                    rows.append((image, classes[best[0]], f"{likely[0]:.6g}", classes[best[1]], f"{likely[1]:.6g}"))
                    label = _label(folders, numbers)
                    labelled += label is not None
                    right += label == best[0]
            _write(rows)
            bar.update(len(part))
    if labelled:
        share = f"{right / labelled:.4f} ({right:,} of {labelled:,} images)"
        print(f"Accuracy where a folder is named like the class: {share}", file=sys.stderr)
    for kind in sorted(kinds.keys() - network.ranges.keys()):
        black, white = map(plain, ranges[kind])
        print(
            f"Images with {kind} samples: {kinds[kind]:,}, but the model was trained on none such. {black} was taken "
            f"for black and {white} for white",
            file=sys.stderr,
        )
    for kind, count in sorted(outside.items()):
        black, white = map(plain, ranges[kind])
        print(
            f"Images with {kind} samples outside of the training set's range, {black} to {white}: {count:,}. What is "
            "darker was taken for black, what is brighter for white",
            file=sys.stderr,
        )
    if failures:
        raise Failure(f"{failures:,} of {len(found):,} images could not be decoded; they are named above.")


def _decode(part, image_size, ranges, pool, kinds, outside):
    """{position in `part`: uint8 image (S, S, 3)} of those that can be decoded; the others are named on standard
    error. Counts in `kinds` the images of each kind of samples that needs one of `ranges`, in `outside` those of them
    with samples beyond it."""

    from sources.decode import decode, no_range
    from sources.ranges import beyond

    def read(item):
        try:
            decoded = decode(item[0], image_size, ranges)
            return decoded if decoded.pixels is not None else no_range(item[0], decoded)
        except Failure as error:
            return error

    images = {}
    try:
        for position, image in enumerate(pool.map(read, part)):
            if isinstance(image, Failure):
                tqdm.write(str(image), file=sys.stderr)
            else:
                images[position] = image.pixels
                kinds.update(kind for kind, _, _ in image.samples)
                outside.update(kind for kind, _, _ in beyond(image.samples, ranges))
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    return images


def _label(folders, numbers):
    """The number of the class that the nearest folder named like one says an image has; None without such a folder."""
    names = (os.fsencode(name).decode("utf-8", "backslashreplace") for name in reversed(folders))  # as classes are
    return next((numbers[name] for name in names if name in numbers), None)


def _write(rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    tqdm.write(text.getvalue(), file=sys.stdout, end="")  # on a terminal above the progress bar
