"""Ours against the textbook loop, interleaved in one process: what does an experiment cost?

    python benchmarks/throughput.py            about ten minutes on 2 cores; --images 1536 in six
    python benchmarks/throughput.py --quick    two minutes

The textbook loop is what people use instead: torchvision transforms on PIL images in DataLoader workers (two, for a GPU
one per core), contiguous float32 (on a GPU with PyTorch's default, TF32 in convolutions), the teacher run again in
every step of every student, `.item()` in every step. Networks, batch size and loss are the same; its optimizer is SGD,
ours the program's, which takes longer and learns faster. Images are noise of CIFAR-10's size: accuracy is not measured
here. Every figure is the median over the repeats, with the smallest and largest. Writes a JSON file, except with
--quick.
"""

import argparse
import contextlib
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data
import models
from distill import SoftTargets, distillation_loss
from runs.files import Failure, write_json
from runs.machine import HAS_AMX, start_machine
from runs.progress import Options
from runs.run import Run
from runs.settings import RECIPE, Settings
from train import compile_network, train

BATCH, CLASSES, SIZE, TEMPERATURE, ALPHA = 128, 10, 32, 4.0, 0.5
MEAN = STD = (0.5, 0.25, 0.3)


def noise(images, device):
    """A Data of random images."""
    draws = torch.Generator().manual_seed(0)
    train_images = torch.randint(0, 256, (images, SIZE, SIZE, 3), dtype=torch.uint8, generator=draws)
    labels = torch.randint(0, CLASSES, (images,), generator=draws)
    names = tuple(f"class {k}" for k in range(CLASSES))
    some = train_images[:200], labels[:200]
    return data.Data(names, train_images, labels, *some, MEAN, STD, f"noise-{images}").to(device)


# The textbook loop ---------------------------------------------------------------------------------------------------


class Images(Dataset):
    """As torchvision.datasets.CIFAR10: a PIL image is made, cropped, flipped and normalised for every access."""

    def __init__(self, loaded):
        self.images, self.labels = loaded.train_images.cpu().numpy(), loaded.train_labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(SIZE, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def workers(device):
    """How many processes load the textbook loop's images: two, or where a GPU trains and leaves the cores free, one for
    each core."""
    return 2 if device.type == "cpu" else max(2, os.cpu_count())


def textbook_loader(loaded):
    return DataLoader(
        Images(loaded),
        BATCH,
        shuffle=True,
        num_workers=workers(loaded.train_images.device),
        drop_last=True,
        pin_memory=loaded.train_images.is_cuda,
    )


@contextlib.contextmanager
def default_convolutions():
    """cuDNN as PyTorch sets it, which our program changes for the whole process to have the same bits again."""
    cudnn = torch.backends.cudnn
    ours = cudnn.deterministic, cudnn.allow_tf32
    cudnn.deterministic, cudnn.allow_tf32 = False, True
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.allow_tf32 = ours


@default_convolutions()
def textbook_epoch(loaded, device, network, teacher=None):
    network = network.to(device).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    total = 0.0
    for images, labels in textbook_loader(loaded):
        images, labels = images.to(device), labels.to(device)
        logits = network(images)
        if teacher is None:
            loss = F.cross_entropy(logits, labels)
        else:
            with torch.no_grad():
                soft = teacher(images)
            loss = distillation_loss(logits, labels, soft, TEMPERATURE, ALPHA)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total


# Ours ----------------------------------------------------------------------------------------------------------------


class Ours:
    """Whole runs of one epoch as the program trains them: set-up, states and files included."""

    def __init__(self, loaded, machine, teacher):
        self.folder = tempfile.TemporaryDirectory()
        self.machine, self.teacher, self.loaded, self.runs = machine, teacher, loaded, 0

    def targets(self, fresh=False):
        self.runs += fresh
        name = f"teacher {self.runs}"
        folder = Path(self.folder.name) / "targets"
        return SoftTargets(self.teacher, name, self.loaded.digest, self.views(), folder, self.machine)

    def views(self):
        return data.Views(self.loaded.train_images, self.loaded.mean, self.loaded.std)

    def epoch(self, role, seed=0, targets=None):
        self.runs += 1
        extra = {"temperature": TEMPERATURE, "alpha": ALPHA, "teacher": "t"} if role == "kd" else {}
        settings = Settings(role, self.loaded.digest, 1, BATCH, 0.05, 5e-4, seed, SIZE, **extra)
        train(Run(Path(self.folder.name) / str(self.runs), settings), self.loaded, self.machine, Options(), targets)

    def comparison(self):
        targets = self.targets(fresh=True)
        for seed in range(3):
            self.epoch("kd", seed, targets)
            self.epoch("baseline", seed)

    def input_pipeline(self):
        views = self.views()
        order = torch.randperm(views.count, device=views.device)
        for batch in order.split(BATCH):
            views.batch(self.runs, batch)


# Measuring -----------------------------------------------------------------------------------------------------------


def matmul_peak(machine):
    """Multiply-adds a second of a large matrix product in the precision that is trained in."""
    side = 2048 if machine.device.type == "cpu" else 8192
    one, other = (torch.randn(side, side, device=machine.device, dtype=machine.dtype) for _ in range(2))
    best = min(seconds(lambda: one @ other, machine) for _ in range(8))
    return side**3 / best


def seconds(function, machine):
    machine.synchronize()
    started = time.perf_counter()
    function()
    machine.synchronize()
    return time.perf_counter() - started


def training_step(machine, architecture, compiled=False):
    """A function that takes the forward and backward pass of a new network for one batch."""
    network = models.create(architecture, CLASSES, 0).to(**machine.place).train()
    images = torch.randn(BATCH, 3, SIZE, SIZE).to(**machine.place)
    labels = torch.arange(BATCH, device=machine.device) % CLASSES
    forward = compile_network(network) if compiled else network

    def step():
        with machine.autocast():
            logits = forward(images)
        network.zero_grad(set_to_none=True)
        F.cross_entropy(logits.float(), labels).backward()

    return step


def narrow_images(machine):
    """Where narrow images are convolved side by side (models.Convolution): milliseconds of both networks' passes with
    and without that, {name: {"side by side" or "alone": the median of 20}}, measured in turn; elsewhere None."""
    if machine.device.type != "cpu" or machine.precision != "bf16" or not HAS_AMX:
        return None
    result = {}
    for name in models.ARCHITECTURES:
        step, times = training_step(machine, name), {"side by side": [], "alone": []}
        for _ in range(25):
            for way, taken in times.items():
                with patch.object(models, "HAS_AMX", way == "side by side"):
                    taken.append(seconds(step, machine))
        result[name] = {way: 1000 * statistics.median(taken[5:]) for way, taken in times.items()}
    return result


def student_step(machine, compiled):
    """Milliseconds of a student's forward and backward pass for one batch, the median of 20; None where it cannot be
    compiled."""
    try:
        step = training_step(machine, "student", compiled)
        return 1000 * statistics.median([seconds(step, machine) for _ in range(25)][5:])
    except Exception as error:  # a missing C++ compiler, say, must not cost the other measurements
        if not compiled:
            raise
        print(f"--compile could not be measured: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def start_up(images, repeats, device):
    """Seconds of the imports, and from the command to the first training step, of a teacher on `images` decoded
    before: two lists. The first step follows the first saved state."""
    imports, command = [], []
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        draws = np.random.default_rng(0)
        for number in range(images + 2):
            split = "train" if number < images else "test"
            folder = place / "images" / split / str(number % 2)
            folder.mkdir(parents=True, exist_ok=True)
            pixels = draws.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.jpg")
        words = [sys.executable, ROOT / "main.py", "--train-teacher", "--device", str(device), "--dataset", "folder"]
        words += ["--data-dir", place / "images", "--output-dir", place / "outputs"]
        state = place / "outputs" / "teacher-s0" / "state.pt"
        for _ in range(repeats + 1):
            started = time.perf_counter()
            with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
                while not state.exists() and process.poll() is None:
                    time.sleep(0.02)
                command.append(time.perf_counter() - started)
                if process.poll() is not None:
                    sys.exit("error: main.py ended before its first step.")
                process.kill()
            state.unlink()
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", "import main; main.import_modules()"], check=True, cwd=ROOT)
            imports.append(time.perf_counter() - started)
    return imports[1:], command[1:]  # the first of them decoded the images


def peak_memory(machine):
    """GB at the peak of a process that distils a student on 50,000 images: of a GPU's memory, in a whole epoch; else of
    the process, in a few steps."""
    loaded = noise(50_000, machine.device)
    teacher = models.create("teacher", CLASSES, 0).eval().to(**machine.place)
    ours = Ours(loaded, machine, teacher)
    if machine.device.type == "cuda":
        ours.epoch("kd", targets=ours.targets(fresh=True))
        print(torch.cuda.max_memory_allocated() / 1e9)
        return
    views = ours.views()
    network = models.create("student", CLASSES, 0).to(**machine.place)
    for indices in torch.arange(5 * BATCH).split(BATCH):
        images = views.batch(0, indices)
        with torch.inference_mode():
            soft = teacher(images)
        distillation_loss(network(images), loaded.train_labels[indices], soft, TEMPERATURE, ALPHA).backward()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="512 images and 1 repeat, start-up with 2,000 images; writes no file"
    )
    parser.add_argument("--images", type=int, default=None, help="an epoch's images [3,072; on a GPU 50,000]")
    parser.add_argument("--repeats", type=int, default=None, help="[3]")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--output", type=Path, metavar="FILE", help="[results/throughput-<device>.json]")
    parser.add_argument("--peak-memory", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    machine = start_machine(arguments.device, arguments.precision)  # memory is kept for the textbook loop as well
    device, precision = machine.device, machine.precision
    if arguments.peak_memory:
        peak_memory(machine)
        return
    images = arguments.images or (512 if arguments.quick else 3_072 if device.type == "cpu" else 50_000)
    repeats = arguments.repeats or (1 if arguments.quick else 3)
    loaded = noise(images, device)
    teacher = models.create("teacher", CLASSES, 0).eval().to(**machine.place)
    plain_teacher = models.create("teacher", CLASSES, 0).eval().to(device)
    ours = Ours(loaded, machine, teacher)

    def student():
        return models.create("student", CLASSES, 0)

    def textbook_comparison():
        for _ in range(3):
            textbook_epoch(loaded, device, student(), plain_teacher)
            textbook_epoch(loaded, device, student())

    kept = ours.targets(fresh=True)
    kept.epoch(0)
    measures = {  # name: (textbook, ours)
        "input pipeline": (lambda: sum(1 for _ in textbook_loader(loaded)), ours.input_pipeline),
        "teacher epoch": (
            lambda: textbook_epoch(loaded, device, models.create("teacher", CLASSES, 0)),
            lambda: ours.epoch("teacher"),
        ),
        "baseline epoch": (lambda: textbook_epoch(loaded, device, student()), lambda: ours.epoch("baseline")),
        "KD epoch, first": (
            lambda: textbook_epoch(loaded, device, student(), plain_teacher),
            lambda: ours.epoch("kd", targets=ours.targets(fresh=True)),
        ),
        "KD epoch, targets kept": (None, lambda: ours.epoch("kd", targets=kept)),
        "comparison of 3 seeds": (textbook_comparison, ours.comparison),
    }
    times = {name: {"textbook": [], "ours": []} for name in measures}
    peaks = []
    for repeat in range(repeats + 1):  # the first one warms up and is not counted
        for name, (textbook, own) in measures.items():
            if repeat == 0 and name == "comparison of 3 seeds":
                continue
            for loop, function in (("textbook", textbook), ("ours", own)):
                if function is not None:
                    taken = seconds(function, machine)
                    if repeat:
                        times[name][loop].append(taken)
        peaks.append(matmul_peak(machine))
        print(f"repeat {repeat} of {repeats} done", file=sys.stderr, flush=True)
    times["KD epoch, targets kept"]["textbook"] = times["KD epoch, first"]["textbook"]

    median = {name: {loop: statistics.median(taken) for loop, taken in each.items()} for name, each in times.items()}
    peak = statistics.median(peaks)
    steps = images // BATCH * BATCH
    shares = {
        name: 3 * models.costs(name, CLASSES, SIZE).macs * steps / median[f"{role} epoch"]["ours"] / peak
        for name, role in (("teacher", "teacher"), ("student", "baseline"))
    }
    decoded = 2_000 if arguments.quick else 50_000
    imports, first_step = start_up(decoded, repeats, device)
    result = {
        "command": f"python benchmarks/throughput.py --images {images} --repeats {repeats}"
        + (f" --output {arguments.output}" if arguments.output else ""),
        "environment": machine.environment(),
        "amx": device.type == "cpu" and HAS_AMX,
        "recipe": RECIPE,
        "student_step_ms": {name: student_step(machine, name == "compiled") for name in ("eager", "compiled")},
        "narrow_images_ms": narrow_images(machine),
        "images": images,
        "batch_size": BATCH,
        "textbook_workers": workers(device),
        "seconds": times,
        "ratios": {name: each["textbook"] / each["ours"] for name, each in median.items()},
        "kd_kept_over_baseline": median["KD epoch, targets kept"]["ours"] / median["baseline epoch"]["ours"],
        "start_up": {"images": decoded, "imports": imports, "command_to_first_step": first_step},
        "matmul_gflops": 2 * peak / 1e9,
        "share_of_matmul_peak": shares,
    }
    words = [sys.executable, __file__, "--peak-memory", "--device", str(device), "--precision", precision]
    kind = "peak_gpu_memory_gb" if device.type == "cuda" else "peak_memory_gb"
    result[f"{kind}_at_50000_images"] = float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)

    made_with = f"{result['environment']['device']}, {precision}, torch {torch.__version__}"
    print(f"\n{made_with}, {images:,} images an epoch, {repeats} repeat{'s' * (repeats > 1)}")
    print(f"{'seconds: median (smallest to largest)':<40}{'textbook':>24}{'ours':>24}{'ratio':>8}")
    for name, each in times.items():
        cells = (f"{statistics.median(t):.2f} ({min(t):.2f} to {max(t):.2f})" for t in (each["textbook"], each["ours"]))
        print(f"{name:<40}" + "".join(f"{cell:>24}" for cell in cells) + f"{result['ratios'][name]:>8.2f}")
    print(f"KD epoch with kept targets over a baseline epoch: {result['kd_kept_over_baseline']:.3f}")
    print(
        f"Matrix product: {result['matmul_gflops']:.0f} GFLOP/s; of it "
        + ", ".join(f"{k} training {v:.0%}" for k, v in shares.items())
    )
    print(
        f"Start-up with {decoded:,} images decoded before: {statistics.median(first_step):.1f} s from the command to "
        f"the first step, {statistics.median(imports):.1f} s of them imports"
    )
    step = result["student_step_ms"]
    compiled = f", with --compile {step['compiled']:.1f} ms" if step["compiled"] else ""
    print(f"Student's step, forward and backward: {step['eager']:.1f} ms{compiled}")
    for name, each in (result["narrow_images_ms"] or {}).items():
        print(f"Narrow images side by side: a {name}'s step {each['alone'] / each['side by side']:.2f} times as fast")
    print("Peak memory: " + ", ".join(f"{v:.2f} GB" for k, v in result.items() if k.startswith("peak_")))
    if not arguments.quick:
        path = arguments.output or ROOT / "results" / f"throughput-{device.type}.json"
        write_json(path, result)
        print(f"Written: {path}")


if __name__ == "__main__":
    try:
        main()
    except Failure as error:
        sys.exit(f"error: {error}")
