"""A table of bad input: each row a command that must end with the right status and one to three lines that say what,
where and what to do; never a traceback, and nothing lost."""

import hashlib
import json
import os
import shutil
import zipfile
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_images
from PIL import Image

import data
import models
import runs.machine
import train
from arguments import parse
from runs.command import explain
from runs.files import Damaged, Failure
from runs.machine import Machine, check_arithmetic, choose_device, choose_precision
from runs.signals import Stop


def explained(got):
    """Whether standard error has, apart from the log of training, one to three lines and no traceback."""
    lines = [line for line in got.err.splitlines() if ", training accuracy " not in line]
    return 1 <= len(lines) <= 3 and "Traceback" not in got.err


NUMBERS = {
    "--epochs": ("0", "-1", "1.5", "many", "nan", "inf", ""),
    "--batch-size": ("0", "-128", "12.5", "nan", "1e3"),
    "--num-workers": ("-1", "two", "inf"),
    "--temperature": ("0", "-4", "nan", "inf", "-inf", "warm"),
    "--alpha": ("-0.1", "1.1", "nan", "inf", "half"),
    "--seed": ("-1", "0.5", "nan", "99999999999"),
    "--seeds": ("0", "-2", "1.5", "nan"),
    "--lr": ("0", "-0.1", "nan", "inf", "fast"),
    "--weight-decay": ("-1e-4", "nan", "inf", "2"),
    "--image-size": ("15", "257", "nan", "32.0"),
    "--val-fraction": ("0", "0.6", "nan", "-0.1"),
    "--train-fraction": ("0", "1.1", "nan", "-0.1"),
    "--save-every": ("-1", "nan", "inf"),
    "--device": ("gpu", "cuda:", "cuda:x", "tpu", "cuda:-1"),
    "--precision": ("fp8", "fp16"),
    "--dataset": ("cifar1000", ""),
}


@pytest.mark.parametrize(("flag", "value"), [(flag, value) for flag, values in NUMBERS.items() for value in values])
def test_a_value_out_of_range_is_wrong_usage(cli, flag, value):
    got = cli(f"{flag}={value}")
    assert got.status == 2 and not got.out
    assert flag in got.err and len(got.err.splitlines()) == 1 and "Traceback" not in got.err


USAGE = {
    "unknown flag": ("--resume",),
    "abbreviation": ("--epoch", "3"),
    "abbreviated switch": ("--train",),
    "no value": ("--epochs",),
    "stray word": ("200",),
    "report and teacher": ("--report", "--train-teacher"),
    "teacher and teacher": ("--train-teacher", "--teacher", "x"),
    "teacher with a sweep": ("--train-teacher", "--temperature", "1", "2"),
    "validation without a sweep": ("--val-fraction", "0.1"),
    "mirror of a folder": ("--dataset", "folder", "--data-url", "http://127.0.0.1/x"),
    "mirror that is no URL": ("--data-url", "cifar.tar.gz"),
    "empty path": ("--output-dir", ""),
    "report with a sweep": ("--report", "--temperature", "1", "2"),
    "report of a part": ("--report", "--seeds", "3"),
    "report of the default": ("--report", "--alpha", "0.1"),
    "sweep with the baseline": ("--alpha", "0", "0.5"),
    "sweep of the baseline": ("--temperature", "2", "4", "--alpha", "0"),
    "part of a teacher": ("--train-teacher", "--train-fraction", "0.1"),
    "class that a teacher omits": ("--train-teacher", "--omit-class", "bird"),
    "report of a class": ("--report", "--omit-class", "bird"),
    "smoothed labels for a loss of one's own": ("--loss", "x.py:f", "--label-smoothing", "0.1"),
    "smoothed labels of an omitted class": ("--omit-class", "bird", "--label-smoothing", "0.1"),
    "folder of the demo": ("--demo", "--data-dir", "pets"),
    "seeds past the last": ("--seed", "2147483647", "--seeds", "2"),
}


@pytest.mark.parametrize("words", USAGE.values(), ids=USAGE)
def test_wrong_usage(cli, words):
    got = cli(*words)
    assert got.status == 2 and not got.out
    assert len(got.err.splitlines()) == 1 and "--help" in got.err


# Each prepares a folder and returns the command's words and what the message must name.


def no_train(top):
    shutil.rmtree(top / "p" / "train")
    return (), ["train"]


def no_test(top):
    shutil.rmtree(top / "p" / "test")
    return (), ["test"]


def no_folder(top):
    return ("--data-dir", top / "nowhere"), ["nowhere"]


def data_dir_is_a_file(top):
    (top / "file").touch()
    return ("--data-dir", top / "file"), ["file"]


def one_class(top):
    for name in ("green", "red"):
        for split in ("train", "test"):
            shutil.rmtree(top / "p" / split / name)
    return (), ["has 1 class folder, but at least two classes are needed"]


def empty_class(top):
    (top / "p" / "train" / "empty").mkdir()
    (top / "p" / "test" / "empty").mkdir()
    return (), [os.path.join("train", "empty"), "holds no image"]


def class_in_train_only(top):
    shutil.rmtree(top / "p" / "test" / "red")
    return (), ["red", "differ"]


def class_in_test_only(top):
    shutil.rmtree(top / "p" / "train" / "red")
    return (), ["red", "differ"]


def zero_bytes(top):
    path = top / "p" / "train" / "red" / "zero.png"
    path.touch()
    return (), [str(path)]


def cut_short(top):
    path = top / "p" / "test" / "green" / "cut.jpg"
    Image.effect_noise((64, 64), 80).save(path)
    path.write_bytes(path.read_bytes()[:-300])
    return (), [str(path)]


def text_as_png(top):
    path = top / "p" / "train" / "blue" / "text.png"
    path.write_text("I am not an image")
    return (), [str(path)]


def flipped_png(top):
    path = top / "p" / "train" / "blue" / "03.png"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    return (), [str(path)]


def too_many_pixels(top):
    path = top / "p" / "train" / "blue" / "bomb.png"
    Image.new("1", (20_000, 15_000)).save(path)
    return (), [str(path)]


def output_is_a_file(top):
    (top / "taken").touch()
    return ("--output-dir", top / "taken"), ["taken"]


def output_below_a_file(top):
    (top / "taken").touch()
    return ("--output-dir", top / "taken" / "out"), ["taken"]


def absent_cuda(top):
    return ("--device", "cuda:123"), ["cuda:123"]


def absent_cuda_beyond_a_byte(top):
    return ("--device", "cuda:256"), ["cuda:256"]


def eps_that_a_program_would_run(top):
    (top / "p" / "train" / "blue" / "run.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    return (), ["run.png"]


def diverging(top):
    words = ("--lr", "1000", "--weight-decay", "1", "--batch-size", "4", "--epochs", "50")
    return words, ["diverged", "--lr", "epoch"]


FAILURES = (
    no_train, no_test, no_folder, data_dir_is_a_file, one_class, empty_class, class_in_train_only, class_in_test_only,
    zero_bytes, cut_short, text_as_png, flipped_png, too_many_pixels, output_is_a_file, output_below_a_file,
    absent_cuda, absent_cuda_beyond_a_byte, eps_that_a_program_would_run, diverging,
)  # fmt: skip


@pytest.mark.parametrize("prepare", FAILURES, ids=lambda each: each.__name__)
def test_failures_name_what_and_where(cli, tmp_path, prepare):
    if prepare is absent_cuda and torch.cuda.device_count() > 123:
        pytest.skip("this machine has more than 123 GPUs")
    make_images(tmp_path / "p", train=8, test=2)
    words, names = prepare(tmp_path)
    first = ("--train-teacher", "--dataset", "folder", "--data-dir", tmp_path / "p", "--output-dir", tmp_path / "o")
    got = cli(*first, "--image-size", 16, "--epochs", 1, "--device", "cpu", *words)
    assert got.status == 1, got
    assert not [name for name in names if name not in got.err], got
    assert explained(got), got


# Teachers that do not fit, and damaged folders: words and names as above, on a copy of a finished output folder.


def teacher_is_absent(out):
    return ("--teacher", out / "nobody"), ["nobody"]


def teacher_is_an_empty_folder(out):
    (out / "empty").mkdir()
    return ("--teacher", out / "empty"), ["empty holds no model.pt. --teacher takes the folder"]


def teacher_is_the_folder_of_one(out):
    return ("--teacher", out), ["teacher-s0", "not a teacher's folder"]


def teacher_is_overwritten(out):
    return ("--teacher", out / "baseline-s0", "--overwrite"), ["--overwrite would remove", "baseline-s0"]


def teacher_is_an_unfinished_student(out):
    (out / "baseline-s0" / "model.pt").unlink()
    return ("--teacher", out / "baseline-s0"), ["The student in", "epoch 2 of 2", "the command that began it"]


def teacher_of_other_image_size(out):
    words = ("--image-size", 20, "--data-dir", "nowhere")  # said before any image is decoded
    return words, ["image size 16 instead of 20. Add --image-size 16"]


def teacher_of_other_classes(out):
    top = make_images(out / "other", train=4, test=2)
    for split in ("train", "test"):
        (top / split / "red").rename(top / split / "pink")
    return ("--data-dir", top), ["classes blue, green, red instead of blue, green, pink"]


def teacher_of_other_images(out):
    top = make_images(out / "other", train=4, test=2)
    return ("--data-dir", top), ["other images", "--train-teacher", f"--output-dir {out}-2"]


def unfinished_teacher_with_a_damaged_record(out):
    (out / "teacher-s0" / "model.pt").unlink()
    (out / "teacher-s0" / "run.json").write_text("{}")
    return (), ["unfinished", "damaged"]


def other_epochs(out):
    return ("--epochs", 3), ["epochs 2 instead of 3", "--overwrite"]


def other_batch_size(out):
    return ("--batch-size", 8), ["batch size 16 instead of 8"]


def damaged_student(out):
    path = out / "kd-T4-a0.1-s0" / "model.pt"
    path.write_bytes(b"\0" * 100)
    return (), ["kd-T4-a0.1-s0 to train it again", "damaged"]


def damaged_run_json(out):
    (out / "baseline-s0" / "run.json").write_text("{]")
    return (), ["baseline-s0", "JSON"]


def report_of_an_absent_folder(out):
    return ("--report", "--output-dir", out / "absent"), ["absent"]


def report_of_a_damaged_comparison(out):
    (out / "comparison.json").write_text("[1]")
    return ("--report",), ["comparison.json is damaged. Remove it"]


def change(path, **entries):
    content = json.loads(path.read_text())
    content.update(entries)
    path.write_text(json.dumps(content))


def run_json_with_odd_settings(out):
    change(out / "kd-T4-a0.1-s0" / "run.json", settings=[1])
    return ("--report",), ["kd-T4-a0.1-s0", "expected object, got array - at $.settings"]


def run_json_with_nan(out):
    change(out / "baseline-s0" / "run.json", accuracy=float("nan"))
    return ("--report",), ["baseline-s0", "NaN is not a JSON number"]


def logits_are_pickled(out):
    path = out / "baseline-s0" / "test_logits.npy"
    np.save(path, np.array([{"an": "object"}], dtype=object), allow_pickle=True)
    change(path.with_name("run.json"), test_logits_sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    return ("--report",), ["test_logits.npy", "damaged"]


def history_is_damaged(out):
    (out / "baseline-s0" / "history.csv").write_text("epoch,train_loss,train_accuracy\n1,x,y\n")
    return ("--report",), ["history.csv", "damaged"]


def history_of_other_columns(out):
    (out / "baseline-s0" / "history.csv").write_text("epoch,train_accuracy\n1,0.5\n")
    return ("--report",), ["history.csv", "it has no column 'train_loss'"]


def comparison_of_nothing(out):
    (out / "comparison.json").write_text('{"kd": [{}]}')
    return ("--report",), ["comparison.json is damaged. Remove it"]


TEACHERS = (
    teacher_is_absent, teacher_is_an_empty_folder, teacher_is_the_folder_of_one,
    teacher_is_overwritten, teacher_is_an_unfinished_student,
    teacher_of_other_image_size, teacher_of_other_classes, teacher_of_other_images,
    unfinished_teacher_with_a_damaged_record, other_epochs, other_batch_size, damaged_student, damaged_run_json,
    report_of_an_absent_folder, report_of_a_damaged_comparison,
    run_json_with_odd_settings, run_json_with_nan,
    logits_are_pickled, pytest.param(history_is_damaged, marks=pytest.mark.draws),
    pytest.param(history_of_other_columns, marks=pytest.mark.draws), comparison_of_nothing,
)  # fmt: skip


@pytest.mark.parametrize("prepare", TEACHERS, ids=lambda each: each.__name__)
def test_what_does_not_fit_is_named_and_nothing_is_lost(cli, flags, copy, prepare):
    words, names = prepare(copy)
    before = {path: path.read_bytes() for path in copy.glob("*-s0/*")}
    got = cli(*(() if "--report" in words else flags), "--output-dir", copy, *words)
    assert got.status == 1, got
    assert not [name for name in names if name not in got.err], got
    assert explained(got), got
    assert {path: path.read_bytes() for path in copy.glob("*-s0/*")} == before


@pytest.fixture
def gpu(monkeypatch):
    """gpu(error) pretends that there is a GPU whose first computation raises RuntimeError(error), or works if None;
    returns the list of devices that were made current."""
    ones, current = torch.ones, []

    def set_device(device):
        assert device.index is not None  # as torch.cuda.set_device wants it
        current.append(str(device))

    def prepare(error):
        def stand_in(*shape, device):
            if device.type == "cuda" and error is not None:
                raise RuntimeError(error)
            return ones(*shape)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "set_device", set_device)
        monkeypatch.setattr(torch, "ones", stand_in)
        return current

    return prepare


def test_a_gpu_is_used_and_made_current_where_it_is_numbered(gpu, capsys):
    current = gpu(None)
    assert [str(choose_device(name)) for name in ("auto", "cuda", "cuda:1")] == ["cuda", "cuda", "cuda:1"]
    assert current == ["cuda:1"] and not capsys.readouterr().err
    ranks = [str(choose_device(name, rank)) for name in ("auto", "cuda") for rank in (0, 1, 3)]  # of two GPUs
    assert ranks == ["cuda:0", "cuda:1", "cuda:1"] * 2 and str(choose_device("cuda:0", 1)) == "cuda:0"


def test_without_cuda_mps_comes_before_the_cpu(gpu, monkeypatch):
    gpu(None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *shape, device: torch.zeros(*shape))
    assert str(choose_device("auto")) == "mps"


@pytest.mark.parametrize("found", ["amx_bf16", "avx512_bf16", None])
def test_bfloat16_is_chosen_where_the_machine_has_instructions_for_it(monkeypatch, found):
    supported = found is not None
    has = {name: name == found for name in ("amx_bf16", "avx512_bf16")} | {"avx2": True}
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or supported)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    for kind in ("cuda", "cpu"):
        assert choose_precision("auto", torch.device(kind)) == ("bf16" if supported else "fp32")
        assert choose_precision("fp32", torch.device(kind)) == "fp32"
        assert choose_precision("bf16", torch.device(kind)) == "bf16"
    assert choose_precision("auto", torch.device("mps")) == "fp32"


def test_float32_is_chosen_where_pytorch_cannot_tell_what_the_cpu_has(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert choose_precision("auto", torch.device("cpu")) == "fp32"


def test_a_gpu_that_this_pytorch_has_no_kernels_for(gpu, capsys):
    gpu("CUDA error: no kernel image is available\nCUDA kernel errors might be reported later")
    assert choose_device("auto").type == "cpu"
    told = "The device cuda cannot be used: CUDA error: no kernel image is available."
    assert capsys.readouterr().err == f"{told} The next device is used instead.\n"
    with pytest.raises(Failure, match=r"^The device cuda:0 cannot be used: CUDA error: no kernel"):
        choose_device("cuda:0")


class Other:
    """A device that is not the CPU, for whoever asks."""

    type = "mps"

    def __str__(self):
        return "mps"


@pytest.fixture
def other(monkeypatch):
    """A device other than the CPU that computes as the CPU does."""
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, **rest: to(tensor, **rest) if rest else tensor)
    return Other()


def wrong(function):
    """`function`, whose second result, the one of the device, is twice as large as it should be."""
    calls = []

    def call(*given, **rest):
        calls.append(given)
        return function(*given, **rest) * len(calls)

    return call


class WrongSlope(torch.autograd.Function):
    """The identity, whose gradient is wrong."""

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, slope):
        return slope.flip(0)


def test_a_device_that_computes_rightly_may_train(other):
    check_arithmetic(Machine(other))


def test_the_device_is_asked_for_nothing_that_networks_never_do(other, monkeypatch):
    """On CUDA and MPS batch norm without a scale has no gradient of the bias; the CPU has one."""
    normalize = F.batch_norm

    def as_on_a_gpu(images, mean, variance, weight, bias, **rest):
        if weight is None and bias.requires_grad:
            raise RuntimeError("Function NativeBatchNormBackward0 returned an invalid gradient at index 2")
        return normalize(images, mean, variance, weight, bias, **rest)

    monkeypatch.setattr(F, "batch_norm", as_on_a_gpu)
    check_arithmetic(Machine(other))


def test_a_device_that_cannot_compute_a_step_is_named(other, monkeypatch):
    convolve, calls = F.conv2d, []

    def convolution(*given, **rest):
        calls.append(given)
        if len(calls) == 2:
            raise RuntimeError("no kernel for this\nand more")
        return convolve(*given, **rest)

    monkeypatch.setattr(F, "conv2d", convolution)
    with pytest.raises(
        Failure, match="(?s)mps cannot compute a step of a training in fp32: no kernel for this[.].*--device cpu"
    ):
        check_arithmetic(Machine(other))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("conv2d", "a convolution"),
        ("batch_norm", "batch norm"),
        ("max_pool2d", "max-pooling"),
        ("cross_entropy", "the gradient of max-pooling"),
    ],
)
def test_a_device_that_computes_wrongly_is_named(other, monkeypatch, name, what):
    monkeypatch.setattr(F, name, wrong(getattr(F, name)))
    with pytest.raises(
        Failure, match=f"The device mps computes wrongly in fp32: {what} differs from the CPU's by 1 of"
    ):
        check_arithmetic(Machine(other))


def test_a_wrong_gradient_is_named(other, monkeypatch):
    convolve, calls = F.conv2d, []

    def convolution(images, *given, **rest):
        calls.append(images)
        return convolve(WrongSlope.apply(images) if len(calls) == 2 else images, *given, **rest)

    monkeypatch.setattr(F, "conv2d", convolution)
    with pytest.raises(Failure, match="the gradient of a convolution's input differs from the CPU's by"):
        check_arithmetic(Machine(other))


def test_what_is_wrong_only_in_the_precision_that_is_trained_in_is_named(other, monkeypatch):
    """As a GPU's bf16 gradients may be, which float32 does not show."""
    autocast, convolve = torch.autocast, F.conv2d
    # The device is none that it knows.
    monkeypatch.setattr(torch, "autocast", lambda _, dtype, **rest: autocast("cpu", dtype))
    check_arithmetic(Machine(other, "bf16"))

    def convolution(images, weight, **rest):
        is_bf16 = torch.is_autocast_enabled("cpu")
        return convolve(WrongSlope.apply(images) if is_bf16 else images, weight, **rest)

    monkeypatch.setattr(F, "conv2d", convolution)
    check_arithmetic(Machine(other, "fp32"))
    with pytest.raises(Failure, match="computes wrongly in bf16: the gradient of a convolution's input differs"):
        check_arithmetic(Machine(other, "bf16"))


def test_a_device_that_computes_wrongly_does_not_train(cli, flags, tmp_path, monkeypatch):
    monkeypatch.setattr(runs.machine, "choose_device", lambda *_: torch.device("mps"))
    samples = {"cpu": torch.ones(2), "mps": torch.full((2,), float("nan"))}
    monkeypatch.setattr(runs.machine, "_sample", lambda machine, *_: {"a convolution": samples[machine.device.type]})
    got = cli(*flags, "--train-teacher", "--output-dir", tmp_path / "out")
    assert got.status == 1 and explained(got), got
    assert "The device mps computes wrongly in fp32: a convolution differs" in got.err and "--device cpu" in got.err
    assert not (tmp_path / "out" / "teacher-s0").exists()


@pytest.mark.parametrize("error", ["CUDA out of memory. Tried to allocate", ""])
def test_a_gpu_that_is_busy_is_no_reason_to_train_on_the_cpu(gpu, error):
    gpu(error)
    with pytest.raises(Failure, match=f"cannot be used: {error or 'RuntimeError'}"):
        choose_device("auto")


def test_a_checkpoint_that_holds_a_call_is_refused_and_the_call_is_not_made(cli, flags, copy):
    class Call:
        def __reduce__(self):
            return os.mkdir, (str(copy / "owned"),)

    path = copy / "teacher-s0" / "model.pt"
    content = torch.load(path, weights_only=True)
    torch.save(content | {"mean": Call()}, path)
    got = cli(*flags, "--output-dir", copy)
    assert got.status == 1 and "could run code" in got.err
    assert not (copy / "owned").exists()


def test_a_compressed_archive_is_refused(copy):
    path = copy / "teacher-s0" / "model.pt"
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(Damaged, match="it is a compressed archive"):
        models.load(path)


UNEXPECTED = {
    "memory": (MemoryError(), "there is not enough memory. Try a smaller --batch-size or --image-size."),
    "GPU memory": (torch.OutOfMemoryError("CUDA"), "there is not enough memory. Try a smaller --batch-size"),
    "CPU memory": (
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        "there is not enough memory. Try a smaller --batch-size or --image-size.",
    ),
    "MPS memory": (
        RuntimeError("MPS backend out of memory (MPS allocated: 9.1 GB, max allowed: 9.07 GB). Tried to allocate 1 GB"),
        "there is not enough memory. Try a smaller --batch-size or --image-size.",
    ),
    "CUDA memory in words": (
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors"),
        "there is not enough memory.",
    ),
    "memory of cuBLAS": (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        "there is not enough memory.",
    ),
    "memory of cuDNN": (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "there is not enough memory."),
    "a buffer on MPS": (RuntimeError("Invalid buffer size: 24.00 GiB"), "there is not enough memory."),
    "memory of the system": (OSError(12, "Cannot allocate memory"), "there is not enough memory."),
    "file": (OSError(13, "Permission denied", "here/it"), "here/it: Permission denied."),
    "disk": (OSError(28, "No space left on device"), "the disk is full."),
    "other": (RuntimeError("the first line\nthe second"), "RuntimeError: the first line\n(--debug shows where)"),
}


@pytest.mark.parametrize(("error", "told"), UNEXPECTED.values(), ids=UNEXPECTED)
def test_an_unexpected_error_becomes_a_sentence(error, told):
    for more in ([], ["--compile"]):
        text = explain(error, parse(["--train-teacher", *more]), Stop())
        assert text.startswith(told)
        assert ("train without --compile" in text) == (bool(more) and told.startswith("RuntimeError"))


def test_an_unexpected_error_ends_the_command_with_its_sentence(cli, flags, tmp_path, monkeypatch):
    error, told = UNEXPECTED["other"]
    monkeypatch.setattr(train, "train", Mock(side_effect=error))
    got = cli(*flags, "--train-teacher", "--output-dir", tmp_path)
    assert got.status == 1 and got.err.startswith(f"error: {told}") and explained(got), got


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--predict x", "Try --num-workers 1, or on a GPU --device cpu."),
        ("--report", "Close other programs, and try again."),
        ("--train-teacher", "Try a smaller --batch-size or --image-size."),
    ],
)
def test_too_little_memory_is_met_with_options_that_the_command_has(words, told):
    assert explain(MemoryError(), parse(words.split()), Stop()) == f"there is not enough memory. {told}"


@pytest.mark.parametrize("fits", [False, True])
def test_images_that_do_not_fit_on_the_device_are_said_to_be_too_many(cli, flags, tmp_path, monkeypatch, fits):
    error = ValueError("something else") if fits else torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(data.Data, "to", Mock(side_effect=error))
    got = cli(*flags, "--train-teacher", "--output-dir", tmp_path)
    told = "ValueError: something else" if fits else "the images, 0.0 GB decoded, do not fit into the memory of "
    assert got.status == 1 and got.err.startswith(f"error: {told}"), got
    assert ("Try a smaller --image-size, or --device cpu." in got.err) != fits


def test_debug_shows_the_traceback(cli, tmp_path):
    got = cli("--debug", "--output-dir", tmp_path)
    assert got.status == 1 and "Traceback" in got.err
