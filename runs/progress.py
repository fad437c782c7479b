"""How far a run is: its counters and sums, the state that is saved, what is shown, and its end."""

import contextlib
import sys
import time
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from tqdm import tqdm

import models
from runs.code import CODE, changed, resumed
from runs.files import Damaged, Failure, make_folder, remove, save_array, write, write_json
from runs.machine import describe
from runs.settings import VERSION, RunRecord
from runs.signals import Interrupted, Stop
from runs.state import HistoryRow, State, as_csv, load_state, save_state

REFRESH = 0.25  # seconds between progress figures


@dataclass(frozen=True)
class Options:
    """What all runs of a command share besides the machine: seconds between saved states within an epoch, the signal
    handler, what run.json records without comparing it (what was typed, and what the images are), and the Costs of
    "teacher" and "student", and of all "teachers" together, if they are known."""

    save_every: float = 120.0
    stop: Stop = field(default_factory=Stop)
    recorded: dict = field(default_factory=dict)
    images: dict | None = None
    costs: dict | None = None


class Progress:
    """The progress of one run; a context manager that resumes what its folder holds, or begins.

    The training loop takes its batches from here and adds each step's result; sums stay on the device until they are
    shown or saved. State is saved before the first step, at the end of every epoch, every `options.save_every` seconds
    within long ones and on a signal.
    """

    def __init__(self, run, network, optimizer, machine, options, images, title, later=0, tally=None):
        """`images` is the number of images with labels in an epoch, `later` how many the command trains on after this
        run; `tally` counts the runs of a group of processes."""
        self.run, self.settings, self.machine, self.options = run, run.settings, machine, options
        self.network, self.optimizer, self.title, self.later, self.tally = network, optimizer, title, later, tally
        self.batch_size = min(self.settings.batch_size, images)
        self.steps = images // self.batch_size
        self.images_per_step = self.batch_size * self.settings.images_per_label
        self.machines, self.versions, self.code = [describe(machine.device)], [VERSION], CODE
        self.epoch, self.step, self.history = 0, 0, []
        self.saved = None  # (epoch, step) of the state on the disk
        self._clear_sums()

    def __enter__(self):
        self.threads = torch.get_num_threads()
        try:
            if self.run.state.exists():
                self._resume()
            else:
                make_folder(self.run.folder)
            self._write_record()
            self._save()
        except Interrupted as error:
            raise Interrupted(error.signal_number, self._how_far()) from None
        self.started, self.started_at = time.monotonic(), self.steps_done
        self.bar = tqdm(
            desc=self.title, total=self.total_steps * self.images_per_step,
            initial=self.steps_done * self.images_per_step, unit=" images", unit_scale=True,
            disable=self.tally is not None or None, mininterval=REFRESH,
        )  # fmt: skip
        if self.tally:
            self.tally.add("started")
        return self

    def __exit__(self, kind, error, traceback):
        self.bar.close()
        if self.tally and error is None:
            self.tally.add("done")
        torch.set_num_threads(self.threads)
        if isinstance(error, Interrupted):
            raise Interrupted(error.signal_number, self._how_far()) from None

    def _how_far(self):
        if self.saved is None:
            return f"{self.run.name} before its first step"
        epoch, step = self.saved
        inside = f" and step {step} of {self.steps} of the next" if step else ""
        return f"{self.run.name}; its state after epoch {epoch} of {self.settings.epochs}{inside} is saved"

    # In the loop ----------------------------------------------------------------------------------------------------

    @property
    def steps_done(self):
        """Optimizer steps since the run began."""
        return self.epoch * self.steps + self.step

    @property
    def total_steps(self):
        return self.settings.epochs * self.steps

    @contextlib.contextmanager
    def time_of_teacher(self):
        """Counts the time of this context as the teacher's."""
        started = time.perf_counter()
        yield
        self.machine.synchronize()
        self.teacher_seconds += time.perf_counter() - started

    def batches(self, order):
        """The batches of an epoch that are still to be trained on: indices (B,); an incomplete last one is dropped."""
        self.epoch_started = time.perf_counter() - self.seconds
        self.shown = 0.0
        for step in range(self.step, self.steps):
            yield order[step * self.images_per_step : (step + 1) * self.images_per_step]

    def add(self, loss, logits, labels):
        """Adds a step's result, without waiting for the device except when it is time to show or to save it."""
        with torch.no_grad():
            sums = self.sums
            sums["loss"] += loss.detach()
            sums["hard_loss"] += (
                F.cross_entropy(logits.float(), labels, label_smoothing=self.settings.label_smoothing)
                if self.settings.asks_teacher
                else loss.detach()
            )
            sums["correct"] += (logits.argmax(1) == labels).sum()
            first_bad = (sums["first_bad"] < 0) & ~loss.isfinite()
            sums["first_bad"] = torch.where(first_bad, self.step, sums["first_bad"])
        self.step += 1
        self.bar.update(self.images_per_step)
        now, stop = time.monotonic(), self.options.stop
        if now - self.shown >= REFRESH:
            self.shown = now
            self._check()
            if not self.bar.disable:
                self._show()
        if self.step == self.steps:
            return  # end_epoch saves
        if stop.signal_number is not None or now - self.saved_at >= self.options.save_every:
            self.seconds = time.perf_counter() - self.epoch_started
            self._check(weights=True)
            self._save()
            stop.raise_pending()

    def end_epoch(self, val_accuracy=None):
        """Adds a row to the history and saves the state."""
        self._check(weights=True)  # waits for the device before the time is taken
        self.seconds = time.perf_counter() - self.epoch_started
        images, alpha = self.steps * self.batch_size, self.settings.alpha
        apart = alpha and alpha >= 1e-3 and not self.settings.loss  # below, what is left of the sums is rounding
        loss, hard_loss = (self.sums[name].item() / self.steps for name in ("loss", "hard_loss"))
        row = HistoryRow(
            epoch=self.epoch + 1,
            train_loss=loss,
            soft_loss=(loss - (1 - alpha) * hard_loss) / alpha if apart else None,
            hard_loss=hard_loss,
            train_accuracy=self.sums["correct"].item() / images,
            val_accuracy=val_accuracy,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            seconds=self.seconds,
            teacher_seconds=self.teacher_seconds,
            images_per_second=self.steps * self.images_per_step / self.seconds,
        )
        self.history = [*self.history, row]
        self.epoch, self.step = self.epoch + 1, 0
        self._clear_sums()
        self._save()
        write(self.run.history, as_csv(self.history))
        self._write_record()
        if self.tally:
            self.tally.add("epochs", self.settings.images_per_label)
        if self.bar.disable:  # no terminal: a line in a log instead
            self._log(row)

    def _clear_sums(self):
        device = self.machine.device
        self.sums = {name: torch.zeros((), device=device) for name in ("loss", "hard_loss")}
        self.sums["correct"] = torch.zeros((), dtype=torch.int64, device=device)
        self.sums["first_bad"] = torch.full((), -1, dtype=torch.int64, device=device)
        self.seconds = self.teacher_seconds = 0.0

    def _check(self, weights=False):
        """Raises Failure where a loss was not finite, or (if `weights`) what would be saved is not, or learns no more:
        no image of the last batch reaches the head, and no gradient comes back. Only this program's own networks and
        losses are judged by that: a loss of the user's own may well have no gradient left."""
        bad, what = self.sums["first_bad"].item(), "its loss or weights were not finite"
        if bad < 0 and weights:
            momenta = (each["momentum_buffer"] for each in self.optimizer.state.values())
            if not models.is_finite(self.network.state_dict()) or not all(m.isfinite().all() for m in momenta):
                bad = self.step - 1
            elif not (self.settings.network or self.settings.loss) and not self.network.head.weight.grad.any():
                bad, what = self.step - 1, "it gave all images the same answer"
        if bad < 0:
            return
        rate = self.settings.learning_rate
        raise Failure(
            f"{self.run.name} diverged: {what} at step {bad + 1} of {self.steps} of epoch {self.epoch + 1} of "
            f"{self.settings.epochs}.\nThe last good state is saved. "
            f"Try a smaller learning rate: --lr {rate / 4:.3g} --overwrite (it was {rate:.3g})."
        )

    def _show(self):
        postfix = {
            "epoch": f"{self.epoch + 1}/{self.settings.epochs}",
            "loss": f"{self.sums['loss'].item() / self.step:.3f}",
            "acc": f"{self.sums['correct'].item() / (self.step * self.batch_size):.3f}",
        }
        if self.later and (rate := self.bar.format_dict["rate"]):
            left = (self.bar.total - self.bar.n + self.later) / rate
            postfix["all runs"] = f"{tqdm.format_interval(left)} left"
        self.bar.set_postfix(postfix, refresh=False)

    def _log(self, row):
        parts = "" if row.soft_loss is None else f" (soft {row.soft_loss:.4f}, hard {row.hard_loss:.4f})"
        validation = "" if row.val_accuracy is None else f", validation accuracy {row.val_accuracy:.4f}"
        done = (self.steps_done - self.started_at) * self.images_per_step
        left = (self.total_steps - self.steps_done) * self.images_per_step + self.later
        left = tqdm.format_interval(left * (time.monotonic() - self.started) / done)
        left += " left for all runs" if self.later else " left"
        left = self.tally.words() if self.tally else left
        print(
            f"{self.title}: epoch {row.epoch} of {self.settings.epochs}, loss {row.train_loss:.4f}{parts}, training "
            f"accuracy {row.train_accuracy:.4f}{validation}, {row.seconds + row.teacher_seconds:.1f} s, {left}",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    # On the disk ----------------------------------------------------------------------------------------------------

    def _save(self):
        """Saves the state. `_check` comes first: a state that is not finite is never saved."""
        state = State(
            settings=self.settings.as_dict(),
            **self.machine.kind,
            machines=self.machines,
            threads=torch.get_num_threads(),
            torch=str(torch.__version__),
            program=self.versions,
            code=self.code,
            epoch=self.epoch,
            step=self.step,
            history=[asdict(row) for row in self.history],
            sums=self.sums,
            seconds=self.seconds,
            teacher_seconds=self.teacher_seconds,
            network=dict(self.network.state_dict()),
            optimizer=self.optimizer.state_dict(),
        )
        save_state(self.run.state, state)
        self.saved, self.saved_at = (self.epoch, self.step), time.monotonic()

    def _resume(self):
        path, folder = self.run.state, self.run.folder
        try:
            state = load_state(path)
            self.run.refuse_other_settings(state.settings)
            self.run.refuse_other_machine(vars(state), self.machine)
            self._restore(state)
        except Damaged as error:
            raise Damaged(f"{error}\nRemove {folder} to train it again.") from None
        here, before = self.machines[0], state.machines[-1]
        versions = ("with torch", str(torch.__version__), state.torch), ("by version", VERSION, state.program[-1])
        for word, now, then in (("on", here, before), *versions):
            if now != then:
                tqdm.write(f"{folder} ran {word} {then}; {word} {now} the last bits may differ.", file=sys.stderr)
        if other := changed(state.code, self.settings):
            tqdm.write(f"{folder} was begun before {' and '.join(other)} changed; this code goes on.", file=sys.stderr)
        self.code = resumed(state.code)
        self.machines = state.machines + [here] * (here != before)
        self.versions = state.program + [VERSION] * (state.program[-1] != VERSION)
        if self.machine.device.type == state.device == "cpu":
            self._resume_threads(state.threads)
        self.saved = self.epoch, self.step

    def _resume_threads(self, before):
        """Trains on with as many threads as `before`: on a CPU their number decides last bits."""
        threads = min(before, self.threads)  # more would wait for each other
        if threads < before:
            text = f"{self.run.folder} was begun with {before} threads; with {threads}, as many as this process has,"
            tqdm.write(f"{text} the last bits may differ.", file=sys.stderr)
        torch.set_num_threads(threads)

    def _restore(self, state):
        path = self.run.state
        if (
            state.epoch > self.settings.epochs
            or state.step >= self.steps
            or [row.epoch for row in state.history] != [*range(1, state.epoch + 1)]
            or state.sums.keys() != self.sums.keys()
        ):
            raise Damaged(f"{path} is damaged: its epoch, step, history and sums do not match.")
        models.load_weights(self.network, state.network, path)
        try:
            self.optimizer.load_state_dict(state.optimizer)
            self.sums = {name: total.copy_(state.sums[name]) for name, total in self.sums.items()}
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise Damaged(f"{path} is damaged: its optimizer or sums do not fit this run ({error}).") from None
        self.epoch, self.step, self.history = state.epoch, state.step, state.history
        self.seconds, self.teacher_seconds = state.seconds, state.teacher_seconds

    def _write_record(self, **finished):
        """Writes run.json, which says how far the run is; needs no PyTorch to be read."""
        images = dict(self.options.images or {})
        if not self.settings.unlabeled:
            images.pop("unlabeled", None)  # which other runs of the command see
        made_with = {"device": ", then ".join(self.machines), "program": ", then ".join(self.versions)} | self.code
        record = RunRecord(
            finished=bool(finished),
            epochs_done=self.epoch,
            settings=self.settings.as_dict(),
            environment=self.machine.environment() | made_with,
            recorded=self.options.recorded,
            images=images or None,
            **finished,
        )
        write_json(self.run.record, {k: v for k, v in vars(record).items() if v is not None})

    def finish(self, data, test_logits=None, test_accuracy=None, omitted_bias=None):
        """Writes what a finished run holds, model.pt, which makes it finished, last; returns its accuracy: on the test
        set, or on the validation part of a run that has one."""
        write(self.run.history, as_csv(self.history))
        widths = dict.fromkeys(models.ARCHITECTURES, 1.0) | {self.settings.architecture: self.settings.width}
        about = len(data.classes), data.image_size
        costs = self.options.costs or {name: models.costs(name, *about, each) for name, each in widths.items()}
        seconds = sum(row.seconds + row.teacher_seconds for row in self.history)
        record = {"seconds": seconds, "costs": {name: vars(each) for name, each in costs.items()}}
        if test_logits is None:
            result = record["val_accuracy"] = self.history[-1].val_accuracy
        else:
            result = record["accuracy"] = test_accuracy
            record["omitted_bias"] = omitted_bias
            record["test_logits_sha256"] = save_array(self.run.logits, test_logits.cpu().numpy())
        record["weights_sha256"] = models.identity(self.network.state_dict(), self.settings.as_dict())
        self._write_record(**record)
        models.save(
            self.run.model,
            self.network,
            self.settings.architecture,
            classes=data.classes,
            image_size=data.image_size,
            mean=data.mean,
            std=data.std,
            settings=self.settings.as_dict(),
            accuracy=result,
            ranges=data.facts.ranges,
        )
        remove(self.run.state)
        return result
