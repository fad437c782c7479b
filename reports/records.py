"""What an output folder keeps for its report: finished runs, the test set, and the teachers' test logits."""

import hashlib
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from runs.code import CODE
from runs.files import (
    Damaged,
    Failure,
    load_array,
    load_arrays,
    make_folder,
    read_json,
    save_arrays,
    verify_archive,
    write_json,
)
from runs.settings import PLAIN, RunRecord, SpeedRecord


class Key(NamedTuple):
    """What tells a finished run from the others of its comparison."""

    role: str
    temperature: float | None
    alpha: float | None
    seed: int
    variant: tuple | None

    @property
    def way(self):
        """How a student is distilled, apart from the seed."""
        return self.temperature, self.alpha, self.variant


@dataclass(frozen=True)
class FinishedRun(RunRecord):
    """The content of a finished run's run.json, and its folder."""

    folder: Path = Path()

    @property
    def key(self):
        s = self.settings
        return Key(s.role, s.temperature, s.alpha, s.seed, s.variant)

    def logits(self, shape):
        """The run's float32 test logits; raises Damaged unless they have `shape` and are finite."""
        path = self.folder / "test_logits.npy"
        return check_logits(path, load_array(path, self.test_logits_sha256), shape)


def finished_runs(folder, shared=PLAIN):
    """{Key: FinishedRun} of those in `folder` with this Settings.shared."""
    return {run.key: run for run in all_finished_runs(folder) if run.settings.shared == shared}


def all_finished_runs(folder):
    """The FinishedRuns of `folder`. A damaged run is left out and named on standard error; a copy under another name is
    left out silently."""
    runs = []
    for path in sorted(Path(folder).glob("*/run.json")):
        if (path.parent / "model.pt").is_file():
            try:
                record = read_json(path, RunRecord)
                missing = _missing(record)
                if record.finished and missing:
                    raise Damaged(f"{path} is damaged: it has no {' and no '.join(missing)}.")
            except Failure as error:
                print(f"left out: {error}", file=sys.stderr)
                continue
            if record.finished and path.parent.name == record.settings.name:
                runs.append(FinishedRun(**vars(record), folder=path.parent))
    return runs


def _missing(record):
    """The names of what a finished run's record should have and has not."""
    settings, costs = record.settings, record.costs or {}
    results = ["val_accuracy"] if settings.val_fraction else ["accuracy", "test_logits_sha256"]
    missing = [name for name in ("seconds", *results) if getattr(record, name) is None]
    missing += [f"costs of the {name}" for name in ("teacher", "student") if name not in costs]
    if settings.role == "kd":
        missing += [name for name in ("temperature", "alpha", "teacher") if getattr(settings, name) is None]
    if settings.unlabeled and "count" not in (record.images or {}).get("unlabeled", {}):
        missing.append("count of its images without labels")
    if settings.omit_class and not settings.val_fraction and record.omitted_bias is None:
        missing.append("omitted_bias")
    return missing


def best_pair(output, pairs, seeds, shared=PLAIN, variant=None):
    """The (temperature, alpha) of `pairs` with the best mean validation accuracy over `seeds`; the first of equals.
    `variant` is that of the students (Settings.variant)."""
    runs = finished_runs(Path(output) / "selection", shared)
    return max(pairs, key=lambda pair: np.mean([runs["kd", *pair, seed, variant].val_accuracy for seed in seeds]))


def comparable(one, other, apart=frozenset()):
    """Whether the settings of two students differ only in the seed and in what belongs to distillation (and in the
    names `apart`), and have the same teacher, and the same images without labels, where both have some."""
    varied = {"role", "temperature", "alpha", "teacher", "seed", "loss", "loss_file", "loss_sha256", "network_file"}
    varied |= {"unlabeled"}
    same = all(getattr(other, name) == value for name, value in vars(one).items() if name not in varied | apart)
    return same and all(
        len({getattr(each, name) for each in (one, other)} - {None}) < 2 for name in ("teacher", "unlabeled")
    )


def save_test_set(output, data_digest, images, labels, classes):
    """Keeps the test images, labels and class names, NumPy arrays, unless they are there."""
    path = _test_path(output, data_digest)
    if not _intact(path):
        make_folder(path.parent)
        save_arrays(path, images=images, labels=labels, classes=np.array(classes))


def save_teacher_logits(output, teacher_digest, data_digest, compute):
    """Keeps the test logits that `compute()` returns, a tensor, unless they are there, by this code of the networks."""
    path, code = _teacher_path(output, teacher_digest, data_digest), CODE["models.py"]
    if not _intact(path) or load_arrays(path).get("code", code) != code:
        make_folder(path.parent)
        save_arrays(path, logits=compute().cpu().numpy(), code=code)


def save_speed(output, teacher_digests, data_digest, place, precision, measure, network=None):
    """Keeps how fast a teacher (or several together) and the student are: what `measure()` returns, and where that was,
    `place`; unless it was measured there before in this `precision`, so that a repeated command says the same.
    `network` is the student's name and digest if it is of the user's own."""
    path, place = _speed_path(output, teacher_digests, data_digest, network), place | {"code": CODE["models.py"]}
    try:
        kept = path.is_file() and vars(read_json(path, SpeedRecord))
    except Damaged:
        kept = None
    if not kept or precision not in kept["student"] or any(kept[name] != value for name, value in place.items()):
        make_folder(path.parent)
        write_json(path, asdict(SpeedRecord(**place, **measure())))


def load_speed(output, teacher_digests, data_digest, network=None):
    """The SpeedRecord of a teacher (or several together) and its student, None where it was not measured; raises
    Damaged where the file is damaged."""
    path = _speed_path(output, teacher_digests, data_digest, network)
    speed = read_json(path, SpeedRecord) if path.is_file() else None
    if speed and not speed.teacher.keys() == speed.student.keys() >= {"fp32"}:
        raise Damaged(f"{path} is damaged: teacher and student have not the same precisions.")
    return speed


def load_test_set(output, data_digest, teacher_digests):
    """(images, labels, class names, [test logits of each teacher]) as kept; raises Failure where they are missing."""
    paths = [_test_path(output, data_digest), *(_teacher_path(output, each, data_digest) for each in teacher_digests)]
    for path in paths:
        if not path.is_file():
            raise Failure(
                f"{path} is missing. Run the command that trained the students again; it then writes this file."
            )
    try:
        path = paths[0]
        test = load_arrays(path)
        images, labels, classes = test["images"], test["labels"], test["classes"].tolist()
        logits = []
        for path in paths[1:]:
            logits.append(check_logits(path, load_arrays(path)["logits"], (len(labels), len(classes))))
    except KeyError as error:
        raise Damaged(f"{path} is damaged: {error} is missing.") from None
    return images, labels, classes, logits


def find_test_images(model, data_digest):
    """The test images of the data that a model was trained on, where the output folder of `model`, the path of its
    model.pt, keeps them: uint8 (N, S, S, 3); else None. Raises Damaged where they are damaged."""
    for folder in Path(model).resolve().parents[1:3]:  # a run's folder is in the output folder, or in its selection/
        path = _test_path(folder, data_digest or "")
        if path.is_file():
            return load_arrays(path).get("images")
    return None


def check_logits(path, logits, shape):
    """`logits` read from `path`; raises Damaged unless they have `shape`, are float32 and finite."""
    if logits.shape != shape or logits.dtype != np.float32 or not np.isfinite(logits).all():
        raise Damaged(f"{path} is damaged: it does not hold {shape[0]} x {shape[1]} logits.")
    return logits


def _intact(path):
    try:
        if path.is_file():
            verify_archive(path)  # which holds no more than a part of it in memory
            return True
    except Damaged:
        pass
    return False


def _test_path(output, data_digest):
    return Path(output) / "data" / f"test-{data_digest[:16]}.npz"


def _teacher_path(output, teacher_digest, data_digest):
    return Path(output) / "data" / f"teacher-{teacher_digest[:16]}-{data_digest[:16]}.npz"


def _speed_path(output, teacher_digests, data_digest, network):
    one = len(teacher_digests) == 1
    teacher = teacher_digests[0] if one else hashlib.sha256("+".join(teacher_digests).encode()).hexdigest()
    name, digest = network or ("", "")
    student = "".join(f"-{part}" for part in (name, digest[:16]) if part)
    return Path(output) / "data" / f"speed-{teacher[:16]}-{data_digest[:16]}{student}.json"
