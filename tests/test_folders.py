"""Folders of images: which are read, how they are split, what is kept when something goes wrong."""

import errno
import hashlib
import os
import shutil
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import CLASSES, make_images
from PIL import Image

import runs.files
from runs.files import Failure
from runs.signals import Interrupted
from sources import decode, folders, kept, ranges, threads


@pytest.fixture
def top(tmp_path):
    """train/ and test/ of three classes, with 5 and 3 images each."""
    return make_images(tmp_path / "p", train=5, test=3)


@pytest.fixture
def alone(tmp_path):
    """One folder of classes with 10 images each."""
    made = make_images(tmp_path / "made", train=10, test=1) / "train"
    return made.rename(tmp_path / "alone")


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
    assert ranges.decide([("floating-point", 0, high) for high in greatest]) == {"floating-point": expected}


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


@pytest.fixture
def mapped_files_stay(monkeypatch):
    """As on Windows: a file that is mapped into memory is not replaced."""
    replace = os.replace

    def refuse(source, target):
        maps = Path("/proc/self/maps").read_text().splitlines()
        if any(line.endswith(f" {os.path.realpath(target)}") for line in maps):  # not "... (deleted)"
            raise PermissionError(errno.EACCES, "Access is denied", str(target))
        replace(source, target)

    if sys.platform == "linux":
        monkeypatch.setattr(os, "replace", refuse)
        monkeypatch.setattr(runs.files, "PATIENCE", 0)


@pytest.mark.parametrize(("when", "left"), [(3, 2 + 6), (6, 5), (10, 1)])
def test_deep_images_survive_an_interruption(tmp_path, monkeypatch, mapped_files_stay, when, left):
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
    monkeypatch.setattr(threads, "CHUNK", 1)
    with pytest.raises(Interrupted):
        Loaded(top, cache)
    got = Loaded(top, cache)
    assert len(paths) == when + left
    assert got.digest == whole.digest and got.facts.ranges == {"16-bit": (0, 4095)}


# Which folders are read -----------------------------------------------------------------------------------------------


def test_the_current_folder_is_the_same_folder(top, alone, tmp_path, monkeypatch):
    for place, rest in ((top, {}), (alone, {"test_fraction": 0.2})):
        monkeypatch.chdir(tmp_path)
        absolute = Loaded(place, tmp_path / "out" / "data", **rest)
        relative = Loaded(place.name, tmp_path / "out" / "data", **rest)
        monkeypatch.chdir(place)
        monkeypatch.setattr(kept, "_write", None)  # nothing is decoded again
        here = Loaded(".", tmp_path / "out" / "data", **rest)
        monkeypatch.undo()
        assert absolute.names == relative.names == here.names
        assert absolute.digest == relative.digest == here.digest


def test_competitions_hand_out_a_test_folder_without_labels(top):
    shutil.rmtree(top / "test")
    (top / "test").mkdir()
    shutil.copy(top / "train" / "red" / "00.png", top / "test" / "1.png")
    with pytest.raises(Failure, match=r"test has no class folders, so .*\n.*\nOf .*train --test-fraction 0\.2 takes"):
        Loaded(top)
    loaded = Loaded(top, test_fraction=0.2)
    assert loaded.said[0] == f"{top / 'test'} has no class folders: its images are not used"
    assert (len(loaded.train), len(loaded.test)) == (12, 3) and all("train/" in name for name in loaded.names[1])


def test_a_class_may_be_called_test(alone):
    (alone / "red").rename(alone / "test")
    assert Loaded(alone, test_fraction=0.2).classes == ["blue", "green", "test"]
    for name in ("early", "late"):  # folders within a class
        (alone / "test" / name).mkdir()
        (alone / "test" / f"0{len(name)}.png").rename(alone / "test" / name / "0.png")
    assert len(Loaded(alone, test_fraction=0.2).train) == 24
    shutil.rmtree(alone / "blue")
    (alone / "green").rename(alone / "val")
    with pytest.raises(Failure, match=r"train does not exist, only test, val beside it"):
        Loaded(alone, test_fraction=0.2)


def test_a_class_may_be_called_train(alone):
    (alone / "red").rename(alone / "train")
    with pytest.raises(Failure, match=r"Of one folder of classes --test-fraction 0\.2 takes a fifth"):
        Loaded(alone)
    assert Loaded(alone, test_fraction=0.2).classes == ["blue", "green", "train"]


@pytest.mark.parametrize(("train", "test"), [("Training", "Testing"), ("seg_train", "seg_test")])
def test_the_parts_of_a_data_set_are_no_classes(top, train, test):
    """Training and Testing, say, each with folders of classes, must not be told from each other."""
    (top / "train").rename(top / train)
    (top / "test").rename(top / test)
    with pytest.raises(Failure, match=rf"train does not exist, only {test}, {train} beside it"):
        Loaded(top, test_fraction=0.2)


@pytest.mark.skipif(os.name == "nt", reason="Windows does not record when a file was renamed")
def test_two_files_that_change_places_are_read_again(top, tmp_path):
    one, other, cache = top / "train/blue/00.png", top / "train/red/00.png", tmp_path / "out" / "data"
    for path, shade in ((one, 0), (other, 250)):
        Image.fromarray(np.full((16, 16), shade, np.uint8)).save(path.with_suffix(".bmp"))
        path.with_suffix(".bmp").rename(path)
        os.utime(path, ns=(10**18, 10**18))
    Loaded(top, cache)
    one.rename(tmp_path / "between")
    other.rename(one)
    (tmp_path / "between").rename(other)
    assert Loaded(top, cache).digest == Loaded(top).digest


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_links_to_what_would_not_be_read_otherwise(top):
    (top / "train" / "red").rename(top / "train" / ".real")
    (top / "train" / "red").symlink_to(".real")
    (top / "train" / "blue" / "@eaDir").mkdir()
    (top / "train" / "blue" / "01.png").rename(top / "train" / "blue" / "@eaDir" / "01.png")
    (top / "train" / "blue" / "more").symlink_to("@eaDir")
    assert len(Loaded(top).train) == 15
    (top / "train" / "aaa").symlink_to("red")
    (top / "test" / "aaa").symlink_to("red")
    with pytest.raises(Failure, match=r"red links to .*\.real, whose images are those of the class aaa\. Remove that"):
        Loaded(top)
    (top / "train" / "aaa").unlink()
    (top / "train" / "aaa").symlink_to("green")
    with pytest.raises(Failure, match=r"aaa links to .*green, whose images are those of the class green\. Remove that"):
        Loaded(top)


def test_runs_do_not_lie_beside_classes(alone):
    with pytest.raises(Failure, match="this program's runs must not lie beside them. Name an --output-dir"):
        Loaded(alone, alone / "data", test_fraction=0.2)
    assert sorted(each.name for each in alone.iterdir()) == ["blue", "green", "red"]


def write_output(place, image):
    """What makes a folder one of this program's: a run, and a figure, which could be taken for an image."""
    for name in ("figures", "teacher-s0"):
        (place / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(image, place / "figures")
    for name in ("run.json", "model.pt"):
        (place / "teacher-s0" / name).touch()


def test_the_output_folder_is_no_class_nor_is_an_earlier_one(alone, monkeypatch):
    monkeypatch.chdir(alone)
    passed = ".: 30 images taken; passed over: 1 folder outputs, where this program writes"
    for place in ("outputs", "outputs/pets", "outputs-2"):
        (alone / place).mkdir(exist_ok=True)  # it is locked before its first run
        loaded = Loaded(".", alone / place / "data", test_fraction=0.2)
        assert loaded.classes == [*CLASSES] and loaded.said[0].startswith(passed)
        write_output(alone / place, alone / "red" / "00.png")
    assert ", 1 folder outputs-2, where" in loaded.said[0]


def test_a_class_in_which_this_program_writes_keeps_its_images(alone, tmp_path):
    whole = Loaded(alone, test_fraction=0.2)
    for place in (alone / "red" / "out", tmp_path / "far"):
        write_output(place, alone / "red" / "00.png")
        if place.parent == tmp_path:
            (alone / "red" / "link").symlink_to(place)
        loaded = Loaded(alone, place / "data", test_fraction=0.2)
        assert loaded.names == whole.names
        count = 1 + (place.parent == tmp_path)
        assert loaded.said[0].endswith(f"; passed over: {count} folder(s) where this program writes")
    with pytest.raises(Failure, match="red holds images: this program must not write among them. Name an"):
        Loaded(alone, alone / "red" / "data", test_fraction=0.2)
    write_output(alone / "blue", alone / "red" / "00.png")  # by an earlier command, beside the images of that class
    assert Loaded(alone, tmp_path / "other", test_fraction=0.2).names == whole.names


# Their split ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [False, True])
def test_damaged_files_do_not_count_for_the_fraction(alone, tmp_path, mapped_files_stay, cache):
    cache = tmp_path / "out" / "data" if cache else None
    clean = Loaded(alone, test_fraction=0.3)
    for number in range(40):
        (alone / "red" / f"empty{number}.png").touch()
        (alone / "blue" / f"text{number}.png").write_text(f"no {number}")  # of which some would be test images
    (alone / "blue" / "dead.png").symlink_to(tmp_path / "nowhere")
    for _ in range(2):
        loaded = Loaded(alone, cache, test_fraction=0.3, skip_damaged=True)
        assert loaded.names == clean.names and (loaded.test == clean.test).all()
        assert loaded.facts.record["skipped"] == {"training": {"blue": 41, "red": 40}, "test": {}}


def test_files_that_cannot_be_read_for_now_stop_the_split(alone, monkeypatch):
    def fail(file, name):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(hashlib, "file_digest", fail)
    with pytest.raises(Failure, match=r"cannot read .*00\.png: Input/output error"):
        Loaded(alone, test_fraction=0.3)


def split(listing, fraction):
    """`listing` maps classes to letters, one for each file, equal ones being copies."""
    paths = {name: [f"{name}/{number}" for number in range(len(files))] for name, files in listing.items()}
    hashes = {path: file for name in listing for path, file in zip(paths[name], listing[name], strict=True)}
    return [
        {name: "".join(hashes[path] for path in found) for name, found in part.items()}
        for part in folders._split(paths, hashes, fraction, set())
    ]


def test_copies_do_not_overrun_the_fraction():
    train, test = split({"x": "a" * 41 + "bcdefghij", "y": "abcdefghij"}, 0.2)
    assert test == {"x": "bc", "y": "bc"} and "a" * 41 in train["x"]
    assert split({"x": "aaabb", "y": "klmno"}, 0.2)[1] == {"x": "bb", "y": "k"}  # all have copies: the fewest


def test_a_file_of_two_classes_is_on_one_side():
    for listing in ({"x": "abcdefghij", "y": "jihgfklmno"}, {"x": "ab", "y": "ab"}, {"x": "ab", "y": "bcdefg"}):
        train, test = split(listing, 0.3)
        assert not {*"".join(train.values())} & {*"".join(test.values())}
        assert all(train.values()) and all(test.values())
    with pytest.raises(Failure, match="Remove images that stand under two classes"):
        split({"x": "ab", "y": "ac", "z": "bc"}, 0.3)
