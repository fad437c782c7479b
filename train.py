"""One loop for teacher, distilled student and baseline; evaluation; a run kept in its folder.

A run's draws are functions of its settings and the epoch, and its state is kept at the end of every epoch and every few
minutes within long ones: killed anywhere and started again, it ends with the same bits.
"""

import csv
import importlib.metadata
import io
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import models
from data import VIEWS_VERSION, Views, split
from distill import DTYPES, INFERENCE_BATCH, describe, distillation_loss, precision_context, predict
from files import (
    Damaged,
    Failure,
    Interrupted,
    Stop,
    load_checkpoint,
    make_folder,
    read_json,
    remove,
    run_name,
    save_array,
    save_checkpoint,
    write,
    write_json,
)  # fmt: skip
from models import generator
from muon import Muon

VERSION = "1.0.0"  # of the program
RECIPE = 3  # of the networks, schedule, optimiser and initial weights: a run of another recipe is another run
STATE_FORMAT = 2
STATES = ("state.pt", "state-before.pt")  # of an unfinished run, the newest first
MOMENTUM = 0.9
WARMUP = 0.2  # of all steps; the rest is a linear decay to zero
REFRESH = 0.25  # seconds between progress figures
HISTORY = (
    "epoch", "train_loss", "train_accuracy", "val_accuracy", "learning_rate", "seconds", "teacher_seconds",
    "images_per_second",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What identifies a run: with all of it equal, a run's weights are equal. `data` and `teacher` are digests, those
    of several teachers sorted and joined by "+"."""

    role: str  # "teacher", "kd" or "baseline"
    data: str
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    seed: int
    image_size: int
    val_fraction: float = 0.0
    temperature: float | None = None
    alpha: float | None = None
    teacher: str | None = None
    recipe: int = RECIPE
    views: int = VIEWS_VERSION

    @property
    def architecture(self):
        return "teacher" if self.role == "teacher" else "student"

    @property
    def name(self):
        """The run's folder: teacher-s0, kd-T4-a0.1-s0, baseline-s0."""
        return run_name(self.as_dict())

    def as_dict(self):
        return asdict(self) | {"architecture": self.architecture}


def default_learning_rate(batch_size):
    """The peak learning rate for a batch size: 0.2 at 128, and with the square root of the size for others, which went
    better than in proportion to it, for batches of 32 and of 512 (results/README.md)."""
    return 0.2 * (batch_size / 128) ** 0.5


def schedule(step, steps):
    """The share of the peak learning rate at `step` of `steps` (from 0): linear warm-up, then linear decay."""
    warmup = WARMUP * steps
    return min(1.0, (step + 1) / max(1.0, warmup), (steps - step) / max(1.0, steps - warmup))


def differences(found: Mapping, wanted: Mapping):
    """What differs between a run's settings and those wanted, in words; a setting that is missing differs."""
    words = []
    for name, value in wanted.items():
        if name not in found or found[name] != value:
            label = name.replace("_", " ")
            if name in ("data", "teacher"):
                words.append(f"another {label if name == 'teacher' else 'data set'}")
            else:
                words.append(f"{label} {found.get(name, 'unknown')} instead of {value}")
    return words


def refuse_other_settings(folder, found, wanted):
    """Raises Failure where a run's settings are not those asked for."""
    words = differences(found, wanted)
    if words:
        raise Failure(
            f"{folder} holds a run with other settings: {', '.join(words)}.\n"
            "Add --overwrite to train all runs of this command anew, remove that folder to train only this one, or "
            "choose another --output-dir."
        )


def refuse_other_way(folder, found, here):
    """Raises Failure where an unfinished run was begun in another way than `here` (see Trainer.way)."""
    words = differences(found, here)
    if words:
        raise Failure(
            f"{folder} was begun elsewhere: {', '.join(words)}. Continue it there "
            f"(--device {found['device']} --precision {found['precision']} "
            f"--{'' if found['compiled'] else 'no-'}compile), or remove that folder to train it anew."
        )


def environment(device, precision, compiled=False):
    """What a run was made with; recorded, not compared."""
    versions = {name: importlib.metadata.version(name) for name in ("torchvision", "scipy", "matplotlib", "pillow")}
    return {
        "program": VERSION,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        **versions,
        "system": platform.platform(),
        "device": describe(device),
        "device_type": device.type,
        "precision": precision,
        "compiled": compiled,
        "threads": torch.get_num_threads(),
    }


def accuracy(logits, labels):
    """The share of rows of `logits` (N, classes) whose largest entry is at the label (N,): a float from 0 to 1."""
    return (logits.argmax(1) == labels).sum().item() / len(labels)


def evaluate(network, pictures, mean, std):
    """The float32 logits (N, classes) of uint8 pictures (N, S, S, 3), uncropped and unflipped, in large batches; in
    float32 whatever the training's precision: bfloat16 rounds logits so far that ties decide pictures."""
    training = network.training
    network.eval()
    parts = pictures.split(INFERENCE_BATCH[pictures.device.type])
    logits = predict(network, (models.normalise(part, mean, std) for part in parts), "fp32")
    network.train(training)
    return logits


def compile_network(network):
    """The network as one compiled function; on CUDA its kernels are launched together, as CUDA graphs. Which kernels
    is decided by trying, there: two compiled runs on a GPU may differ in last bits."""
    device = next(network.parameters()).device.type
    return torch.compile(network, mode="reduce-overhead" if device == "cuda" else "default")


def is_finished(folder):
    """Whether a run's folder holds a model.pt (which is the last file that a run writes)."""
    return (Path(folder) / "model.pt").exists()


def finished(folder, wanted=None):
    """The verified content of a finished run's model.pt; refused where its settings are not those `wanted`."""
    try:
        content, record = models.read(Path(folder) / "model.pt"), Path(folder) / "run.json"
        if not record.is_file() or not read_json(record).get("finished"):
            raise Damaged(f"{record} is not there or does not belong to the finished model.pt beside it.")
    except Damaged as error:
        raise Damaged(f"{error}\nPut a whole copy in its place, or remove {folder} to train it anew.") from None
    if wanted is not None:
        refuse_other_settings(folder, content["settings"], wanted.as_dict())
    return content


def reset(folder):
    """Takes a run's files away, so that it is trained anew; model.pt first, without which a run is not finished."""
    names = ("model.pt", *STATES, "run.json", "history.csv", "test_logits.npy")
    remove(*(Path(folder) / name for name in names))


class Trainer:
    """What runs share: the data on its device, the precision, how often (in seconds) state is kept within epochs."""

    def __init__(self, data, device, precision="fp32", save_every=120.0, stop=None, recorded=None, compiled=False):
        """`recorded` is a dict that run.json keeps: what a run was made from, but is not identified by."""
        self.data, self.device, self.precision, self.compiled = data, device, precision, compiled
        self.save_every, self.stop, self.recorded = save_every, stop or Stop(), recorded or {}
        self.later = 0  # pictures that runs after this one will train on, for the time left
        self.threads = torch.get_num_threads()
        self._views = {}
        if device.type == "cuda":  # the same bits again, and full float32 where that is asked for
            torch.backends.cudnn.deterministic = True
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cuda.matmul.allow_tf32 = False

    @property
    def way(self):
        """How a run is trained, which does not identify it; but one that is begun in one way ends in it."""
        return {"device": self.device.type, "precision": self.precision, "compiled": self.compiled}

    def look(self, folder, settings):
        """Raises Failure where `folder` holds a run that `train` would refuse to reuse or continue as `settings`, or a
        finished one that is damaged."""
        record = folder / "run.json"
        if is_finished(folder):
            finished(folder, settings)
        elif record.is_file() and any((folder / name).is_file() for name in STATES):
            content = read_json(record)
            found, made = (content.get(name) for name in ("settings", "environment"))
            refuse_other_settings(folder, found if isinstance(found, dict) else {}, settings.as_dict())
            if isinstance(made, dict) and made.keys() >= {"device_type", "precision", "compiled"}:
                refuse_other_way(folder, made | {"device": made["device_type"]}, self.way)

    def fits(self, folder, settings):
        """Whether `look` finds nothing against `folder`."""
        try:
            self.look(folder, settings)
        except Failure:
            return False
        return True

    def views(self, purpose="views"):
        """The training set's views: one stream for students, one for the teacher."""
        if purpose not in self._views:
            self._views.clear()  # a teacher and its students are not trained by the same command but for --demo
            self._views[purpose] = Views(self.data.train_pictures, self.data.mean, self.data.std, purpose)
        return self._views[purpose]

    def train(self, folder, settings, targets=None, title=""):
        """Trains the run `settings` in `folder`, or continues or reuses what is there; returns its accuracy (on the
        test set, or on the validation part where there is one).

        `targets` are the teachers' distill.Ensemble, for a distilled student with alpha above 0. Raises Failure where
        the folder holds a run with other settings (see `reset`) or where the training diverges, and Interrupted, with
        the state kept, on a signal.
        """
        return _Run(self, Path(folder), settings, targets, title or settings.name).train()


class _Run:
    """One run while it is being trained."""

    def __init__(self, trainer, folder, settings, targets, title):
        self.trainer, self.folder, self.settings, self.targets = trainer, folder, settings, targets
        self.title = title
        self.data, self.device = trainer.data, trainer.device
        self.state_path, self.previous_path = (folder / name for name in STATES)
        self.machines = [describe(self.device)]

    def train(self):
        settings = self.settings
        if is_finished(self.folder):
            content = finished(self.folder, settings)
            remove(self.state_path, self.previous_path)
            return content["accuracy"]
        rows, validation = split(self.data.train_labels, settings.val_fraction)
        self.rows, self.validation = rows.to(self.device), validation.to(self.device)
        self.batch_size = min(settings.batch_size, len(rows))
        self.steps = len(rows) // self.batch_size
        self.views = self.trainer.views("teacher views" if settings.role == "teacher" else "views")
        self.network = models.create(settings.architecture, len(self.data.classes), settings.seed)
        self.network = self.network.to(self.device, memory_format=torch.channels_last).train()
        self.forward = compile_network(self.network) if self.trainer.compiled else self.network
        dtype = DTYPES[self.trainer.precision]
        self.optimiser = Muon(self.network, settings.learning_rate, settings.weight_decay, MOMENTUM, dtype)
        torch.set_num_threads(self.trainer.threads)
        self.kept = None  # the epoch and step of the state on the disk
        try:
            self._begin()
            self._epochs()
            return self._finish()
        except Interrupted as error:
            raise Interrupted(error.signal_number, self._how_far()) from None

    def _how_far(self):
        if self.kept is None:
            return f"Stopped {self.folder.name} before its first step."
        epoch, step = self.kept
        where = f"epoch {epoch} of {self.settings.epochs}"
        if step:
            where += f" and step {step} of {self.steps} of the next"
        return f"Stopped {self.folder.name}; its state after {where} is kept."

    # State ------------------------------------------------------------------------------------------------------

    def _begin(self):
        self.epoch, self.step, self.history = 0, 0, []
        self._clear_sums()
        state = self._read_state()
        if state is not None:
            self._restore(state)
            return
        make_folder(self.folder)
        self._save_progress()
        self._save()

    def _clear_sums(self):
        self.loss_sum = torch.zeros((), device=self.device)
        self.correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=self.device)
        self.seconds = self.teacher_seconds = 0.0

    def _content(self):
        return {
            "format": STATE_FORMAT,
            "settings": self.settings.as_dict(),
            **self.trainer.way,
            "machines": self.machines,
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
            "epoch": self.epoch,
            "step": self.step,
            "history": self.history,
            "loss_sum": self.loss_sum,
            "correct": self.correct,
            "seconds": self.seconds,
            "teacher_seconds": self.teacher_seconds,
            "network": dict(self.network.state_dict()),
            "optimiser": self.optimiser.state_dict(),
        }

    def _save(self):
        """Keeps the state, and the one before it. `_check` comes first: state that is not finite is never kept."""
        save_checkpoint(self.state_path, self._content(), keep=self.previous_path)
        self.kept = self.epoch, self.step
        self.saved_at = time.monotonic()

    def _save_progress(self):
        """What tells a person, or the program before it loads PyTorch, how far the run is."""
        write_json(
            self.folder / "run.json",
            {
                "finished": False,
                **self._record(),
            },
        )

    def _record(self):
        return {
            "epochs_done": self.epoch,
            "settings": self.settings.as_dict(),
            "environment": environment(self.device, self.trainer.precision, self.trainer.compiled)
            | {"device": ", then ".join(self.machines)},
            "recorded": self.trainer.recorded,
        }

    def _read_state(self):
        """The newest state that is whole, or None where there is none at all."""
        broken = None
        for path in (self.state_path, self.previous_path):
            if not path.exists():
                continue
            try:
                state = load_checkpoint(path)
                self._verify(state, path)
            except Damaged as error:
                broken = error
                tqdm.write(f"{error}", file=sys.stderr)
                continue
            if broken:
                tqdm.write(f"The run is continued from the state before it, {path}.", file=sys.stderr)
                remove(self.state_path)  # so that it never takes the place of the one that is whole
            return state
        if broken:
            raise Damaged(f"{broken}\nNo earlier state is whole. Remove {self.folder} to train it anew.")
        return None

    def _verify(self, state, path):
        """Raises Damaged unless `state` is one that `_content` could have made; other settings are not damage."""
        if type(state.get("format")) is not int or state["format"] != STATE_FORMAT:
            raise Damaged(f"{path} has format {state.get('format')!r}, but this version reads {STATE_FORMAT}.")
        kinds = {
            "settings": dict, "device": str, "precision": str, "compiled": bool, "threads": int, "torch": str,
            "epoch": int, "step": int, "history": list, "loss_sum": torch.Tensor, "correct": torch.Tensor,
            "seconds": float, "teacher_seconds": float, "network": dict, "optimiser": dict,
        }  # fmt: skip
        for name, kind in kinds.items():
            if type(state.get(name)) is not kind:
                raise Damaged(f"{path} is damaged: its '{name}' is missing or not a {kind.__name__}.")
        refuse_other_settings(self.folder, state["settings"], self.settings.as_dict())
        epoch, history = state["epoch"], state["history"]
        machines = state.get("machines", self.machines)  # which earlier versions did not keep
        if not (
            0 <= epoch <= self.settings.epochs
            and 0 <= state["step"] < self.steps
            and [row.get("epoch") if isinstance(row, dict) else None for row in history] == [*range(1, epoch + 1)]
            and all(set(row) == set(HISTORY) for row in history)
            and 1 <= state["threads"] <= 4096
            and isinstance(machines, list)
            and machines
            and all(isinstance(machine, str) for machine in machines)
        ):
            raise Damaged(f"{path} is damaged: its epoch, step, history, threads or machines cannot be.")
        models.verify_weights(state["network"], self.network.state_dict(), path)

    def _restore(self, state):
        refuse_other_way(self.folder, state, self.trainer.way)
        (here,), before = self.machines, state.get("machines", self.machines)
        if before[-1] != here:
            tqdm.write(f"{self.folder} was begun on {before[-1]}; on {here} last bits may differ.", file=sys.stderr)
            self.machines = [*before, here]
        else:
            self.machines = before
        if state["torch"] != torch.__version__:
            tqdm.write(
                f"{self.folder} was begun with torch {state['torch']}; with {torch.__version__} last bits may differ.",
                file=sys.stderr,
            )
        try:
            self.network.load_state_dict(state["network"])
            own = [{k: v for k, v in group.items() if k != "params"} for group in self.optimiser.param_groups]
            self.optimiser.load_state_dict(state["optimiser"])
            for group, mine in zip(self.optimiser.param_groups, own, strict=True):
                group.update(mine)
            torch.set_num_threads(state["threads"])
            self.epoch, self.step, self.history = state["epoch"], state["step"], state["history"]
            self.loss_sum.copy_(state["loss_sum"])
            self.correct.copy_(state["correct"])
            self.seconds, self.teacher_seconds = state["seconds"], state["teacher_seconds"]
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise Damaged(
                f"The state in {self.folder} does not fit this run: {error}. Remove that folder to train it anew."
            ) from error
        self.kept = self.epoch, self.step
        self.saved_at = time.monotonic()

    # Training ---------------------------------------------------------------------------------------------------

    def _epochs(self):
        settings, stop = self.settings, self.trainer.stop
        total = settings.epochs * self.steps * self.batch_size
        done = (self.epoch * self.steps + self.step) * self.batch_size
        with tqdm(
            desc=self.title,
            total=total,
            initial=done,
            unit=" pictures",
            unit_scale=True,
            disable=None,
            mininterval=REFRESH,
        ) as self.bar:
            while self.epoch < settings.epochs:
                soft = self._soft_targets()
                with stop.deferred():
                    self._one_epoch(soft)
                stop.raise_pending()

    def _soft_targets(self):
        if self.targets is None:
            return None
        started = time.perf_counter()
        soft = self.targets.epoch(self.epoch, f"{self.title}: soft targets of epoch {self.epoch + 1}")
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # so that this is the teacher's time, and not the student's
        self.teacher_seconds += time.perf_counter() - started
        return soft

    def _one_epoch(self, soft):
        settings, stop, size = self.settings, self.trainer.stop, self.batch_size
        if self.views.epoch != self.epoch:
            self.views.start(self.epoch)
        stream = "teacher order" if settings.role == "teacher" else "order"
        order = torch.randperm(len(self.rows), generator=generator(stream, settings.seed, self.epoch))
        order = self.rows[order.to(self.device)]
        begun = time.perf_counter() - self.seconds
        shown = 0.0
        while self.step < self.steps:
            batch = order[self.step * size : (self.step + 1) * size]
            self._step(batch, soft)
            self.step += 1
            self.bar.update(size)
            now = time.monotonic()
            if now - shown >= REFRESH:
                shown = now
                self._check()
                if not self.bar.disable:
                    self._show()
            if self.step < self.steps and (
                stop.signal_number is not None or now - self.saved_at >= self.trainer.save_every
            ):
                self.seconds = time.perf_counter() - begun
                self._check(weights=True)
                self._save()
                if stop.signal_number is not None:
                    return
        self._check(weights=True)  # waits for the device before the time is taken
        self.seconds = time.perf_counter() - begun
        self._end_of_epoch()

    def _step(self, batch, soft):
        settings = self.settings
        rate = settings.learning_rate * schedule(self.epoch * self.steps + self.step, settings.epochs * self.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        labels = self.data.train_labels[batch]
        with precision_context(self.device, self.trainer.precision):
            logits = self.forward(self.views.batch(batch))
        if soft is None:
            loss = F.cross_entropy(logits.float(), labels)
        else:
            loss = distillation_loss(logits, labels, soft[batch], settings.temperature, settings.alpha)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        with torch.no_grad():
            self.loss_sum += loss.detach()
            self.correct += (logits.argmax(1) == labels).sum()
            self.first_bad = torch.where((self.first_bad < 0) & ~loss.isfinite(), self.step, self.first_bad)

    def _end_of_epoch(self):
        pictures = self.steps * self.batch_size
        row = {
            "epoch": self.epoch + 1,
            "train_loss": self.loss_sum.item() / self.steps,
            "train_accuracy": self.correct.item() / pictures,
            "val_accuracy": self._validation_accuracy(),
            "learning_rate": self.optimiser.param_groups[0]["lr"],
            "seconds": self.seconds,
            "teacher_seconds": self.teacher_seconds,
            "images_per_second": pictures / self.seconds,
        }
        self.history = [*self.history, row]
        self.epoch, self.step = self.epoch + 1, 0
        self._clear_sums()
        self._save()
        self._save_history()
        self._save_progress()

    def _validation_accuracy(self):
        if not len(self.validation):
            return None
        pictures, labels = self.data.train_pictures[self.validation], self.data.train_labels[self.validation]
        return accuracy(evaluate(self.network, pictures, self.data.mean, self.data.std), labels)

    def _check(self, weights=False):
        """Raises Failure where a loss was not finite, or (if `weights`) what would be kept is not."""
        bad = self.first_bad.item()
        if bad < 0 and weights:
            momenta = (each["momentum_buffer"] for each in self.optimiser.state.values())
            if not models.is_finite(self.network.state_dict()) or not all(m.isfinite().all() for m in momenta):
                bad = self.step - 1
        if bad < 0:
            return
        step, rate = bad, self.settings.learning_rate
        raise Failure(
            f"{self.folder.name} diverged: its loss or weights were not finite at step {step + 1} of {self.steps} of "
            f"epoch {self.epoch + 1} of {self.settings.epochs}.\nThe last good state is kept. "
            f"Try a smaller learning rate: --lr {rate / 4:.3g} --overwrite (it was {rate:.3g})."
        )

    def _show(self):
        seen = self.step * self.batch_size
        postfix = {
            "epoch": f"{self.epoch + 1}/{self.settings.epochs}",
            "loss": f"{self.loss_sum.item() / self.step:.3f}",
            "acc": f"{self.correct.item() / seen:.3f}",
        }
        if self.trainer.later and (rate := self.bar.format_dict["rate"]):
            left = (self.bar.total - self.bar.n + self.trainer.later) / rate
            postfix["all"] = f"{tqdm.format_interval(left)} left"
        self.bar.set_postfix(postfix, refresh=False)

    # End --------------------------------------------------------------------------------------------------------

    def _save_history(self):
        text = io.StringIO()
        table = csv.DictWriter(text, HISTORY, lineterminator="\n")
        table.writeheader()
        table.writerows(self.history)
        write(self.folder / "history.csv", text.getvalue())

    def _finish(self):
        """Reads the test set, once, and writes what a finished run holds; model.pt, which makes it finished, last."""
        settings, data = self.settings, self.data
        self._save_history()
        record = {
            "finished": True,
            **self._record(),
            "seconds": sum(row["seconds"] + row["teacher_seconds"] for row in self.history),
            "costs": {
                name: dict(
                    zip(("parameters", "macs"), models.costs(name, len(data.classes), data.image_size), strict=True)
                )
                for name in models.ARCHITECTURES
            },
        }
        if settings.val_fraction:
            result = self.history[-1]["val_accuracy"]
            record["val_accuracy"] = result
        else:
            logits = evaluate(self.network, data.test_pictures, data.mean, data.std)
            result = record["accuracy"] = accuracy(logits, data.test_labels)
            record["test_logits_sha256"] = save_array(self.folder / "test_logits.npy", logits.cpu().numpy())
        record["weights_sha256"] = models.digest(self.network.state_dict())
        write_json(self.folder / "run.json", record)
        models.save(
            self.folder / "model.pt",
            self.network,
            settings.architecture,
            classes=data.classes,
            image_size=data.image_size,
            mean=data.mean,
            std=data.std,
            settings=settings.as_dict(),
            accuracy=result,
        )
        remove(self.state_path, self.previous_path)
        return result
