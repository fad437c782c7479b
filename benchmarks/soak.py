"""Kills the program at seeded moments, flips bits in what it wrote, and compares with an untouched run.

    python benchmarks/soak.py --kills 60 --flips 600

A kill is a SIGKILL to the program: half of them at a random moment of training (the state is saved after every step
here), half of them inside a file write, at a random call of fsync or rename. The same command then resumes. At the end
weights, test logits, history (its timing columns aside) and the printed block must be those of the untouched run, byte
for byte. A flip is one changed bit in model.pt or state.pt: it must be refused, or harmless. Ends with exit status 1 at
any difference.

    python benchmarks/soak.py --images 10000

makes odd image files instead, of nearly every mode and format, cut short, misnamed, with much metadata or many frames
(odd_images.py): each must become the right pixels or be named as damaged, and nothing else.

The untouched run is `python main.py` itself. What is killed is the same program in a child of this process, which has
imported PyTorch already: that saves seconds for every kill. Not for Windows, which has no fork.
"""

import argparse
import contextlib
import csv
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

TIMING = {"seconds", "teacher_seconds", "images_per_second"}


def commands(images, output, epochs=5):
    """The words of the user's two commands, on small images and with a state saved after every step."""
    words = [
        "--dataset", "folder", "--data-dir", str(images), "--image-size", "16", "--epochs", str(epochs),
        "--batch-size", "16", "--alpha", "0.5", "--device", "cpu", "--save-every", "0", "--output-dir", str(output),
    ]  # fmt: skip
    return [[*words, "--train-teacher"], words]


def start(words):
    """main.py as a process of its own."""
    command = [sys.executable, str(ROOT / "main.py"), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def finish(process):
    """Standard output of a process that must succeed."""
    printed, errors = process.communicate()
    if process.returncode != 0 or "Traceback" in errors:
        raise AssertionError(f"exit status {process.returncode} after: {errors}")
    return printed


def outcome(output, printed):
    """All of an output folder that must not depend on interruptions, by name."""
    found = {"printed block": re.search(r"Training Parameters:.*?%\n", printed, re.DOTALL)[0]}
    for folder in sorted(path.parent for path in Path(output).glob("*/model.pt")):
        for name in ("model.pt", "test_logits.npy"):
            found[f"{folder.name}/{name}"] = (folder / name).read_bytes()
        with open(folder / "history.csv") as file:
            rows = [{k: v for k, v in row.items() if k not in TIMING} for row in csv.DictReader(file)]
        found[f"{folder.name}/history.csv"] = json.dumps(rows)
        found[f"{folder.name}/files"] = sorted(path.name for path in folder.iterdir())
    return found


def import_program():
    """Imports what children would otherwise import each, and leaves out what is not compared: figures and speeds."""

    import main
    import reports.report  # noqa: F401 (which the program imports at its end)
    from reports import figures
    from runs import speed

    main.import_modules()
    figures.draw, speed.SPEED_SECONDS = (lambda comparison: []), 0


def child(words, log, kill_at_call=None):
    """The program in a forked child of this process: a multiprocessing.Process. Its standard output and error go to the
    files `log`.out and `log`.err. It kills itself at its n-th call of fsync or rename, if `kill_at_call` is n: with a
    file half made, or between two renames."""
    import main
    from runs.command import exit_status

    def work():
        for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
            with open(f"{log}.{name}", "w") as file:
                os.dup2(file.fileno(), stream.fileno())
        if kill_at_call:
            kill_in_a_write(kill_at_call)
        sys.exit(exit_status(main.main, words))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def kill_in_a_write(calls):
    """Kills this process at its n-th call of fsync or rename."""
    left = calls

    def counting(original):
        def call(*arguments):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments)

        return call

    os.fsync, os.replace = counting(os.fsync), counting(os.replace)


def survive(images, output, moments, epochs=5):
    """Runs both commands to their ends, each time killed at the next of `moments`, until none is left.

    A float is a time: so many seconds after the first state that the process saves. A whole number n is the n-th call
    of fsync or rename. Returns the outcome, the kills, and those of them inside a file write.
    """
    kills = inside = 0
    moments, log = list(moments), Path(output).with_suffix(".log")
    for words in commands(images, output, epochs):
        while True:
            moment = moments[0] if moments else None
            in_a_write = isinstance(moment, int)
            before = newest(output)
            process = child(words, log, moment if in_a_write else None)
            if isinstance(moment, float):
                while newest(output) == before and process.is_alive():
                    time.sleep(0.01)
                process.join(moment)
                process.kill()
            process.join()
            if process.exitcode == -signal.SIGKILL:
                moments.pop(0)
                kills += 1
                inside += in_a_write
                continue
            errors = Path(f"{log}.err").read_text()
            if process.exitcode != 0 or "Traceback" in errors:
                raise AssertionError(f"exit status {process.exitcode} after {kills} kills: {errors}")
            break
    return outcome(output, Path(f"{log}.out").read_text()), kills, inside


def newest(output):
    """The time of the newest state in an output folder."""
    times = []
    for path in Path(output).glob("*/state.pt"):
        with contextlib.suppress(FileNotFoundError):
            times.append(path.stat().st_mtime_ns)
    return max(times, default=0)


def differences(found, expected):
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def same(one, other):
    """Whether two loaded checkpoints hold the same values, bit for bit."""
    import torch

    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def flip_bits(path, count, seed=0):
    """Flips `count` bits of a file, one at a time: half of them anywhere, half in the archive's pickle and directories,
    where a flip changes more than a weight. Returns (refused, harmless, wrong), the last a list of positions."""
    from runs.checkpoints import load_checkpoint
    from runs.files import Damaged

    draws = random.Random(seed)
    whole = Path(path).read_bytes()
    expected = load_checkpoint(path)
    broken = Path(path).with_suffix(".flipped")
    refused, harmless, wrong = 0, 0, []
    for number in range(count):
        position = draws.randrange(len(whole))
        if number % 2:
            position = draws.choice([draws.randrange(6000), len(whole) - 1 - draws.randrange(12_000)]) % len(whole)
        content = bytearray(whole)
        content[position] ^= 1 << draws.randrange(8)
        broken.write_bytes(content)
        try:
            if same(load_checkpoint(broken), expected):
                harmless += 1
            else:
                wrong.append(position)
        except Damaged:
            refused += 1
    broken.unlink()
    return refused, harmless, wrong


def unfinished_state(images, output):
    """Stops a command in its middle and returns the path of its state.pt."""
    process = child(commands(images, output, epochs=50)[0], Path(output).with_suffix(".log"))
    folder = Path(output) / "teacher-s0"
    while not (folder / "history.csv").exists() and process.is_alive():  # there after the first epoch
        time.sleep(0.05)
    process.terminate()
    process.join()
    return folder / "state.pt"


def check_images(count, seed, folder):
    """Decodes `count` odd files (odd_images.py), all in one folder, as the program does. Returns how many became the
    right pixels, how many were named as damaged, and a list of what went wrong: other pixels, a good image refused, one
    that is none taken, or words on standard error (libtiff's own aside, which Pillow lets through)."""
    from odd_images import SIZE, fuzz

    from sources import kept
    from sources.listing import find_images

    folder.mkdir(parents=True)
    files = {os.path.join(folder, os.fsdecode(odd.name)): odd for odd in fuzz(count, seed)}
    for path, odd in files.items():
        Path(path).write_bytes(odd.content)
        odd.content = b""
    paths = find_images(folder).paths
    wrong = [f"passed over: {path!r}" for path in sorted(files.keys() - set(paths))]
    keys = kept.file_keys(folder, paths)
    with tempfile.TemporaryFile() as errors:
        usual = os.dup(2)
        os.dup2(errors.fileno(), 2)
        try:
            decoded = kept.load(paths, keys, SIZE, 2, folder.with_name("kept.npy"))
        finally:
            os.dup2(usual, 2)
        errors.seek(0)
        wrong += [f"said: {line!r}" for line in errors.read().splitlines() if not line.startswith(b"TIFF")]
    images = dict(zip(decoded.record.keys, decoded.images, strict=True))
    right = 0
    for path, key in zip(paths, keys, strict=True):
        odd = files[path]
        if key in decoded.damaged:
            if odd.expected is not None and not odd.may_fail:
                wrong.append(f"refused: {odd.kind} {path!r} {decoded.damaged[key]}")
        elif odd.expected is None:
            wrong.append(f"taken: {odd.kind} {path!r}")
        elif abs(images[key] - odd.expected).max() > odd.tolerance:
            wrong.append(f"other pixels: {odd.kind} {path!r}, by {abs(images[key] - odd.expected).max():.0f}")
        else:
            right += 1
    return right, len(decoded.damaged), wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--flips", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=5, help="of each run that is killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=1.0, help="seconds of training before a kill, at most")
    parser.add_argument("--images", type=int, metavar="N", help="decode N odd image files instead of any kill or flip")
    arguments = parser.parse_args()
    if arguments.images:
        with tempfile.TemporaryDirectory(prefix="soak-") as folder:
            right, named, wrong = check_images(arguments.images, arguments.seed, Path(folder) / "images")
        print("".join(f"{line}\n" for line in wrong[:50]), end="")
        print(f"{arguments.images} odd images: {right} became the right pixels, {named} were named, {len(wrong)} WRONG")
        return int(bool(wrong))
    from conftest import make_images

    draws, epochs = random.Random(arguments.seed), arguments.epochs
    top = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        images = make_images(top / "images")
        teacher, students = commands(images, top / "untouched", epochs)
        untouched = start(teacher)
        import_program()  # meanwhile
        finish(untouched)
        expected = outcome(top / "untouched", finish(start(students)))
        kills = inside = bad = rounds = 0
        while kills < arguments.kills:
            count = min(20, arguments.kills - kills)
            moments = [m for _ in range(count) for m in (draws.uniform(0, arguments.longest), draws.randint(1, 40))]
            found, hits, writes = survive(images, top / "killed", moments[:count], epochs)
            odd = differences(found, expected)
            kills, inside, bad, rounds = kills + hits, inside + writes, bad + len(odd), rounds + 1
            print(
                f"round {rounds}: {kills} kills, {inside} inside a file write, differences: {odd or 'none'}", flush=True
            )
            shutil.rmtree(top / "killed")
        state = unfinished_state(images, top / "stopped")
        for path in (top / "untouched" / "teacher-s0" / "model.pt", state):
            refused, harmless, wrong = flip_bits(path, arguments.flips // 2, arguments.seed)
            bad += len(wrong)
            print(f"{path.name}: {refused} flips refused, {harmless} harmless, other weights in silence: {len(wrong)}")
        print(f"{kills} kills and {arguments.flips // 2 * 2} flips survived" if not bad else f"{bad} DIFFERENCES")
        return int(bad > 0)
    finally:
        shutil.rmtree(top)


if __name__ == "__main__":
    sys.exit(main())
