"""A data set as tensors, and the augmented views of an epoch.

CIFAR, images in folders or drawn shapes (`sources/`) all become one uint8 tensor (N, S, S, 3) per split; a whole batch
is cropped, flipped and normalized at a time, on the device, without workers.
"""

import functools
import hashlib
import json
import warnings
from dataclasses import dataclass, field, replace

import numpy as np
import torch

import models
from models import generator
from runs.files import Failure
from runs.settings import VIEWS_VERSION
from sources import Facts, Unlabeled

PART = 1 << 24  # bytes of images that are summed at a time


@dataclass(frozen=True)
class Data:
    """Images as uint8 (N, S, S, 3), labels as int64 (N,); `mean` and `std` per channel, of the training images on a
    scale of 0 to 1; `digest`, the SHA-256 of all of it; `facts`, what else the source knows; `unlabeled`, the images
    without labels, where there are any, which neither statistics nor digest cover."""

    classes: tuple[str, ...]
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str
    facts: Facts = field(default_factory=Facts)
    unlabeled: Unlabeled | None = None

    @property
    def image_size(self):
        return self.train_images.shape[1]

    def to(self, device):
        """The same data with its tensors on `device`."""
        names = ("train_images", "train_labels", "test_images", "test_labels")
        unlabeled = self.unlabeled and replace(self.unlabeled, images=self.unlabeled.images.to(device))
        return replace(self, unlabeled=unlabeled, **{name: getattr(self, name).to(device) for name in names})

    def transfer_set(self, fraction=1.0, omitted=()):
        """The training images that students see, as sorted indices: `fraction` of each class, at least one image, and
        none of the classes named `omitted`. Always the same; those of a smaller fraction are among those of a larger
        one. Raises Failure where there is no such class, or where fewer than two are left."""
        unknown = [name for name in omitted if name not in self.classes]
        if unknown:
            raise Failure(f"There is no class '{unknown[0]}' to omit. The classes are: {', '.join(self.classes)}.")
        if len(set(self.classes) - set(omitted)) < 2:
            raise Failure("Students need two classes or more: omit fewer of them.")
        labels, draws, chosen = self.train_labels.cpu(), generator("transfer set"), []
        for number, name in enumerate(self.classes):
            rows = (labels == number).nonzero()[:, 0]
            rows = rows[torch.randperm(len(rows), generator=draws)]
            if name not in omitted:
                chosen.append(rows[: max(1, round(fraction * len(rows)))])
        return torch.cat(chosen).sort().values


def load(dataset, *, data_dir="data", data_url=None, image_size=32, workers=2, cache=None, processes=1, **folder):
    """The Data of `dataset` ("cifar10", "cifar100", "folder" or "shapes").

    `cache` is the folder where decoded images of a "folder" are kept, `processes` how many on this machine are going to
    hold the data, `folder` further arguments of sources.folders.load. Raises Failure where the data cannot be read or
    are damaged, with the path and what to do.
    """
    if dataset in ("cifar10", "cifar100"):
        from sources import cifar  # only here, since importing torchvision takes a second

        return from_arrays(*cifar.load(data_dir, data_url, image_size, cifar.DATASETS[dataset], processes))
    if dataset == "folder":
        from sources import folders

        arrays, facts = folders.load(data_dir, image_size, workers, cache, **folder)
        return from_arrays(*arrays, facts=facts)
    from sources import shapes

    return from_arrays(*shapes.load(image_size))


def with_unlabeled(data, directory, **rest):
    """The Data with the images of a folder, without labels; `rest` are further arguments of sources.unlabeled.load,
    whose failures it raises."""
    from sources import unlabeled

    found = unlabeled.load(directory, data.image_size, ranges=data.facts.ranges, **rest)
    return replace(data, unlabeled=replace(found, images=_tensor(found.images)))


def from_arrays(classes, train_images, train_labels, test_images, test_labels, facts=None):
    """The Data of NumPy arrays, which may be memory-mapped: statistics and digest are computed here."""
    total, squares = np.zeros(3), np.zeros(3)
    part = max(1, PART // train_images[0].nbytes)
    for start in range(0, len(train_images), part):  # in parts, so that no wider copy of all images is ever held
        rows = train_images[start : start + part].reshape(-1, train_images.shape[2] * 3)  # long enough to vectorize
        total += rows.sum(0, dtype=np.uint32).reshape(-1, 3).sum(0, dtype=np.float64)
        squares += np.square(rows, dtype=np.uint16).sum(0, dtype=np.uint64).reshape(-1, 3).sum(0, dtype=np.float64)
    count = train_images.size / 3
    mean = total / count / 255
    std = np.sqrt(np.maximum(squares / count / 255**2 - mean**2, 0))
    facts = facts or Facts()
    described = [list(classes), train_images.shape, test_images.shape, *([facts.identity] if facts.identity else [])]
    content = hashlib.sha256(json.dumps(described).encode())
    for array in (train_images, train_labels, test_images, test_labels):
        content.update(np.ascontiguousarray(array))
    return Data(
        tuple(classes),
        *map(_tensor, (train_images, train_labels, test_images, test_labels)),
        tuple(mean.tolist()),
        tuple(np.maximum(std, 1 / 255).tolist()),  # images of a single colour have no spread to divide by
        content.hexdigest(),
        facts,
    )


def _tensor(array):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor is the tensor
        return torch.from_numpy(array)


class Views:
    """The augmented views of a training set: cropped after reflection `padding`, mirrored where `mirror` says so,
    normalized and, with `cutout`, a square of each blanked.

    An image's view in an epoch is a function of these three, `stream`, the epoch and the image's index alone: it is the
    same for every seed, order and subset, so the teacher need be asked about it only once (Beyer et al., arXiv
    2106.05237: the teacher must see the very view that the student sees).
    """

    def __init__(self, images, mean, std, stream="views", padding=None, cutout=0, mirror=True):
        """`images` are uint8 (N, S, S, 3); `padding` is how many pixels a crop moves at most [an eighth of S], `cutout`
        the side in pixels of the square that shows the mean colour (arXiv 1708.04552, but all of it lies in the view);
        without `mirror` no image is mirrored, else each is in every second epoch.
        Raises ValueError unless `padding` is less than S and `cutout` at most S."""
        self.images, self.mean, self.std, self.stream = images, mean, std, stream
        self.count, self.size = images.shape[:2]
        self.device = images.device
        self.padding = self.size // 8 if padding is None else padding
        if not 0 <= self.padding < self.size:
            raise ValueError(f"views of {self.size} pixels cannot be moved by {padding}")
        self.cutout = cutout
        if not 0 <= cutout <= self.size:
            raise ValueError(f"of views of {self.size} pixels no square of {cutout} can be blanked")
        self.mirror = mirror
        edge = torch.arange(-self.padding, self.size + self.padding, device=self.device).abs()
        reflected = (self.size - 1) - ((self.size - 1) - edge).abs()
        self.windows = reflected.unfold(0, self.size, 1)  # (2 * padding + 1, S): source pixels of a crop, by its offset
        self.draws = functools.lru_cache(maxsize=1)(self._draws)
        self.corners = functools.lru_cache(maxsize=1)(self._corners)

    def _draws(self, epoch):
        """(row offsets, column offsets, flips) of all images in `epoch`, counted from 0: three tensors (N,)."""
        places = 2 * self.padding + 1
        draws = generator(self.stream, VIEWS_VERSION, epoch)
        rows, columns = torch.randint(0, places, (2, self.count), generator=draws).to(self.device)
        if not self.mirror:
            return rows, columns, torch.zeros_like(rows, dtype=torch.bool)
        # Alternating flip (arXiv 2404.00498): a random half is flipped in even epochs, the other half in odd ones.
        half = torch.rand(self.count, generator=generator(self.stream, VIEWS_VERSION, "flip")) < 0.5
        return rows, columns, (half ^ bool(epoch % 2)).to(self.device)

    def _corners(self, epoch):
        """The rows and columns where the blanked squares of all images begin in `epoch`: (2, N)."""
        draws = generator(self.stream, VIEWS_VERSION, "cutout", epoch)
        return torch.randint(self.size - self.cutout + 1, (2, self.count), generator=draws).to(self.device)

    @property
    def recipe(self):
        """All that the views depend on besides the images and the epoch, for the name of what is kept of them."""
        cutout = ["cutout", self.cutout] if self.cutout else []
        mirror = [] if self.mirror else ["not mirrored"]
        return [self.stream, VIEWS_VERSION, self.size, self.padding, self.mean, self.std, *cutout, *mirror]

    def numbers(self, epoch, indices):
        """Which images the views `indices` (B,) of `epoch` show: those of the same numbers."""
        return indices

    def batch(self, epoch, indices):
        """The views of the images `indices` (B,) in `epoch`: float32 (B, 3, S, S) in the device's memory format."""
        rows, columns, flips = (each[indices] for each in self.draws(epoch))
        rows, columns = self.windows[rows], self.windows[columns]  # (B, S): where each pixel of the view comes from
        columns = torch.where(flips[:, None], self.size - 1 - columns, columns)
        lines = self.numbers(epoch, indices)[:, None] * self.size + rows
        pixels = (lines[:, :, None] * self.size + columns[:, None, :]).flatten()
        source = self.images.view(-1, 3)
        # Before PyTorch 2.14 index_select on MPS gives zeros beyond 2^31 elements, and no error (pytorch issue 188756).
        views = source[pixels] if self.device.type == "mps" else source.index_select(0, pixels)
        views = models.normalize(views.view(-1, self.size, self.size, 3), self.mean, self.std)
        if not self.cutout:
            return views
        corners, pixel = self.corners(epoch)[:, indices, None], torch.arange(self.size, device=self.device)
        rows, columns = (corners <= pixel) & (pixel < corners + self.cutout)  # (B, S): those of the square
        return views.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0)


class UnlabeledViews(Views):
    """The views of images without labels: `count` in every epoch, of the next images in turn, in another order whenever
    all have had their turn. Like all views they are the same for every seed; which are flipped is drawn by their place
    in the epoch, and not by image."""

    def __init__(self, images, mean, std, count, **augmentation):
        super().__init__(images, mean, std, "unlabeled views", **augmentation)
        self.count = count
        self.chosen = functools.lru_cache(maxsize=1)(self._chosen)

    @property
    def recipe(self):
        return [*super().recipe, self.count]

    def _chosen(self, epoch):
        """The numbers of the images whose turn it is in `epoch`: (count,)."""
        images, start = len(self.images), epoch * self.count
        first, last = start // images, (start + self.count - 1) // images
        turns = (generator(self.stream, VIEWS_VERSION, "turn", turn) for turn in range(first, last + 1))
        order = torch.cat([torch.randperm(images, generator=draws) for draws in turns])
        return order[start - first * images :][: self.count].to(self.device)

    def numbers(self, epoch, indices):
        return self.chosen(epoch)[indices]


def unlabeled_views(data, augmentation, images, batch_size):
    """The UnlabeledViews of students that see `images` images with labels: as many in a batch as of these.
    `augmentation` are the `padding`, `cutout` and `mirror` of Views."""
    batch = min(batch_size, images)
    return UnlabeledViews(data.unlabeled.images, data.mean, data.std, images // batch * batch, **augmentation)


class JoinedViews:
    """The views of batches that hold first `labeled` images with labels, and then images without, whose numbers follow
    those of all images with labels."""

    def __init__(self, views, unlabeled_views, labeled):
        self.views, self.unlabeled_views, self.labeled = views, unlabeled_views, labeled

    def batch(self, epoch, indices):
        """As Views.batch."""
        own, others = indices[: self.labeled], indices[self.labeled :] - self.views.count
        return torch.cat([self.views.batch(epoch, own), self.unlabeled_views.batch(epoch, others)])


def split(labels, fraction, transfer_set=None):
    """(training indices, validation indices) of a training set: `fraction` of each class, always the same.

    `labels` is (N,); both results are sorted index tensors. A class keeps at least one image for training. Of a
    `transfer_set`, indices of those that students see, validation images are only such as are in the validation part of
    the whole training set, too, so a teacher trained without that was not trained on them (normalization and whitening
    are of all training images, whatever the part): about `fraction` of each class, no more, and none of a class of
    which that part has none.
    """
    everything = torch.arange(len(labels))
    seen = everything if transfer_set is None else transfer_set.cpu()
    if not fraction:
        return seen, torch.arange(0)
    labels, chosen, member = labels.cpu(), [], torch.isin(everything, seen)
    draws = generator("validation")
    for number in range(int(labels.max()) + 1):
        rows = (labels == number).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=draws)]
        apart, own = rows[: max(1, round(fraction * len(rows)))], rows[member[rows]]
        count = min(int(member[apart].sum()), max(1, round(fraction * len(own))), len(own) - 1)
        chosen.append(own[: max(0, count)])
    validation = torch.cat(chosen).sort().values
    return seen[~torch.isin(seen, validation)], validation
