"""Folders of images: which are read, how they are split, what is kept when something goes wrong."""

import errno
import hashlib
import struct
import zlib

import numpy as np
import pytest
from conftest import make_images
from PIL import Image

from runs.files import Failure
from runs.signals import Interrupted
from sources import decode, folders, kept


@pytest.fixture
def top(tmp_path):
    """train/ and test/ of three classes, with 5 and 3 images each."""
    return make_images(tmp_path / "p", train=5, test=3)


class Loaded:
    def __init__(self, directory, cache=None, **rest):
        self.said = []
        self.arrays, self.facts = folders.load(directory, 16, 2, cache, say=self.said.append, **rest)
        self.classes, self.train, _, self.test, _ = self.arrays
        self.names = self.facts.names

    @property
    def digest(self):
        """Whatever of the data a digest covers."""
        content = [np.ascontiguousarray(array).tobytes() for array in self.arrays[1:]]
        return hashlib.sha256(repr((self.classes, self.facts.identity)).encode() + b"".join(content)).hexdigest()


# Values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("greatest", "expected"),
    [([1, 0.4], (0, 1)), ([1, 1.0001], (0, 1.0001)), ([1, 3], (0, 3)), ([100, 200], (0, 255)), ([256, 3], (0, 256))],
)
def test_floats_are_taken_for_0_to_255_only_where_some_come_near(greatest, expected):
    assert decode.decide([("floating-point", 0, high) for high in greatest]) == {"floating-point": expected}


def deep_png(path, samples):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], 16, 6, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b""))


@pytest.mark.parametrize("most", [4095, 65535])
def test_the_opaque_alpha_is_one_for_the_whole_data_set(top, tmp_path, most):
    samples = np.zeros((16, 16, 4), np.uint16)
    samples[..., 0], samples[..., 3] = 4095, 3000
    deep_png(top / "train/blue/a.png", samples)
    samples[0, 0, 3] = most
    deep_png(top / "test/red/b.png", samples)
    loaded = Loaded(top)
    assert loaded.facts.ranges == {"16-bit": (0, 4095), "16-bit alpha": (0, most)}
    for names, images, name in zip(loaded.names, (loaded.train, loaded.test), ("train/blue/a.png", "test/red/b.png"),
                                   strict=True):  # fmt: skip
        expected = 255 * (1 - 3000 / most)
        assert abs(images[names.index(name)][5, 5] - (255.0, expected, expected)).max() <= 1
    assert f"from 3,000 to {most:,}. In all of them 0 becomes transparent and {most:,} opaque" in loaded.said[-1]


# Damage, and what is none ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "there is not enough memory to decode"),
        (OSError("out of memory error when reading image file"), "there is not enough memory to decode"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (OSError(errno.ESTALE, "Stale file handle"), "Stale file handle"),
    ],
)
def test_what_is_no_fault_of_the_file_is_no_damage(top, tmp_path, monkeypatch, error, words):
    path, open_image = top / "train" / "red" / "00.png", Image.open

    def fail(file, **rest):
        if file.name == str(path):
            raise error
        return open_image(file, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", fail)
        with pytest.raises(Failure, match=words) as raised:
            Loaded(top, tmp_path / "out" / "data", skip_damaged=True)
        assert not isinstance(raised.value, decode.NotDecoded) and str(path) in str(raised.value)
    assert len(Loaded(top, tmp_path / "out" / "data", skip_damaged=True).train) == 15


def test_damaged_files_are_not_decoded_again_unless_by_another_pillow(top, tmp_path, monkeypatch):
    (top / "train" / "red" / "empty.png").touch()
    (top / "train" / "red" / "dead.png").symlink_to(tmp_path / "nowhere")
    paths = []
    monkeypatch.setattr(kept, "decode", lambda path, *rest: paths.append(path) or decode.decode(path, *rest))
    Loaded(top, tmp_path / "out" / "data", skip_damaged=True)
    paths.clear()
    again = Loaded(top, tmp_path / "out" / "data", skip_damaged=True)
    assert paths == [str(top / "train" / "red" / "dead.png")]  # it may be there now
    assert again.facts.record["skipped_files"] == ["train/red/dead.png", "train/red/empty.png"]
    monkeypatch.setattr(decode.PIL, "__version__", "99")
    paths.clear()
    Loaded(top, tmp_path / "out" / "data", skip_damaged=True)
    assert len(paths) == 2
    paths.clear()
    Loaded(top, tmp_path / "out" / "data", skip_damaged=True)
    assert len(paths) == 1


@pytest.mark.parametrize(("when", "left"), [(3, 2 + 6), (6, 5), (10, 1)])
def test_deep_images_survive_an_interruption(tmp_path, monkeypatch, when, left):
    """Four new ones are decoded, then all six are scaled, since their range is new for the two that were kept before;
    it is interrupted at the third new one, at the second to be scaled, and at the last."""
    top, cache = make_images(tmp_path / "p", train=1, test=1), tmp_path / "out" / "data"
    for number, path in enumerate(sorted(top.glob("*/*/*.png"))):
        Image.fromarray(np.full((16, 16), 100 + number, np.uint16)).save(path)
    Loaded(top, cache)
    for number, path in enumerate(sorted(top.glob("t*/[gr]*/*.png"))):
        Image.fromarray(np.full((16, 17), 3000 + number, np.uint16)).save(path)
    whole, paths = Loaded(top), []

    def count(path, size, ranges):
        paths.append(path)
        if len(paths) == when:
            raise Interrupted(2)
        return decode.decode(path, size, ranges)

    monkeypatch.setattr(kept, "decode", count)
    monkeypatch.setattr(kept, "CHUNK", 1)
    with pytest.raises(Interrupted):
        Loaded(top, cache)
    got = Loaded(top, cache)
    assert len(paths) == when + left
    assert got.digest == whole.digest and got.facts.ranges == {"16-bit": (0, 4095)}
