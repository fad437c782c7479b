"""Image folders as people have them: values, what is passed over, damage, copies, and where test images come from."""

import json
import os
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soak
from conftest import CLASSES, make_images
from PIL import EpsImagePlugin, Image, ImageOps

import data
import models
from arguments import Usage, parse
from runs.checkpoints import load_checkpoint, save_checkpoint
from runs.files import Damaged, Failure
from sources import Facts, decode, kept, survey


class Folder:
    """An image folder that a test may change, and what was said of it."""

    def __init__(self, top):
        self.top, self.cache, self.said = make_images(top / "p", train=5, test=3), top / "out" / "data", []

    def load(self, image_size=16, cache=True, **rest):
        self.said.clear()
        place = self.cache if cache else None
        return data.load("folder", data_dir=self.top, image_size=image_size, cache=place, say=self.said.append, **rest)

    def put(self, name, samples, **rest):
        path = self.top / name
        Image.fromarray(samples).save(path, **rest)
        return path

    def pixels(self, loaded, name):
        """The pixels that the image `name` became."""
        for names, images in zip(loaded.facts.names, (loaded.train_images, loaded.test_images), strict=True):
            if name in names:
                return images[names.index(name)].numpy()
        raise AssertionError(f"{name} is not there")


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def numbers(low, high, kind, seed=0):
    values = np.random.default_rng(seed).uniform(low, high, (16, 16))
    values.flat[:2] = low, high
    return values.astype(kind)


# Values --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "values", "words", "span"),
    [
        (
            "floating-point",
            numbers(0, 0.75, "f4"),
            "from 0 to 0.75. In all of them 0 becomes black and 1 white",
            (0, 1),
        ),
        ("floating-point", numbers(0, 250, "f4"), "0 becomes black and 255 white", (0, 255)),
        ("floating-point", numbers(-2, 3, "f4"), "-2 becomes black and 3 white", (-2, 3)),
        (
            "16-bit",
            numbers(0, 4000, "u2"),
            "from 0 to 4,000. In all of them 0 becomes black and 4,095 white",
            (0, 4095),
        ),
        ("16-bit", numbers(0, 900, "u2"), "0 becomes black and 1,023 white", (0, 1023)),
        ("16-bit", numbers(0, 65535, "u2"), "0 becomes black and 65,535 white", (0, 65535)),
        ("signed 32-bit", numbers(-7, 10**6, "i4"), "-7 becomes black and 1,000,000 white", (-7, 10**6)),
    ],
)
def test_one_range_holds_for_all_images_of_training_and_test_set(folder, kind, values, words, span):
    """The brightest image is a test image, the darkest a training image; and the smaller one keeps its darkness."""
    low, high = span
    dark = (values / 2).astype(values.dtype)
    folder.put("train/red/dark.tif", dark)
    folder.put("test/red/bright.tif", values)
    loaded = folder.load()
    assert any(f"Images with {kind} samples: 2, " in line and words in line for line in folder.said), folder.said
    assert loaded.facts.ranges == {kind: span}
    for name, written in (("train/red/dark.tif", dark), ("test/red/bright.tif", values)):
        expected = np.rint((written.astype(float) - low) * 255 / (high - low))
        assert (folder.pixels(loaded, name) == expected[..., None]).all()
    assert folder.load(cache=False).digest == loaded.digest == folder.load().digest


def test_a_brighter_image_that_is_added_scales_all_again(folder):
    folder.put("train/red/one.png", numbers(0, 4000, "u2"))
    before = folder.pixels(folder.load(), "train/red/one.png")
    folder.put("test/red/two.png", numbers(0, 60000, "u2"))
    loaded = folder.load()
    assert (folder.pixels(loaded, "train/red/one.png") == np.rint(numbers(0, 4000, "u2") / 257)[..., None]).all()
    assert before.max() > 240 and loaded.facts.ranges == {"16-bit": (0, 65535)}


def test_images_of_8_bits_have_the_digest_of_earlier_versions(images):
    loaded = data.load("folder", data_dir=images, image_size=16)
    arrays = [loaded.train_images, loaded.train_labels, loaded.test_images, loaded.test_labels]
    assert loaded.digest == data.from_arrays(CLASSES, *(array.numpy() for array in arrays)).digest
    assert loaded.digest.startswith("39c508c960b828f3")


def test_a_single_image_is_scaled_as_told_or_refused(tmp_path):
    float_path, wide = tmp_path / "f.tif", tmp_path / "w.tif"
    Image.fromarray(numbers(0, 0.5, "f4")).save(float_path)
    Image.fromarray(numbers(-5, 70000, "i4")).save(wide)
    assert decode.read_image(float_path, 16).max() == 128
    assert decode.read_image(float_path, 16, {"floating-point": (0, 0.5)}).max() == 255
    with pytest.raises(
        Damaged, match=r"w\.tif cannot be decoded as an image: its samples are signed 32-bit, and no range"
    ):
        decode.read_image(wide, 16)
    samples = numbers(-5, 70000, "i4").astype(float)
    clipped = np.rint((samples.clip(0, 50_000)) * 255 / 50_000)  # beyond what some data set holds
    found = decode.read_image(wide, 16, {"signed 32-bit": (0, 50_000)})
    assert (found == clipped[..., None]).all() and found.max() == 255
    with pytest.raises(Damaged, match="lie from -5 to 70,000, outside of the range from 0 to 4,095"):
        decode.read_image(wide, 16, {"signed 32-bit": (0, 4095)})  # samples of 12 bits: these are of another kind
    Image.fromarray(np.full((4, 4), np.nan, "f4")).save(float_path)
    with pytest.raises(Damaged, match="it holds samples that are not finite"):
        decode.read_image(float_path, 16)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiffs_are_turned_whatever_their_mode(tmp_path, orientation):
    """Of a path Pillow maps those of these modes into memory, width and height being exchanged already."""
    random = np.random.default_rng(0)
    turned = {5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, -1), 8: np.rot90,
              7: lambda x: np.rot90(x, 2).swapaxes(0, 1)}.get(orientation)  # fmt: skip
    turned = turned or {1: np.array, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud}[orientation]
    for mode, bands in (("L", 1), ("P", 1), ("RGBA", 4), ("CMYK", 4), ("I;16", 1)):
        values = random.integers(0, 256, (16, 24, bands)).astype(np.uint8)
        image, expected = Image.frombytes(mode, (24, 16), values.tobytes()) if mode != "I;16" else None, values
        if mode == "I;16":
            image = Image.fromarray(values[..., 0].astype(np.uint16) * 257)
        if mode == "P":
            image.putpalette([value for value in range(256) for _ in range(3)])
        if bands == 4:
            alpha = values[..., 3:].astype(float) / 255
            expected = values[..., :3] * alpha + 255 * (1 - alpha) if mode == "RGBA" else 255 - values[..., :3]
            expected = expected if mode == "RGBA" else expected * (1 - alpha)
        image.save(tmp_path / "t.tif", tiffinfo={0x0112: orientation})
        shown = turned(np.broadcast_to(expected, (16, 24, 3)))
        shown = shown[:, 4:20] if shown.shape[1] > 16 else shown[4:20]
        got = decode.read_image(tmp_path / "t.tif", 16, {"16-bit": (0, 65535)})
        assert abs(got - shown.astype(float)).max() <= 2, mode  # premultiplied to be cropped


def test_odd_images_become_the_right_pixels_or_are_named(tmp_path):
    right, named, wrong = soak.check_images(540, 3, tmp_path / "odd")
    assert not wrong
    assert right > 350 and named > 50


def test_the_fuzz_notices_other_pixels(tmp_path, monkeypatch):
    """As they were before: the upper half of 16-bit samples."""
    monkeypatch.setattr(kept, "decide", lambda samples: {kind: (low - 1, 2 * high) for kind, low, high in samples})
    wrong = soak.check_images(60, 3, tmp_path / "odd")[2]
    assert any(line.startswith("other pixels: ") for line in wrong)


# What is passed over -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes in folders")
def test_what_is_passed_over_is_said(folder):
    red = folder.top / "train" / "red"
    for name in (
        "a.HEIC",
        "b.heic",
        "c.NEF",
        "notes.txt",
        "README",
        ".hidden.png",
        "._a.png",
        ".DS_Store",
        "Thumbs.db",
    ):
        (red / name).write_bytes(b"x")
    for place in (red / "@eaDir", red / ".thumbnails", folder.top / "train" / "__MACOSX"):
        place.mkdir()
        shutil.copy(red / "00.png", place)
    shutil.copy(red / "00.png", folder.top / "train" / "loose.png")
    os.mkfifo(red / "pipe.png")  # which a reader would wait for
    assert len(folder.load().train_labels) == 15
    assert folder.said[:2] == [
        f"{folder.top}/train: 15 images taken; passed over: 2 .heic (pip install pillow-heif to read them), "
        "1 .nef (raw images of a camera: export them as JPEG or TIFF), 1 .txt, 1 beside the class folders, "
        "1 folder .thumbnails of the system, 1 folder @eaDir of the system, 1 hidden, 1 neither file nor folder, "
        "1 of other kinds",
        f"{folder.top}/test: 9 images taken",
    ]  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_links_are_followed_and_loops_are_not(folder, tmp_path):
    other = make_images(tmp_path / "other", train=4, test=1)
    red = folder.top / "train" / "red"
    (red / "more").symlink_to(other / "train" / "red")
    (other / "train" / "red" / "back").symlink_to(red)
    (red / "up").symlink_to(folder.top)
    (red / "self").symlink_to(red / "self")
    (red / "one.png").symlink_to(other / "train" / "blue" / "00.png")
    loaded = folder.load()
    assert loaded.train_labels.tolist().count(2) == 5 + 4 + 1
    again = "1 folder(s) met again through a link, 1 link(s) to a folder around this one, 1 without a suffix"
    assert f"20 images taken; passed over: {again}" in folder.said[0]
    (red / "dead.png").symlink_to("nowhere")
    with pytest.raises(Damaged, match=r"dead\.png cannot be read: No such file or directory"):
        folder.load()


def test_a_class_without_an_image_that_can_be_read(folder):
    for path in (folder.top / "test" / "red").iterdir():
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(Failure, match=r"red holds no image that can be read, only 3 \.heic \(pip install pillow-heif"):
        folder.load()


@pytest.mark.parametrize(("known", "told"), [([], " (pip install pillow-heif to read HEIC)"), (["HEIF"], "")])
def test_heic_under_another_name_gets_the_same_advice(tmp_path, monkeypatch, known, told):
    formats, suffixes = decode.image_formats()
    monkeypatch.setattr(decode, "image_formats", lambda: ([*formats, *known], suffixes))
    (path := tmp_path / "photo.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    assert decode._unknown(path) == f"it is a HEIF or AVIF image that cannot be read here{told}"


def test_pillow_heif_is_used_where_it_is_installed(folder, monkeypatch):
    """In its place a module that gives .heic to Pillow's PNG reader."""
    extensions = dict(Image.registered_extensions())
    opener = SimpleNamespace(__version__="1", register_heif_opener=lambda: Image.register_extension("PNG", ".heic"))
    monkeypatch.setitem(sys.modules, "pillow_heif", opener)
    decode.image_formats.cache_clear()
    try:
        (folder.top / "train" / "red" / "00.png").rename(folder.top / "train" / "red" / "00.heic")
        assert len(folder.load().train_labels) == 15
    finally:
        Image.EXTENSION.clear()
        Image.EXTENSION.update(extensions)
        decode.image_formats.cache_clear()


# Damage --------------------------------------------------------------------------------------------------------------


def test_all_damage_is_listed_and_the_rest_is_kept(folder, monkeypatch):
    clean = folder.load(cache=False).digest
    places = [folder.top / "train" / "green" / f"zero{number:02}.png" for number in range(24)]
    for path in places:
        path.touch()
    bad = folder.top / "test" / "red" / "text.jpg"
    bad.write_text("I am not an image")
    with pytest.raises(Damaged) as error:
        folder.load()
    lines = str(error.value).splitlines()
    assert lines[0] == "25 of 49 images cannot be decoded (what was decoded is kept):"
    assert lines[1:21] == [f"  {path} cannot be decoded: the file is empty." for path in places[:20]]
    listed = folder.cache / "damaged.txt"
    assert lines[21] == "  and 5 more" and str(listed) in lines[22] and "--skip-damaged" in lines[22]
    assert listed.read_text().splitlines()[-1] == f"{bad} cannot be decoded: it is not an image of a known format."

    decoded = []
    monkeypatch.setattr(kept, "decode", lambda path, *rest: decoded.append(path) or decode.decode(path, *rest))
    skipped = folder.load(skip_damaged=True)
    assert not decoded  # what was damaged is still the same file
    assert skipped.facts.record["skipped"] == {"training": {"green": 24}, "test": {"red": 1}}
    assert skipped.facts.record["skipped_files"][-1] == "train/green/zero23.png"
    assert "25 of 49 images (training: green 24; test: red 1)" in folder.said[-1]
    assert len(skipped.train_labels) == 15 and len(skipped.test_labels) == 9
    assert skipped.digest == clean  # files that are left out may as well be removed

    for path in places:
        path.unlink()
    shutil.copy(folder.top / "test" / "red" / "00.png", bad)
    decoded.clear()
    assert len(folder.load().test_labels) == 10 and set(decoded) == {str(bad)} and not listed.exists()
    bad.unlink()
    decoded.clear()
    assert folder.load().digest == clean and not decoded


@pytest.mark.skipif(os.name == "nt", reason="Windows allows no such name")
def test_a_damaged_image_is_one_line_whatever_its_name(folder):
    bad = folder.top / "test" / "red" / "two\nlines.jpg"
    bad.write_text("I am not an image")
    with pytest.raises(Damaged) as error:
        folder.load()
    line = f"{str(bad)!r} cannot be decoded: it is not an image of a known format."
    assert str(error.value).splitlines()[1] == f"  {line}"
    assert (folder.cache / "damaged.txt").read_text() == f"{line}\n"


def test_no_class_is_left_without_images(folder):
    for path in (folder.top / "test" / "red").iterdir():
        path.write_bytes(b"")
    with pytest.raises(Failure, match="--skip-damaged would leave no test image of the class red"):
        folder.load(skip_damaged=True)


# A look at the data --------------------------------------------------------------------------------------------------


def test_copies_are_counted_and_named(folder, tmp_path):
    def copy(source, target):
        shutil.copy(folder.top / source, folder.top / target)

    copy("train/red/00.png", "test/red/same.png")
    copy("train/red/00.png", "test/red/again.png")
    copy("train/red/01.png", "test/blue/other.png")  # another class
    copy("train/red/02.png", "train/blue/both.png")  # two classes, both in training
    copy("train/red/03.png", "train/red/harmless.png")
    loaded, said = folder.load(), []
    record = survey.look(loaded, tmp_path / "out", said.append)
    listed = record["copies"].pop("listed")
    assert record["copies"] == {"test_in_training": 3, "under_another_class": 1, "under_two_classes": 2}
    assert (tmp_path / "out" / listed).read_text().splitlines() == [
        "train/blue/both.png = train/red/02.png",
        "train/red/00.png = test/red/again.png = test/red/same.png",
        "train/red/01.png = test/blue/other.png",
    ]
    assert said[0] == (
        "Images a class (training + test): blue 6 + 4, red 6 + 5, green 5 + 3; "
        "the largest has 1.2 times the training images of the smallest"
    )
    assert said[1] == "Sizes: all 16x16"
    assert said[2].startswith("Warning: 3 of 12 test images are training images, too, 1 of them under another class")
    assert said[3].startswith("Warning: 2 images stand under two classes or more")
    again = []
    assert survey.look(loaded, tmp_path / "out", again.append)["copies"]["test_in_training"] == 3
    assert again == said[2:]  # the warnings are repeated, the rest is not


def test_a_list_of_copies_has_the_names_of_today(folder):
    shutil.copy(folder.top / "train/red/00.png", folder.top / "test/red/same.png")
    survey.look(folder.load(), folder.cache, lambda line: None)
    digest = folder.load().digest
    (folder.top / "test/red/same.png").rename(folder.top / "test/red/zebra.png")
    loaded, said = folder.load(), []
    record = survey.look(loaded, folder.cache, said.append)
    assert (folder.cache / record["copies"]["listed"]).read_text() == "train/red/00.png = test/red/zebra.png\n"
    assert loaded.digest == digest and said[-1].startswith("Warning: 1 of 10 test images")


def test_no_program_is_started_for_an_eps_whatever_its_name(folder, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("started"))
    Image.new("RGB", (9, 9)).save(folder.top / "train/red/run.png", format="EPS")
    with pytest.raises(Failure, match="run.png"):
        folder.load()
    assert not {".eps", ".fits", ".wmf"} & {*decode.image_formats()[1]}


def test_images_are_decoded_again_by_another_decoder(folder, monkeypatch):
    folder.load()
    read, decode_one = [], kept.decode
    monkeypatch.setattr(kept, "decode", lambda path, *rest: read.append(path) or decode_one(path, *rest))
    folder.load()
    assert not read
    monkeypatch.setattr(kept, "DECODER_VERSION", 99)
    folder.load()
    assert len(read) == 24  # of 3 classes, 5 to train and 3 to test


def test_images_are_resized_by_a_cubic_filter_and_jpegs_from_twice_the_size_or_more(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    image.save(tmp_path / "noise.png")
    fitted = ImageOps.fit(image, (16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(decode.read_image(tmp_path / "noise.png", 16), np.array(fitted))
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    smooth = Image.fromarray(noise).resize((512, 512), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "smooth.png"), smooth.save(tmp_path / "smooth.jpg", quality=95)
    one, other = (decode.read_image(tmp_path / f"smooth.{kind}", 64).astype(int) for kind in ("png", "jpg"))
    assert np.abs(one - other).max() < 15  # 27 from half the size


@pytest.mark.skipif(os.name == "nt", reason="Windows allows no such name")
def test_a_list_of_copies_that_was_removed_is_made_again(folder):
    shutil.copy(folder.top / "train/red/00.png", folder.top / "test/red/two\nlines.png")
    loaded = folder.load()
    record = survey.look(loaded, folder.cache, lambda line: None)
    listed = folder.cache / record["copies"]["listed"]
    assert listed.read_text() == "train/red/00.png = 'test/red/two\\nlines.png'\n"
    listed.unlink()
    assert survey.notes(record, [], 9, folder.cache)[0].startswith(
        "1 of 9 test images are training images, too: test acc"
    )
    survey.look(loaded, folder.cache, lambda line: None)
    assert listed.is_file() and f"(listed in {listed})" in survey.notes(record, [], 9, folder.cache)[0]


@pytest.mark.parametrize(
    ("counts", "image_size", "told"),
    [
        ((3000, 2), 16, ["; the largest has 1,500 times the training images of the smallest", "Sizes: all 16x16"]),
        ((3, 2), 24, ["; the largest has 1.5 times the tr", "Sizes: all 16x16, smaller than 24x24 and enlarged"]),
    ],
)
def test_numbers_and_sizes_in_words(counts, image_size, told):
    labels, size = np.repeat([0, 1], counts), (image_size, image_size, 3)
    images = np.zeros((len(labels), *size), np.uint8)
    facts = Facts(sizes={"16x16": len(labels) + 2})
    loaded = data.from_arrays(("a", "b"), images, labels, images[:2], np.array([0, 1]), facts)
    assert told[0] in survey._classes(loaded) and survey._sizes(loaded) == told[1]


def test_sizes_and_many_classes_fit_one_screen(folder):
    for number in range(20):
        for split, count in (("train", 2 + number), ("test", 1)):
            (folder.top / split / f"c{number:02}").mkdir()
            for each in range(count):
                image = Image.new("RGB", (10 + number, 30), (number, each, 7))
                image.save(folder.top / split / f"c{number:02}" / f"{each}.png")
    said = []
    survey.look(folder.load(), folder.cache, said.append)
    assert said[0].startswith("Images a class (training + test): c19 21 + 1, c18 20 + 1, c17 19 + 1, ..., c02 4 + 1, ")
    assert said[0].endswith("; the largest has 10.5 times the training images of the smallest")
    assert (
        said[1].startswith("Sizes: from 16x16 to 29x30, most often 16x16 (24); ")
        and "; smaller than 16x16 and enlarged: 33" in said[1]
    )


@pytest.mark.draws
def test_from_the_teacher_to_the_comparison(cli, folder, tmp_path):
    """All of it once, as a person types it: run.json, model.pt, the comparison, and single images afterwards."""
    values = numbers(0, 1, "f4")
    folder.put("train/red/float.tif", values)
    shutil.copy(folder.top / "train/red/00.png", folder.top / "test/red/copy.png")
    (folder.top / "test" / "blue" / "zero.png").touch()
    (folder.top / "test").rename(folder.top / "val")
    output = tmp_path / "out"
    words = ("--dataset", "folder", "--data-dir", folder.top, "--image-size", 16, "--epochs", 1, "--device", "cpu",
             "--precision", "fp32", "--output-dir", output)  # fmt: skip
    refused = cli(*words, "--train-teacher")
    assert refused.status == 1 and "zero.png cannot be decoded: the file is empty." in refused.err
    assert cli(*words, "--train-teacher", "--skip-damaged").status == 0
    assert "zero.png" in cli(*words).err
    wrong = cli(*words, "--skip-damaged", "--teacher", tmp_path / "none")
    assert wrong.status == 1
    got = cli(*words, "--skip-damaged")
    assert got.status == 0, got
    note = f"1 of 10 test images are training images, too (listed in {output / 'data'}"
    assert f"Warning: {note}" in got.out and f"Note that {note}" in got.out
    assert "Note that images that cannot be decoded were left out: 1 test." in got.out
    assert "1 of 10 test images are training images, too" in (output / "report.html").read_text()
    record = json.loads((output / "kd-T4-a0.1-s0" / "run.json").read_text())["images"]
    assert record["ranges"] == {"floating-point": [0, 1]} and record["test_folder"] == "val"
    assert record["skipped"] == {"training": {}, "test": {"blue": 1}} and record["copies"]["test_in_training"] == 1
    assert json.loads((output / "comparison.json").read_text())["images"] == record
    model = models.load(output / "kd-T4-a0.1-s0" / "model.pt")
    assert model.ranges == {"floating-point": (0, 1)}

    deep = folder.put("train/red/deep.png", numbers(0, 65535, "u2"))
    high = folder.put("train/red/high.tif", 300 * values)
    got = cli("--predict", folder.top / "train/red/float.tif", deep, high, "--output-dir", output, "--device", "cpu")
    assert got.status == 1 and len(got.out.splitlines()) == 3
    assert "high.tif cannot be decoded as an image: its samples (floating-point) lie from 0 to 300, outside" in got.err
    assert "Images with 16-bit samples: 1, but the model was trained on none such. 0 was taken for black" in got.err

    checkpoint = load_checkpoint(output / "kd-T4-a0.1-s0" / "model.pt")
    save_checkpoint(output / "kd-T4-a0.1-s0" / "model.pt", checkpoint | {"ranges": {"floating-point": [0, 0.3]}})
    got = cli("--predict", folder.top / "train/red/float.tif", high, "--output-dir", output, "--device", "cpu")
    said = "Images with floating-point samples outside of the training set's range, 0 to 0.3: 2. What is darker was"
    assert got.status == 0 and said in got.err


# Where the test images come from -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["val", "valid"])
def test_val_is_taken_where_test_is_missing(folder, name):
    digest = folder.load().digest
    (folder.top / "test").rename(folder.top / name)
    assert folder.load().digest == digest
    assert folder.said[0] == f"{folder.top}/test does not exist: the images of {folder.top / name} are the test set"
    shutil.copytree(folder.top / name, folder.top / "test")
    assert folder.load().digest == digest
    assert folder.said[0] == f"{folder.top / name} is not used: the test set is {folder.top}/test"


def test_val_is_taken_where_test_has_no_classes(folder):
    """Competitions hand out test images without labels."""
    (folder.top / "test").rename(folder.top / "val")
    (folder.top / "test").mkdir()
    shutil.copy(folder.top / "val" / "red" / "00.png", folder.top / "test")
    assert len(folder.load().test_labels) == 9
    assert folder.said[0] == f"{folder.top}/test has no class folders: the images of {folder.top}/val are the test set"


@pytest.fixture
def alone(tmp_path):
    """One folder of classes with 10 images each."""
    made = Folder(tmp_path)
    shutil.rmtree(made.top)
    make_images(made.top, train=10, test=1)
    shutil.rmtree(made.top / "test")
    for name in CLASSES:
        (made.top / "train" / name).rename(made.top / name)
    (made.top / "train").rmdir()
    return made


def contents(loaded, top):
    return {(top / name).read_bytes() for name in loaded.facts.names[1]}


def test_a_fraction_is_split_by_content_and_not_by_name(alone):
    with pytest.raises(Failure, match=r"--test-fraction 0\.2 takes a fifth"):
        alone.load()
    loaded = alone.load(test_fraction=0.3)
    assert loaded.test_labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 and len(loaded.train_labels) == 21
    assert not {*loaded.facts.names[0]} & {*loaded.facts.names[1]}
    chosen = contents(loaded, alone.top)
    assert contents(alone.load(image_size=20, test_fraction=0.3), alone.top) == chosen
    for name in CLASSES:
        for number, path in enumerate(sorted((alone.top / name).iterdir(), reverse=True)):
            path.rename(path.with_name(f"renamed{number}.png"))
    renamed = alone.load(test_fraction=0.3)
    assert contents(renamed, alone.top) == chosen
    assert alone.load(test_fraction=0.3).digest == renamed.digest == alone.load(test_fraction=0.3, cache=False).digest
    assert alone.load(test_fraction=0.2).digest != renamed.digest
    smaller = contents(alone.load(test_fraction=0.2), alone.top)
    assert smaller < chosen


def test_copies_of_a_file_stay_on_one_side(alone):
    for name in CLASSES:
        for path in list((alone.top / name).iterdir()):
            shutil.copy(path, path.with_name(f"copy-{path.name}"))
    loaded = alone.load(test_fraction=0.3)
    train = {(alone.top / name).read_bytes() for name in loaded.facts.names[0]}
    assert len(loaded.test_labels) == 18 and not train & contents(loaded, alone.top)


def test_fractions_that_cannot_be(alone):
    for number, path in enumerate(sorted((alone.top / "red").iterdir())):
        shutil.copy(alone.top / "red" / "00.png", path) if number else None
    with pytest.raises(Failure, match="class red has one image only"):
        alone.load(test_fraction=0.3)
    (alone.top / "test" / "red").mkdir(parents=True)
    with pytest.raises(Failure, match="test seems to hold test images of the classes beside it. Move these into"):
        alone.load(test_fraction=0.3)
    (alone.top / "train" / "red").mkdir(parents=True)
    with pytest.raises(Failure, match="holds test images already: leave --test-fraction out"):
        alone.load(test_fraction=0.3)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--skip-damaged"], "--skip-damaged is for --dataset folder and --unlabeled"),
        (["--test-fraction", "0.2", "--dataset", "shapes"], "--test-fraction is for --dataset folder"),
        (["--test-fraction", "1", "--dataset", "folder"], "'1' is not a number above 0 and up to 0.9"),
        (["--list", "--skip-damaged"], "--skip-damaged cannot be combined with --list"),
    ],
)
def test_options_that_do_not_fit(words, named):
    with pytest.raises(Usage, match=named):
        parse(words)


def test_the_command_of_the_teacher_names_the_same_data(cli, folder, tmp_path):
    words = ("--dataset", "folder", "--data-dir", folder.top, "--skip-damaged", "--output-dir", tmp_path / "o")
    got = cli(*words)
    assert got.status == 1 and "--skip-damaged" in got.err.splitlines()[-1] and "--test-fraction" not in got.err
