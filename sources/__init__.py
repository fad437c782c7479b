"""Where images come from. Each source gives (classes, train images, train labels, test images, test labels), folders
these and their Facts."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Facts:
    """What is known of a data set besides its arrays.

    `identity` is what its digest covers besides them; `ranges`, {kind: (black, white)}, how samples of more than 8 bits
    were scaled (sources.decode); `record`, what run.json says of the images; `names`, the paths of the training and of
    the test images, relative to the data folder; `sizes`, how many images are of which size, {"640x480": 3}.
    """

    identity: dict = field(default_factory=dict)
    ranges: dict = field(default_factory=dict)
    record: dict = field(default_factory=dict)
    names: tuple[list, list] | None = None
    sizes: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Unlabeled:
    """Images without labels: `images`, uint8 (N, S, S, 3), in data.Data a tensor; their `names`, paths below their
    folder; `digest`, the SHA-256 of them; how many files were `skipped` since they cannot be decoded."""

    images: object
    names: list[str]
    digest: str
    skipped: int = 0


def one_line(name):
    """A file's name for a list of one file a line: as Python writes it where it holds an end of line or the like."""
    return name if name.isprintable() else repr(name)
