"""Images from folders and archives, or drawn by the program; the augmented views of an epoch."""

import hashlib
import http.server
import os
import pickle
import socket
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CIFAR10_DIR, CLASSES, make_images, needs_cifar10
from PIL import Image

import data
import models
import train
from runs.files import Damaged, Failure
from runs.lock import lock
from runs.signals import Interrupted
from sources import cifar, threads
from sources import kept as kept_images
from sources.decode import decode, read_image

# Folders -------------------------------------------------------------------------------------------------------------


def load_folder(directory, image_size=16, **rest):
    return data.load("folder", data_dir=directory, image_size=image_size, **rest)


def test_a_folder_becomes_uint8_tensors_with_statistics(images):
    got = load_folder(images)
    assert got.classes == CLASSES
    assert got.train_images.shape == (48, 16, 16, 3) and got.train_images.dtype == torch.uint8
    assert got.test_labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    first = np.asarray(Image.open(images / "train" / "blue" / "00.png"))
    assert (got.train_images[0].numpy() == first).all()
    scaled = got.train_images.numpy() / 255
    np.testing.assert_allclose(got.mean, scaled.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(got.std, scaled.std((0, 1, 2)), rtol=1e-4)


def half(left, right, mode="RGB", size=(40, 40)):
    image = Image.new(mode, size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


GREY16 = Image.fromarray(np.repeat(np.array([[50, 200]], np.uint16) * 257, 40, 0).repeat(20, 1))
PALETTE = half((10, 200, 30), (200, 10, 30)).convert("P", palette=Image.Palette.ADAPTIVE)


@pytest.mark.parametrize(
    ("name", "image", "left", "right"),
    [
        ("grey.png", half(50, 200, "L"), (50,) * 3, (200,) * 3),
        ("grey16.png", GREY16, (50,) * 3, (200,) * 3),
        ("two.bmp", half(0, 1, "1"), (0,) * 3, (255,) * 3),
        ("palette.gif", PALETTE, (10, 200, 30), (200, 10, 30)),
        ("see-through.png", half((255, 0, 0, 0), (0, 0, 255, 255), "RGBA"), (255,) * 3, (0, 0, 255)),
        ("grey-alpha.png", half((0, 0), (90, 255), "LA"), (255,) * 3, (90,) * 3),
        ("print.tif", half((255, 0, 0, 0), (0, 0, 255, 0), "CMYK"), (0, 255, 255), (255, 255, 0)),
        ("UPPER.PNG", half((1, 2, 3), (4, 5, 6)), (1, 2, 3), (4, 5, 6)),
        ("lossless.webp", None, (10, 20, 30), (200, 100, 0)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_every_mode_becomes_rgb(tmp_path, name, image, left, right):
    path = tmp_path / name
    (image or half((10, 20, 30), (200, 100, 0))).save(path, **({"lossless": True} if name.endswith("webp") else {}))
    got = read_image(path, 20)
    assert got.shape == (20, 20, 3) and got.dtype == np.uint8
    np.testing.assert_allclose(got[10, 3], left, atol=2)
    np.testing.assert_allclose(got[10, 16], right, atol=2)


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn: the left side becomes the top
    half((250, 0, 0), (0, 0, 250)).save(tmp_path / "turned.jpg", exif=exif, quality=95, subsampling=0)
    got = read_image(tmp_path / "turned.jpg", 20).astype(int)
    assert got[2, 10, 0] > 200 > 50 > got[2, 10, 2] and got[17, 10, 2] > 200


def test_images_are_resized_and_centre_cropped(tmp_path):
    wide = Image.new("RGB", (90, 30), "red")
    wide.paste("blue", (30, 0, 60, 30))
    wide.save(tmp_path / "wide.png")
    assert (read_image(tmp_path / "wide.png", 30) == (0, 0, 255)).all()
    Image.new("RGB", (1, 1), (7, 8, 9)).save(tmp_path / "dot.png")
    assert (read_image(tmp_path / "dot.png", 16) == (7, 8, 9)).all()


def test_an_image_of_a_hundred_million_pixels_is_read(tmp_path):
    Image.new("L", (10_000, 10_000), 77).save(tmp_path / "large.png", compress_level=1)
    assert (read_image(tmp_path / "large.png", 32) == 77).all()


def test_odd_names_nested_folders_hidden_files_and_other_suffixes(tmp_path):
    top = make_images(tmp_path / "my images", train=2, test=1)
    for split in ("train", "test"):
        (top / split / "red").rename(top / split / "rød grød")
    (top / "train" / "green" / "deeper").mkdir()
    Image.new("RGB", (8, 8)).save(top / "train" / "green" / "deeper" / "ein Bild ü.png")
    (top / "train" / "green" / "notes.txt").write_text("not an image")
    (top / "train" / "green" / ".hidden.png").write_text("not an image")
    (top / "train" / ".DS_Store").write_text("")
    (top / "train" / ".cache").mkdir()
    got = load_folder(top, workers=0)
    assert got.classes == ("blue", "green", "rød grød")
    assert got.train_labels.tolist() == [0, 0, 1, 1, 1, 2, 2]


@pytest.mark.slow
@pytest.mark.draws
def test_a_class_name_that_is_not_utf8_is_escaped(cli, flags, tmp_path):
    """The report, its JSON and its figures accept it."""
    top = make_images(tmp_path / "p")
    for split in ("train", "test"):
        try:
            (top / split / "red").rename(top / split / os.fsdecode(b"caf\xe9"))
        except (OSError, ValueError):
            pytest.skip("this file system takes only UTF-8 names")
    words = (*flags, "--data-dir", top, "--epochs", 1, "--output-dir", tmp_path / "o")
    assert cli(*words, "--train-teacher").status == 0
    got = cli(*words)
    assert got.status == 0 and "caf\\xe9" in got.out, got


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_do_not_change_what_is_decoded(images, workers):
    assert load_folder(images, workers=workers).digest == load_folder(images, workers=2).digest


def test_more_images_than_are_decoded_at_a_time(images, tmp_path, monkeypatch):
    whole = load_folder(images)
    monkeypatch.setattr(threads, "CHUNK", 5)
    assert load_folder(images).digest == whole.digest
    assert load_folder(images, cache=tmp_path).digest == whole.digest


# Decoded images that are kept ----------------------------------------------------------------------------------------


class Kept:
    """An image folder of its own, and what is kept of its decoded images."""

    def __init__(self, top):
        self.images, self.cache = make_images(top / "images", train=3, test=2), top / "cache"

    def load(self, image_size=16, **rest):
        return load_folder(self.images, image_size, cache=self.cache, **rest)

    def files(self):
        return {path.name: path.read_bytes() for path in self.cache.iterdir()} if self.cache.exists() else {}

    @property
    def array(self):
        (path,) = self.cache.glob("images-*.npy")
        return path


@pytest.fixture
def kept(tmp_path):
    return Kept(tmp_path)


@pytest.fixture
def decoded(monkeypatch):
    """The paths of the images that are decoded, in any order."""
    paths = []
    monkeypatch.setattr(kept_images, "decode", lambda path, *rest: paths.append(path) or decode(path, *rest))
    return paths


def test_decoded_images_are_kept_until_an_image_changes(kept, decoded):
    first = kept.load()
    assert len(decoded) == 15 and {path.name for path in kept.images.iterdir()} == {"train", "test"}
    assert first.digest == load_folder(kept.images).digest
    decoded.clear()
    again = kept.load()
    assert not decoded
    assert again.digest == first.digest and torch.equal(again.train_images, first.train_images)
    assert again.mean == first.mean and again.std == first.std
    assert kept.load(20).image_size == 20 and kept.load().digest == first.digest  # both sizes are kept

    changed = kept.images / "train" / "red" / "00.png"
    content, status = changed.read_bytes(), changed.stat()
    Image.new("RGB", (16, 16), "white").save(changed)
    assert kept.load().digest != first.digest
    changed.write_bytes(content)
    os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    decoded.clear()
    assert kept.load().digest == first.digest and decoded == [str(changed)]  # another time, though the same size


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="this system does not tell what is mapped")
def test_kept_images_are_mapped_read_only(kept):
    """So that they may be larger than the memory: Linux counts a mapping that may be written to in full."""
    for _ in ("decoded now", "decoded before"):
        got = kept.load()
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(kept.array) in line]
        assert lines and all(access.startswith("r--") for _, access, *_ in lines)
        del got


def test_a_machine_with_a_copy_of_the_images_keeps_them_apart(kept):
    kept.load()
    before = kept.files()
    kept.load(agree=lambda find: "what another machine finds")
    added = kept.files().keys() - before.keys()
    assert len(added) == 2 and all(socket.gethostname() in str(name) for name in added)
    assert before.items() <= kept.files().items()


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "flipped bit": flip_a_bit,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "cut in the header": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "empty": lambda path: path.write_bytes(b""),
    "archive": lambda path: path.write_bytes(b"PK\3\4" + path.read_bytes()[4:]),
    "broken header": lambda path: path.write_bytes(path.read_bytes()[:10] + b"('''" + path.read_bytes()[14:]),
    "other array": lambda path: np.save(path, np.zeros((15, 16, 16, 3), np.uint8)),
    "other shape": lambda path: np.save(path, np.zeros((2, 16, 16, 3), np.uint8)),
    "other type": lambda path: np.save(path, np.load(path).view(np.int8)),
    "pickle": lambda path: np.save(path, np.array([{"an": "object"}], dtype=object), allow_pickle=True),
    "record is not JSON": lambda path: path.with_suffix(".json").write_text("{]"),
    "record of another type": lambda path: path.with_suffix(".json").write_text('{"keys": 3}'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_kept_images_are_decoded_again(kept, decoded, capsys, damage):
    first, before = kept.load().digest, kept.files()
    damage(kept.array)
    assert kept.load().digest == first
    told = capsys.readouterr().err
    assert told.startswith(str(kept.array.with_suffix(""))) and "is damaged: " in told
    assert told.endswith(". The images are decoded again.\n") and len(told.splitlines()) == 1
    assert kept.files() == before  # repaired
    decoded.clear()
    assert kept.load().digest == first and not decoded and not capsys.readouterr().err


def test_kept_images_without_their_record_are_decoded_again(kept, capsys):
    first, before = kept.load().digest, kept.files()
    kept.array.with_suffix(".json").unlink()
    assert kept.load().digest == first and kept.files() == before
    assert not capsys.readouterr().err  # nothing is damaged: the program ended between the two files


@pytest.mark.parametrize(
    "error", [Interrupted(2), KeyboardInterrupt(), Failure("no more files"), MemoryError()], ids=repr
)
@pytest.mark.parametrize("position", [0, 9])
def test_an_interrupted_decoding_keeps_what_it_has(kept, decoded, monkeypatch, error, position):
    paths = sorted(str(path) for split in ("train", "test") for path in kept.images.glob(f"{split}/*/*"))

    def interrupted(path, image_size, ranges):
        if path in (paths[position], str(changed)):
            raise error
        return decode(path, image_size, ranges)

    changed = kept.images / "test" / "red" / "00.png"
    monkeypatch.setattr(threads, "CHUNK", 4)  # so that some images were written before
    with monkeypatch.context() as patch:
        patch.setattr(kept_images, "decode", interrupted)
        with pytest.raises(type(error)):
            kept.load()
    done = 3 if position else 9  # in the order of training, then test images
    assert len(np.load(kept.array)) == done
    decoded.clear()
    first, before = kept.load().digest, kept.files()
    assert len(set(decoded)) == 15 - done and first == load_folder(kept.images).digest

    Image.new("RGB", (16, 16), "white").save(changed)  # what was kept before an interruption stays
    with monkeypatch.context() as patch:
        patch.setattr(kept_images, "decode", interrupted)
        with pytest.raises(type(error)):
            kept.load()
    assert kept.files() == before and kept.load().digest != first


# Arrays --------------------------------------------------------------------------------------------------------------


def test_the_digest_stays_the_same_from_version_to_version():
    """It is what runs and soft targets know their data by."""
    images = np.arange(4 * 16 * 16 * 3, dtype=np.uint32).astype(np.uint8).reshape(4, 16, 16, 3)
    arrays = [("a", "b"), images, np.array([0, 1, 0, 1]), images[:2] // 2, np.array([1, 0])]
    known = "d6ebb84dec068c2da48b52770ed980babf8b3c5d33832372e7599fc065e38475"
    assert data.from_arrays(*arrays).digest == known
    others = [("a", "c"), images ^ 1, np.array([0, 1, 1, 1]), images[:2], np.array([1, 1])]
    for position, other in enumerate(others):
        changed = [*arrays[:position], other, *arrays[position + 1 :]]
        assert data.from_arrays(*changed).digest != known


def test_statistics_are_the_same_bits_however_many_images_are_summed_at_a_time(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), np.uint8)
    arrays = ("a", "b"), images, np.arange(7) % 2, images[:2], np.array([1, 0])
    whole = data.from_arrays(*arrays)
    for part in (1, 2 * images[0].nbytes):
        monkeypatch.setattr(data, "PART", part)
        got = data.from_arrays(*arrays)
        assert (got.mean, got.std, got.digest) == (whole.mean, whole.std, whole.digest)


def test_images_of_one_colour_can_be_normalized():
    grey, labels = np.full((2, 16, 16, 3), 51, np.uint8), np.array([0, 1])
    got = data.from_arrays(("a", "b"), grey, labels, grey, labels)
    assert got.mean == pytest.approx((0.2,) * 3) and got.std == (1 / 255,) * 3


# CIFAR ---------------------------------------------------------------------------------------------------------------


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


# Of the small archives: training and test images, and classes.
COUNTS = {"cifar10": (100, 20, 10), "cifar100": (200, 100, 100)}


@pytest.fixture(scope="session")
def archive(tmp_path_factory, request):
    """A small archive of the official layout, the torchvision class that knows its checksums, and the data set's name.
    Image number n of every file has the label n modulo the number of classes."""
    dataset = getattr(request, "param", "cifar10")
    official, (train, test, classes) = cifar.DATASETS[dataset], COUNTS[dataset]
    top = tmp_path_factory.mktemp("archive")
    folder = top / official.base_folder
    folder.mkdir()
    random = np.random.default_rng(2)
    for names, total in ((official.train_list, train), (official.test_list, test)):
        for name, _ in names:
            count = total // len(names)
            content = {"data": random.integers(0, 256, (count, 3072), dtype=np.uint8)}
            numbers = [number % classes for number in range(count)]
            if dataset == "cifar10":
                content["labels"] = numbers
            else:
                content |= {"coarse_labels": [number // 5 for number in numbers], "fine_labels": numbers}
            (folder / name).write_bytes(pickle.dumps(content))
    names = {official.meta["key"]: [f"class {k}" for k in range(classes)], "coarse_label_names": ["twenty of them"]}
    (folder / official.meta["filename"]).write_bytes(pickle.dumps(names))
    packed = top / official.filename
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(folder, folder.name)

    class Small(official):
        url = f"http://127.0.0.1:9/{official.filename}"  # nothing answers there
        tgz_md5 = md5(packed)
        train_list = [[name, md5(folder / name)] for name, _ in official.train_list]
        test_list = [[name, md5(folder / name)] for name, _ in official.test_list]
        meta = official.meta | {"md5": md5(folder / official.meta["filename"])}

    return packed, Small, dataset


@pytest.fixture
def load_small(archive):
    """cifar.load for the small archive, as Data."""

    def load(directory, url=None, dataset=archive[1]):
        return data.from_arrays(*cifar.load(directory, url, dataset=dataset))

    return load


@pytest.fixture
def server(archive, monkeypatch):
    """The archive on the loopback address; `asked` lists the Range headers; `cut` breaks the connection early, and
    without `ranges` everything is sent however little was asked for."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")

    class Handler(http.server.BaseHTTPRequestHandler):
        asked, cut, ranges = [], None, True

        def do_GET(self):
            content = archive[0].read_bytes()
            wanted = self.headers.get("Range")
            self.asked.append(wanted)
            wanted = wanted if self.ranges else None
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start : type(self).cut])

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/{archive[0].name}", Handler
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("archive", COUNTS, indirect=True)
def test_it_is_downloaded_once_and_read_by_torchvision(load_small, archive, server, tmp_path):
    url, handler = server
    got = load_small(tmp_path / "data", url)
    train, test, classes = COUNTS[archive[2]]
    assert got.train_images.shape == (train, 32, 32, 3) and got.test_images.shape == (test, 32, 32, 3)
    assert got.classes == tuple(f"class {k}" for k in range(classes))
    assert got.train_labels[:20].tolist() == [number % classes for number in range(20)]
    first = tmp_path / "data" / archive[1].base_folder / archive[1].train_list[0][0]
    raw = pickle.loads(first.read_bytes())["data"][0]
    assert (got.train_images[0].numpy() == raw.reshape(3, 32, 32).transpose(1, 2, 0)).all()
    assert load_small(tmp_path / "data", url).digest == got.digest
    assert len(handler.asked) == 1


def test_a_partial_download_is_continued_and_never_taken_for_a_whole_one(load_small, archive, server, tmp_path):
    url, handler = server
    handler.cut = 1000
    with pytest.raises(Failure, match="the connection ended after 1,000 of"):
        load_small(tmp_path, url)
    assert not (tmp_path / archive[0].name).exists()
    handler.cut = None
    assert len(load_small(tmp_path, url).train_labels) == COUNTS[archive[2]][0]
    assert handler.asked == [None, "bytes=1000-"]


def test_a_mirror_that_cannot_continue_sends_everything(load_small, archive, server, tmp_path):
    url, handler = server
    (tmp_path / f"{archive[0].name}.part").write_bytes(archive[0].read_bytes()[:1000])
    handler.ranges = False
    assert len(load_small(tmp_path, url).train_labels) == COUNTS[archive[2]][0]


def test_a_partial_file_that_holds_everything_is_used(load_small, archive, server, tmp_path):
    (tmp_path / f"{archive[0].name}.part").write_bytes(archive[0].read_bytes())
    assert len(load_small(tmp_path, server[0]).train_labels) == COUNTS[archive[2]][0]


@pytest.mark.parametrize("archive", COUNTS, indirect=True)
def test_it_is_trained_on_from_the_command_line(cli, archive, server, tmp_path, monkeypatch):
    """CIFAR-10 is the default data set."""
    _, small, name = archive
    monkeypatch.setitem(cifar.DATASETS, name, small)
    words = ("--train-teacher", "--epochs", 1, "--batch-size", 50, "--device", "cpu", "--image-size", 16)
    words += ("--dataset", name) if name != "cifar10" else ()
    got = cli(*words, "--data-url", server[0], "--data-dir", tmp_path / "data", "--output-dir", tmp_path / "out")
    train, test, classes = COUNTS[name]
    told = f"{name}: {train} training and {test} test images of 16x16, {classes} classes"
    assert got.status == 0 and told in got.out, got
    assert models.load(tmp_path / "out" / "teacher-s0" / "model.pt").classes[classes - 1] == f"class {classes - 1}"


def test_the_official_checksums_are_known():
    """Those on the data sets' page, of the archives and of the first file in each."""
    known = {
        "cifar10": ("c58f30108f718f92721af3b95e74349a", "c99cafc152244af753f735de768cd75f"),
        "cifar100": ("eb9058c3a382ffc7106e4002c42a8d85", "16019d7e3df5f24257cddd939b257f8d"),
    }
    assert {name: (each.tgz_md5, each.train_list[0][1]) for name, each in cifar.DATASETS.items()} == known
    cifar100 = cifar.DATASETS["cifar100"]
    assert cifar100.test_list == [["test", "f0ef6b0ae62326f3e7ffdfab6717acfc"]]
    assert (cifar100.meta["key"], cifar100.meta["md5"]) == ("fine_label_names", "7973b15100ade9c7d40fb424638fde48")


def test_images_too_large_for_the_memory_are_refused(load_small, archive, tmp_path, monkeypatch):
    (tmp_path / archive[0].name).write_bytes(archive[0].read_bytes())
    monkeypatch.setattr(cifar, "free_memory", lambda device: 2e6)
    with pytest.raises(Failure, match=r"256x256 the images take 0\.. GB of memory, but only 0\.0 GB are free"):
        cifar.load(tmp_path, image_size=256, dataset=archive[1])
    monkeypatch.setattr(cifar, "free_memory", lambda device: 20e6)
    with pytest.raises(Failure, match=r"memory for 100 processes, but only 0\.0 GB are free"):
        cifar.load(tmp_path, image_size=256, dataset=archive[1], processes=100)
    load_small(tmp_path)


def test_images_are_resized_as_pillow_does():
    """By its bicubic filter, at upright edges, where that overshoots."""
    images = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (3, 1, 4, 3)).repeat(32, 1).repeat(8, 2)
    for size in (16, 24, 48):
        wanted = [np.asarray(Image.fromarray(each).resize((size, size), Image.Resampling.BICUBIC)) for each in images]
        assert np.array_equal(cifar.resize(images, size), wanted)


def test_what_a_mirror_sends_must_have_the_official_md5(load_small, archive, server, tmp_path):
    class Other(archive[1]):
        tgz_md5 = "0" * 32

    with pytest.raises(Failure, match="what it sent does not have the MD5 0000"):
        load_small(tmp_path, server[0], Other)
    assert [path.name for path in tmp_path.iterdir()] == [".unpacking"]


def test_the_output_folder_may_be_the_data_folder(load_small, archive, server, tmp_path):
    with lock(tmp_path):
        assert len(load_small(tmp_path, server[0]).train_labels) == COUNTS[archive[2]][0]


def test_an_image_folder_is_not_filled_with_cifar(cli, images, tmp_path):
    before = sorted(images.rglob("*"))
    got = cli("--data-dir", images, "--train-teacher", "--output-dir", tmp_path)
    assert got.status == 1 and "holds a folder train, but nothing of CIFAR10" in got.err
    assert "add --dataset folder." in got.err and sorted(images.rglob("*")) == before


def test_two_processes_do_not_unpack_at_once(load_small, archive, tmp_path):
    (tmp_path / archive[0].name).write_bytes(archive[0].read_bytes())
    with lock(tmp_path, ".unpacking"), pytest.raises(Failure, match="in use by process"):
        load_small(tmp_path)
    assert not (tmp_path / archive[1].base_folder).exists()


def test_an_archive_is_unpacked_by_a_python_without_filters(load_small, archive, tmp_path, monkeypatch):
    """Python 3.11.0 to 3.11.3: no data_filter, and extractall takes no filter."""
    (tmp_path / archive[0].name).write_bytes(archive[0].read_bytes())
    extract = tarfile.TarFile.extractall
    monkeypatch.delattr(tarfile, "data_filter")
    monkeypatch.setattr(tarfile.TarFile, "extractall", lambda content, path: extract(content, path))
    assert len(load_small(tmp_path).test_labels) == COUNTS[archive[2]][1]


def test_an_archive_placed_by_hand_needs_no_network(load_small, archive, tmp_path):
    (tmp_path / archive[0].name).write_bytes(archive[0].read_bytes())
    assert len(load_small(tmp_path).test_labels) == COUNTS[archive[2]][1]


def test_a_failed_download_says_what_to_do(load_small, archive, tmp_path):
    with pytest.raises(Failure, match=f"cannot download http://127.0.0.1:9/{archive[0].name}: ") as failure:
        load_small(tmp_path)
    for word in ("--data-url", archive[0].name, str(tmp_path), "--demo"):
        assert word in str(failure.value)


def test_damaged_archives_and_batches_are_named(load_small, archive, tmp_path):
    packed = tmp_path / archive[0].name
    packed.write_bytes(archive[0].read_bytes()[:-10])
    with pytest.raises(Damaged, match=f"{packed.name} is damaged: its MD5 is not"):
        load_small(tmp_path)
    packed.write_bytes(archive[0].read_bytes())
    load_small(tmp_path)
    batch = tmp_path / archive[1].base_folder / archive[1].train_list[-1][0]
    batch.write_bytes(batch.read_bytes()[:-1])
    assert len(load_small(tmp_path).train_labels) == COUNTS[archive[2]][0]  # unpacked again from the whole archive
    batch.write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    packed.unlink()
    with pytest.raises(Damaged, match=f"{batch.name} is damaged: its MD5 is not the official one"):
        load_small(tmp_path)


@needs_cifar10
@pytest.mark.slow
def test_the_official_cifar10(cli, tmp_path, monkeypatch):
    """Read by the command line, as a person asks for it; the training itself is left out."""
    read = []
    monkeypatch.setattr(train, "train", lambda run, data, *_, **__: read.append(data) or 0.0)
    words = ("--train-teacher", "--device", "cpu", "--dataset", "cifar10", "--data-dir", CIFAR10_DIR)
    got = cli(*words, "--output-dir", tmp_path)
    assert got.status == 0 and "cifar10: 50,000 training and 10,000 test images of 32x32, 10 classes" in got.out, got
    (read,) = read
    assert read.train_images.shape == (50_000, 32, 32, 3) and read.test_images.shape == (10_000, 32, 32, 3)
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    assert read.classes == names
    assert read.train_labels.bincount().tolist() == [5000] * 10
    assert read.test_labels.bincount().tolist() == [1000] * 10
    np.testing.assert_allclose(read.mean, (0.4914, 0.4822, 0.4465), atol=5e-5)  # known from the literature
    np.testing.assert_allclose(read.std, (0.2470, 0.2435, 0.2616), atol=5e-5)
    assert read.digest == "f10d766779344326398e187ae9af245d4835c5be028debaccc021a5a03abb4a1"  # in every version


# Shapes --------------------------------------------------------------------------------------------------------------


def test_shapes_are_drawn_the_same_every_time():
    one = data.load("shapes", image_size=16)
    assert one.digest == "9e5cb55673aa9255262a7e3f2f4d31ed164d81cfa3986302441c5060ff58479c"  # in every version
    assert np.bincount(one.train_labels).tolist() == [300] * 8
    assert not {p.numpy().tobytes() for p in one.train_images} & {p.numpy().tobytes() for p in one.test_images}


# Views ---------------------------------------------------------------------------------------------------------------

PLAIN = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)  # mean and std for which normalized values are the pixels


@pytest.fixture(scope="module")
def counted():
    """40 images whose every pixel says where it was: (row, column, image)."""
    rows, columns = np.mgrid[:16, :16]
    every = [np.stack([rows, columns, np.full((16, 16), k)], -1) for k in range(40)]
    return torch.from_numpy(np.stack(every).astype(np.uint8))


def noise(count, size):
    return torch.from_numpy(np.random.default_rng(size).integers(0, 256, (count, size, size, 3), dtype=np.uint8))


def pixels(views, epoch, indices):
    """The views of plain `views` as uint8 (B, S, S, 3)."""
    return views.batch(epoch, indices).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def test_views_are_crops_and_flips_of_the_reflected_image(counted):
    got = pixels(data.Views(counted, *PLAIN), 0, torch.arange(40))
    offsets = set()
    for k in range(40):
        padded = np.pad(counted[k].numpy(), ((2, 2), (2, 2), (0, 0)), mode="reflect")
        matches = [
            (r, c, flip)
            for r in range(5)
            for c in range(5)
            for flip in (1, -1)
            if (padded[r : r + 16, c : c + 16][:, ::flip] == got[k]).all()
        ]
        assert len(matches) == 1
        offsets.update(matches)
    assert len(offsets) > 20 and {flip for *_, flip in offsets} == {1, -1}


@pytest.mark.parametrize("padding", [16, -1])
def test_views_cannot_move_by_a_whole_image(counted, padding):
    with pytest.raises(ValueError, match="views of 16 pixels cannot be moved by"):
        data.Views(counted, *PLAIN, padding=padding)


@pytest.mark.parametrize("cutout", [17, -1])
def test_no_square_larger_than_a_view_is_blanked(counted, cutout):
    with pytest.raises(ValueError, match=f"of views of 16 pixels no square of {cutout} can be blanked"):
        data.Views(counted, *PLAIN, cutout=cutout)


@pytest.mark.parametrize(
    ("size", "padding"), [(16, None), (17, None), (21, 5), (33, None), (63, None), (64, None), (16, 0), (19, 18)]
)
def test_views_are_what_numpy_makes_of_the_same_draws(size, padding):
    images, mean, std = noise(11, size), (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
    views = data.Views(images, mean, std, padding=padding)
    width = size // 8 if padding is None else padding
    indices = torch.tensor([10, 0, 3, 3, 7, 1])
    flipped = set()
    for epoch in range(4):
        got = views.batch(epoch, indices).numpy()
        rows, columns, flips = views.draws(epoch)
        assert rows.min() >= 0 and columns.min() >= 0 and max(rows.max(), columns.max()) <= 2 * width
        for view, index in zip(got, indices.tolist(), strict=True):
            image = images[index].numpy()[:, :: -1 if flips[index] else 1]
            padded = np.pad(image, ((width, width), (width, width), (0, 0)), mode="reflect")
            row, column = rows[index], columns[index]
            crop = padded[row : row + size, column : column + size].astype(np.float64)
            np.testing.assert_allclose(view, ((crop / 255 - mean) / std).transpose(2, 0, 1), atol=1e-5)
            flipped.add(bool(flips[index]))
    assert flipped == {True, False}


@pytest.mark.parametrize("size", [16, 21])
def test_a_square_of_every_view_is_blanked(size):
    """What is left is the view as it is without; the squares lie anywhere in the view, and elsewhere in each epoch."""
    about = noise(40, size), (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
    plain, blanked, everything = data.Views(*about), data.Views(*about, cutout=6), torch.arange(40)
    corners = []
    for epoch in range(4):
        own, views = plain.batch(epoch, everything).numpy(), blanked.batch(epoch, everything).numpy()
        for view, expected in zip(views, own, strict=True):
            empty = (view == 0).all(0)
            row, column = empty.any(1).argmax(), empty.any(0).argmax()
            expected[:, row : row + 6, column : column + 6] = 0
            assert np.array_equal(view, expected) and empty.sum() == 36
            corners.append((row, column))
    assert {row for row, _ in corners} == {column for _, column in corners} == set(range(size - 5))
    assert corners[:40] != corners[40:80]
    assert not torch.equal(data.Views(*about, "teacher views", cutout=6).corners(0), blanked.corners(0))
    assert len(plain.recipe) == 6  # as before there was a cutout, so that soft targets of then are found
    whole = data.Views(*about, cutout=size).batch(0, everything)
    assert not whole.any() and data.Views(*about, cutout=0).recipe == plain.recipe != blanked.recipe


@pytest.mark.parametrize(
    ("cutout", "digest"),
    [
        (0, "4e5e04b24eb7d1c9795a24b252be013700ea04f119faa76875eaa774561d8c7b"),
        (6, "133a2df553f1f13cb404c5565e92af5c56a4aed8e9d4bde044c4ffe10a93f5fb"),
    ],
)
def test_views_stay_the_same_from_version_to_version(counted, cutout, digest):
    """Where this fails on purpose, raise VIEWS_VERSION: runs and soft targets of other views must not be reused."""
    total = hashlib.sha256()
    for epoch in range(3):
        total.update(pixels(data.Views(counted, *PLAIN, cutout=cutout), epoch, torch.arange(40)))
    assert total.hexdigest() == digest


@pytest.mark.parametrize("cutout", [0, 6])
def test_views_are_a_function_of_epoch_and_image_alone(counted, cutout):
    one, other = (data.Views(counted, *PLAIN, cutout=cutout) for _ in range(2))
    every, some = one.batch(3, torch.arange(40)), torch.tensor([5, 2, 31])
    torch.manual_seed(1)
    other.batch(7, some)
    assert torch.equal(every[some], other.batch(3, some))
    assert not torch.equal(every[some], other.batch(4, some))
    assert torch.equal(every[some], other.batch(3, some))  # after another epoch, too
    teacher = data.Views(counted, *PLAIN, "teacher views", cutout=cutout)
    assert not torch.equal(every[some], teacher.batch(3, some))


def test_no_image_is_mirrored_without_mirror():
    """With it, a view is that of the image or of its mirror image, which is asked here without."""
    images, *about = noise(40, 16), (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
    usual = data.Views(images, *about, cutout=6)
    plain, turned = (data.Views(each, *about, cutout=6, mirror=False) for each in (images, images.flip(2)))
    for epoch in range(3):
        mirrored = usual.draws(epoch)[2]
        assert not plain.draws(epoch)[2].any() and 5 < mirrored.sum() < 35
        views, own, others = (each.batch(epoch, torch.arange(40)) for each in (usual, plain, turned))
        assert torch.equal(views, torch.where(mirrored[:, None, None, None], others, own))
        assert not torch.equal(own, others)
    assert plain.recipe != usual.recipe


def test_flips_alternate_between_epochs(counted):
    views = data.Views(counted, *PLAIN)
    first, second, third = (views.draws(epoch)[2] for epoch in range(3))
    assert torch.equal(second, ~first) and torch.equal(third, first) and 5 < first.sum() < 35


def test_no_draw_touches_the_running_global_random_state(counted):
    before = torch.random.get_rng_state()
    data.Views(counted, *PLAIN).batch(0, torch.arange(40))
    data.split(torch.arange(40) % 4, 0.1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_batches_are_channels_last_and_normalized(counted):
    batch = data.Views(counted, (0.2, 0.4, 0.6), (0.1, 0.2, 0.3)).batch(0, torch.arange(8))
    assert batch.shape == (8, 3, 16, 16) and batch.is_contiguous(memory_format=torch.channels_last)
    assert batch.dtype == torch.float32
    assert batch[3, 2, 0, 0].item() == pytest.approx((3 / 255 - 0.6) / 0.3, rel=1e-5)


def test_views_of_memory_mapped_images_are_the_same_bits(tmp_path):
    images = noise(50, 17)
    np.save(tmp_path / "images.npy", images.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "images.npy", mmap_mode="c")[10:])
    for epoch in range(3):
        batches = [
            data.Views(each, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)).batch(epoch, torch.arange(39, -1, -3))
            for each in (images[10:], mapped)
        ]
        assert torch.equal(*batches)


def test_views_hold_no_copy_of_the_images():
    images = torch.zeros(2000, 16, 16, 3, dtype=torch.uint8)
    views = data.Views(images, *PLAIN)
    views.batch(0, torch.arange(8))
    held = [each for each in (*vars(views).values(), *views.draws(0)) if isinstance(each, torch.Tensor)]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in held}
    assert storages.pop(images.untyped_storage().data_ptr()) == images.nbytes
    assert sum(storages.values()) < images.nbytes / 20


# Validation part -----------------------------------------------------------------------------------------------------


def test_the_validation_part_is_stratified_fixed_and_disjoint():
    labels = torch.arange(1000) % 7
    training, validation = data.split(labels, 0.1)
    assert np.bincount(labels[validation]).tolist() == [14] * 7
    assert sorted(training.tolist() + validation.tolist()) == list(range(1000))
    assert torch.equal(validation, data.split(labels, 0.1)[1])
    assert data.split(torch.arange(40) % 4, 0.1)[1].tolist() == [17, 26, 31, 32]  # in every version
    assert len(data.split(labels, 0.0)[1]) == 0
    training, validation = data.split(torch.tensor([0, 1, 1]), 0.5)
    assert 0 in training.tolist() and len(validation) == 1


def test_the_validation_part_of_what_students_see_lies_in_that_of_the_whole_set():
    labels = torch.arange(1000) % 5
    whole = set(data.split(labels, 0.2)[1].tolist())
    some = (torch.arange(1000) % 3 > 0).nonzero()[:, 0]
    some = some[labels[some] != 2]
    training, validation = data.split(labels, 0.2, some)
    counts = np.bincount(labels[validation], minlength=5)
    assert set(validation.tolist()) <= whole & set(some.tolist())
    assert counts[2] == 0 and all(15 <= count <= 27 for count in counts[[0, 1, 3, 4]])  # of 133 or 134 images
    assert sorted(training.tolist() + validation.tolist()) == some.tolist()
    assert torch.equal(data.split(labels, 0.2, torch.arange(1000))[1], data.split(labels, 0.2)[1])
    assert data.split(labels, 0.0, some)[0].tolist() == some.tolist()
    # Of few images of a class one is trained on, wherever they lie.
    inside = sorted(row for row in whole if labels[row] == 1)[:5]
    outside = [row for row in range(1000) if labels[row] == 1 and row not in whole][:2]
    for rows, fraction, count in (
        (inside, 0.5, 2),
        (inside[:1], 0.5, 0),
        (outside, 0.2, 0),
        (inside[:1] + outside, 0.2, 1),
    ):
        validation = data.split(labels, fraction, torch.tensor(sorted(rows)))[1]
        assert len(validation) == count and set(validation.tolist()) <= set(inside)
