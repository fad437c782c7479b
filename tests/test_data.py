"""Pictures from folders, archives and the program's own pen; the views of an epoch."""

import hashlib
import http.server
import os
import pickle
import tarfile
import threading
import time

import numpy as np
import pytest
import torch
from conftest import CLASSES, make_pictures, needs_real_pictures, real_pictures
from PIL import Image

import data
import files
from files import Damaged, Failure

# Folders -------------------------------------------------------------------------------------------------------------


def test_folder_ends_as_uint8_tensors_with_statistics(pictures):
    got = data.folder(pictures, 16)
    assert got.classes == CLASSES
    assert got.train_pictures.shape == (48, 16, 16, 3) and got.train_pictures.dtype == torch.uint8
    assert got.test_labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    first = np.asarray(Image.open(pictures / "train" / "blue" / "00.png"))
    assert (got.train_pictures[0].numpy() == first).all()
    scaled = got.train_pictures.numpy() / 255
    np.testing.assert_allclose(got.mean, scaled.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(got.std, scaled.std((0, 1, 2)), rtol=1e-4)


def half(left, right, mode="RGB", size=(40, 40)):
    picture = Image.new(mode, size, left)
    picture.paste(right, (size[0] // 2, 0, *size))
    return picture


GREY16 = Image.fromarray(np.repeat(np.array([[50, 200]], np.uint16) * 257, 40, 0).repeat(20, 1))
PALETTE = half((10, 200, 30), (200, 10, 30)).convert("P", palette=Image.Palette.ADAPTIVE)


@pytest.mark.parametrize(
    ("name", "picture", "left", "right"),
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
def test_every_mode_becomes_rgb(tmp_path, name, picture, left, right):
    path = tmp_path / name
    (picture or half((10, 20, 30), (200, 100, 0))).save(path, **({"lossless": True} if name.endswith("webp") else {}))
    got = data.read_picture(path, 20)
    assert got.shape == (20, 20, 3) and got.dtype == np.uint8
    np.testing.assert_allclose(got[10, 3], left, atol=2)
    np.testing.assert_allclose(got[10, 16], right, atol=2)


def test_exif_orientation_is_obeyed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter: the left becomes the top
    half((250, 0, 0), (0, 0, 250)).save(tmp_path / "turned.jpg", exif=exif, quality=95, subsampling=0)
    got = data.read_picture(tmp_path / "turned.jpg", 20).astype(int)
    assert got[2, 10, 0] > 200 > 50 > got[2, 10, 2] and got[17, 10, 2] > 200


def test_pictures_are_resized_and_centre_cropped(tmp_path):
    wide = Image.new("RGB", (90, 30), "red")
    wide.paste("blue", (30, 0, 60, 30))
    wide.save(tmp_path / "wide.png")
    assert (data.read_picture(tmp_path / "wide.png", 30) == (0, 0, 255)).all()
    Image.new("RGB", (1, 1), (7, 8, 9)).save(tmp_path / "dot.png")
    assert (data.read_picture(tmp_path / "dot.png", 16) == (7, 8, 9)).all()


def test_a_picture_of_a_hundred_million_pixels_is_legal(tmp_path):
    Image.new("L", (10_000, 10_000), 77).save(tmp_path / "large.png", compress_level=1)
    assert (data.read_picture(tmp_path / "large.png", 32) == 77).all()


def test_odd_names_nested_folders_hidden_files_and_other_suffixes(tmp_path):
    top = make_pictures(tmp_path / "my pictures", train=2, test=1)
    for split in ("train", "test"):
        (top / split / "red").rename(top / split / "rød grød")
    (top / "train" / "green" / "deeper").mkdir()
    Image.new("RGB", (8, 8)).save(top / "train" / "green" / "deeper" / "ein Bild ü.png")
    (top / "train" / "green" / "notes.txt").write_text("not a picture")
    (top / "train" / "green" / ".hidden.png").write_text("not a picture")
    (top / "train" / ".DS_Store").write_text("")
    (top / "train" / ".cache").mkdir()
    got = data.folder(top, 16, workers=0)
    assert got.classes == ("blue", "green", "rød grød")
    assert got.train_labels.tolist() == [0, 0, 1, 1, 1, 2, 2]


def test_decoded_pictures_are_kept_until_a_picture_changes(tmp_path, monkeypatch):
    top = make_pictures(tmp_path / "p", train=3, test=2)
    first = data.folder(top, 16, cache=tmp_path / "kept")
    assert not set(os.listdir(top)) - {"train", "test"}
    with monkeypatch.context() as patch:
        patch.setattr(data, "read_picture", lambda *_: pytest.fail("decoded again"))
        again = data.folder(top, 16, cache=tmp_path / "kept")
    assert again.digest == first.digest and torch.equal(again.train_pictures, first.train_pictures)
    assert again.mean == first.mean and again.std == first.std
    changed = top / "train" / "red" / "00.png"
    time.sleep(0.01)
    Image.new("RGB", (16, 16), "white").save(changed)
    assert data.folder(top, 16, cache=tmp_path / "kept").digest != first.digest
    assert data.folder(top, 20, cache=tmp_path / "kept").image_size == 20


def test_damaged_kept_pictures_are_decoded_again(tmp_path, capsys):
    top = make_pictures(tmp_path / "p", train=2, test=2)
    first = data.folder(top, 16, cache=tmp_path / "kept")
    (kept,) = (tmp_path / "kept").iterdir()
    content = bytearray(kept.read_bytes())
    content[len(content) // 3] ^= 4
    kept.write_bytes(content)
    assert data.folder(top, 16, cache=tmp_path / "kept").digest == first.digest
    assert "damaged" in capsys.readouterr().err


def test_a_class_name_that_is_no_utf8_is_escaped(cli, flags, tmp_path):
    """The report, its JSON and its figures take it."""
    top = make_pictures(tmp_path / "p")
    for split in ("train", "test"):
        try:
            (top / split / "red").rename(top / split / os.fsdecode(b"caf\xe9"))
        except OSError:
            pytest.skip("this file system takes UTF-8 alone")
    words = (*flags, "--data-dir", top, "--epochs", 1, "--output-dir", tmp_path / "o")
    assert cli(*words, "--train-teacher").status == 0
    got = cli(*words)
    assert got.status == 0 and "caf\\xe9" in got.out, got


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_do_not_change_what_is_decoded(pictures, workers):
    assert data.folder(pictures, 16, workers).digest == data.folder(pictures, 16, 2).digest


# CIFAR-10 ------------------------------------------------------------------------------------------------------------


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture(scope="session")
def archive(tmp_path_factory):
    """A small archive of the official layout, and the CIFAR10 subclass that knows its checksums."""
    from torchvision.datasets import CIFAR10

    top = tmp_path_factory.mktemp("archive")
    folder = top / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(2)
    for name in [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]:
        content = {"data": random.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": list(range(10)) * 2}
        (folder / name).write_bytes(pickle.dumps(content))
    names = [f"class {k}" for k in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    packed = top / "cifar-10-python.tar.gz"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(folder, folder.name)

    class Small(CIFAR10):
        url = "http://127.0.0.1:9/cifar-10-python.tar.gz"  # nothing answers there
        tgz_md5 = md5(packed)
        train_list = [[name, md5(folder / name)] for name, _ in CIFAR10.train_list]
        test_list = [[name, md5(folder / name)] for name, _ in CIFAR10.test_list]
        meta = CIFAR10.meta | {"md5": md5(folder / "batches.meta")}

    return packed, Small


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
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz", Handler
    server.shutdown()
    server.server_close()


def test_cifar10_is_downloaded_once_and_read_by_torchvision(archive, server, tmp_path):
    url, handler = server
    got = data.cifar10(tmp_path / "data", url, dataset=archive[1])
    assert got.train_pictures.shape == (100, 32, 32, 3) and got.test_pictures.shape == (20, 32, 32, 3)
    assert got.classes[3] == "class 3" and got.train_labels[:10].tolist() == list(range(10))
    raw = pickle.loads((tmp_path / "data/cifar-10-batches-py/data_batch_1").read_bytes())["data"][0]
    assert (got.train_pictures[0].numpy() == raw.reshape(3, 32, 32).transpose(1, 2, 0)).all()
    assert data.cifar10(tmp_path / "data", url, dataset=archive[1]).digest == got.digest
    assert len(handler.asked) == 1


def test_a_partial_download_is_continued_and_never_passes_for_a_whole_one(archive, server, tmp_path):
    url, handler = server
    handler.cut = 1000
    with pytest.raises(Failure, match="ended after 1,000 of"):
        data.cifar10(tmp_path, url, dataset=archive[1])
    assert not (tmp_path / "cifar-10-python.tar.gz").exists()
    handler.cut = None
    assert len(data.cifar10(tmp_path, url, dataset=archive[1]).train_labels) == 100
    assert handler.asked == [None, "bytes=1000-"]


def test_a_mirror_that_cannot_continue_sends_everything(archive, server, tmp_path):
    url, handler = server
    (tmp_path / "cifar-10-python.tar.gz.part").write_bytes(archive[0].read_bytes()[:1000])
    handler.ranges = False
    assert len(data.cifar10(tmp_path, url, dataset=archive[1]).train_labels) == 100


def test_a_download_that_had_come_whole_is_taken(archive, server, tmp_path):
    (tmp_path / "cifar-10-python.tar.gz.part").write_bytes(archive[0].read_bytes())
    assert len(data.cifar10(tmp_path, server[0], dataset=archive[1]).train_labels) == 100


def test_the_default_data_set_from_the_command_line(cli, archive, server, tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10", archive[1])
    words = ("--train-teacher", "--epochs", 1, "--batch-size", 50, "--device", "cpu", "--image-size", 16)
    got = cli(*words, "--data-url", server[0], "--data-dir", tmp_path / "data", "--output-dir", tmp_path / "out")
    assert got.status == 0 and "cifar10: 100 training and 20 test pictures of 16x16, 10 classes" in got.out, got


def test_pictures_are_resized_as_pillow_does():
    """At upright edges, where bicubic interpolation overshoots (where edges cross, Pillow clips once more than we)."""
    pictures = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (3, 1, 4, 3)).repeat(32, 1).repeat(8, 2)
    for size in (16, 24, 48):
        wanted = [np.asarray(Image.fromarray(each).resize((size, size), Image.Resampling.BICUBIC)) for each in pictures]
        assert np.abs(data.resize(pictures, size).astype(int) - np.array(wanted, dtype=int)).max() <= 1


def test_what_a_mirror_sends_must_have_the_official_md5(archive, server, tmp_path):
    class Other(archive[1]):
        tgz_md5 = "0" * 32

    with pytest.raises(Failure, match="MD5"):
        data.cifar10(tmp_path, server[0], dataset=Other)
    assert [path.name for path in tmp_path.iterdir()] == [".unpacking"]


def test_the_output_folder_may_be_the_data_folder(archive, server, tmp_path):
    with files.lock(tmp_path):
        assert len(data.cifar10(tmp_path, server[0], dataset=archive[1]).train_labels) == 100


def test_two_processes_do_not_unpack_at_once(archive, tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(archive[0].read_bytes())
    with files.lock(tmp_path, ".unpacking"), pytest.raises(Failure, match="in use by process"):
        data.cifar10(tmp_path, dataset=archive[1])
    assert not (tmp_path / "cifar-10-batches-py").exists()


def test_an_archive_is_unpacked_by_a_python_without_filters(archive, tmp_path, monkeypatch):
    """Python 3.11.0 to 3.11.3: no data_filter, and extractall takes no filter."""
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(archive[0].read_bytes())
    extract = tarfile.TarFile.extractall
    monkeypatch.delattr(tarfile, "data_filter")
    monkeypatch.setattr(tarfile.TarFile, "extractall", lambda content, path: extract(content, path))
    assert len(data.cifar10(tmp_path, dataset=archive[1]).test_labels) == 20


def test_an_archive_placed_by_hand_needs_no_network(archive, tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(archive[0].read_bytes())
    assert len(data.cifar10(tmp_path, dataset=archive[1]).test_labels) == 20


def test_nothing_reachable_says_what_to_do(archive, tmp_path):
    with pytest.raises(Failure) as failure:
        data.cifar10(tmp_path, dataset=archive[1])
    for word in ("--data-url", "cifar-10-python.tar.gz", str(tmp_path), "--demo"):
        assert word in str(failure.value)


def test_damaged_archives_and_batches_are_named(archive, tmp_path):
    packed = tmp_path / "cifar-10-python.tar.gz"
    packed.write_bytes(archive[0].read_bytes()[:-10])
    with pytest.raises(Damaged, match="cifar-10-python.tar.gz"):
        data.cifar10(tmp_path, dataset=archive[1])
    packed.write_bytes(archive[0].read_bytes())
    data.cifar10(tmp_path, dataset=archive[1])
    batch = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    batch.write_bytes(batch.read_bytes()[:-1])
    assert len(data.cifar10(tmp_path, dataset=archive[1]).train_labels) == 100  # unpacked again from the whole archive
    batch.write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    packed.unlink()
    with pytest.raises(Damaged, match="data_batch_2"):
        data.cifar10(tmp_path, dataset=archive[1])


# Shapes --------------------------------------------------------------------------------------------------------------


def test_shapes_are_drawn_the_same_every_time_in_under_two_seconds():
    started = time.thread_time()
    data.shapes(32)
    assert time.thread_time() - started < 2
    one = data.shapes(16)
    assert one.digest == data.shapes(16).digest
    assert np.bincount(one.train_labels).tolist() == [300] * 8
    assert not {p.numpy().tobytes() for p in one.train_pictures} & {p.numpy().tobytes() for p in one.test_pictures}


# Views ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted():
    """40 pictures whose every pixel says where it was: (row, column, picture)."""
    rows, columns = np.mgrid[:16, :16]
    every = [np.stack([rows, columns, np.full((16, 16), k)], -1) for k in range(40)]
    return torch.from_numpy(np.stack(every).astype(np.uint8))


def views(pictures, purpose="views"):
    return data.Views(
        pictures, (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255), purpose
    )  # normalised values are the pixels


def test_views_are_crops_and_flips_of_the_reflected_picture(counted):
    made = views(counted)
    made.start(0)
    got = made.batch(torch.arange(40)).round().long().permute(0, 2, 3, 1).numpy()
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


def test_views_are_a_function_of_epoch_and_picture_alone(counted):
    one, other = views(counted), views(counted)
    one.start(3)
    torch.manual_seed(1)
    other.start(7), other.start(3)
    some = torch.tensor([5, 2, 31])
    assert torch.equal(one.batch(torch.arange(40))[some], other.batch(some))
    other.start(4)
    assert not torch.equal(one.batch(some), other.batch(some))
    teacher = views(counted, "teacher views")
    teacher.start(3)
    assert not torch.equal(one.batch(some), teacher.batch(some))


def test_flips_alternate_between_epochs(counted):
    made = views(counted)
    made.start(0)
    first = made.flips.clone()
    made.start(1)
    assert torch.equal(made.flips, 1 - first) and 5 < first.sum() < 35


def test_no_draw_touches_the_running_global_random_state(counted):
    before = torch.random.get_rng_state()
    made = views(counted)
    made.start(0)
    data.split(torch.arange(40) % 4, 0.1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_batches_are_channels_last_and_normalised(counted):
    made = data.Views(counted, (0.2, 0.4, 0.6), (0.1, 0.2, 0.3))
    made.start(0)
    batch = made.batch(torch.arange(8))
    assert batch.shape == (8, 3, 16, 16) and batch.is_contiguous(memory_format=torch.channels_last)
    assert batch[3, 2, 0, 0].item() == pytest.approx((3 / 255 - 0.6) / 0.3, rel=1e-5)


def test_the_validation_part_is_stratified_fixed_and_disjoint():
    labels = torch.arange(1000) % 7
    training, validation = data.split(labels, 0.1)
    assert np.bincount(labels[validation]).tolist() == [14] * 7
    assert sorted(training.tolist() + validation.tolist()) == list(range(1000))
    assert torch.equal(validation, data.split(labels, 0.1)[1])
    assert len(data.split(labels, 0.0)[1]) == 0
    training, validation = data.split(torch.tensor([0, 1, 1]), 0.5)
    assert 0 in training.tolist() and len(validation) == 1


@needs_real_pictures
def test_real_pictures():
    got = data.folder(real_pictures(), 32, 2)
    assert (len(got.train_labels), len(got.test_labels)) == (50_000, 10_000)
    assert got.classes == ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    np.testing.assert_allclose(got.mean, (0.4914, 0.4822, 0.4465), atol=0.003)  # CIFAR-10's well-known statistics
    np.testing.assert_allclose(got.std, (0.2470, 0.2435, 0.2616), atol=0.006)
