"""A run: a folder, and the settings that identify what is in it."""

from pathlib import Path

import models
from arguments import typed
from runs.code import changed
from runs.files import Damaged, Failure, read_json, remove
from runs.hooks import Hooks
from runs.settings import RunRecord, complete, differences

FILES = ("model.pt", "state.pt", "run.json", "history.csv", "test_logits.npy", "model.onnx")  # model.pt first


class Run:
    """A run with `settings` in `folder`, whatever of it exists there already.

    A run is finished when its folder holds model.pt, which is written last; state.pt is there only before that.
    """

    def __init__(self, folder, settings, hooks=None):
        """`hooks` are the functions of the user's own (runs.hooks.Hooks) that its network may need."""
        self.folder, self.settings, self.hooks = Path(folder), settings, hooks or Hooks()
        self.files = [self.folder / name for name in FILES]
        self.model, self.state, self.record, self.history, self.logits, _ = self.files

    @property
    def name(self):
        return self.folder.name

    @property
    def is_finished(self):
        return self.model.exists()

    def check(self, machine):
        """Raises Failure where the folder holds a run that can be neither reused nor resumed with these settings on
        this `machine`, and Damaged where it holds a damaged one."""
        if self.is_finished:
            self._finished_model()
        elif self.record.is_file() and self.state.is_file():
            try:
                record = read_json(self.record, RunRecord)
            except Damaged as error:
                raise Damaged(f"{error}\nRemove {self.folder} to train it again.") from None
            self.refuse_other_settings(record.settings.as_dict())
            if record.environment.keys() >= {"device_type", "precision", "compiled"}:
                self.refuse_other_machine(record.environment | {"device": record.environment["device_type"]}, machine)

    def finished_accuracy(self):
        """What a finished run reached; raises as `check` does."""
        accuracy = self._finished_model().accuracy
        remove(self.state)  # left behind where the process was killed right after it wrote model.pt
        return accuracy

    def changed_code(self):
        """The names of the program's files that were changed since this run, which is finished, was trained."""
        return changed(read_json(self.record, RunRecord).environment, self.settings) if self.settings.epochs else []

    def _finished_model(self):
        try:
            model = models.load(self.model, hooks=self.hooks)
            if not self.record.is_file() or not read_json(self.record, RunRecord).finished:
                raise Damaged(f"{self.record} is missing, or does not belong to the finished model.pt beside it.")
        except Damaged as error:
            raise Damaged(
                f"{error}\nReplace it by an intact copy, or remove {self.folder} to train it again."
            ) from None
        self.refuse_other_settings(model.settings)
        if not self.settings.epochs:
            self._refuse_other_weights(model)
        return model

    def _refuse_other_weights(self, kept):
        """Raises Failure where a network that is not trained here would not have the weights of the one that is kept:
        those are in a file of the user's own, which no setting names."""
        hook = getattr(self.hooks, self.settings.architecture)
        network = models.build(hook.loaded, self.settings.architecture, kept.outputs, self.settings.seed)
        if models.digest(network.state_dict()) != models.digest(kept.state_dict()):
            raise Failure(
                f"{self.folder} keeps other weights than {hook} returns now. Add --overwrite to keep these instead, or "
                "choose another --output-dir."
            )

    def refuse_other_settings(self, found):
        """Raises Failure where the settings `found` in the folder are not the run's."""
        found, wanted = complete(found), complete(self.settings.as_dict())
        phrases = differences(found, wanted)
        if phrases:
            views = {name: found[name] for name in self.settings.augmentation if found[name] != wanted[name]}
            apart = differences(found | {name: wanted[name] for name in views}, wanted)
            words = " ".join(word for pair in views.items() for word in typed(*pair))
            keep = "" if apart else f"{words} to use or resume it as it is, "
            raise Failure(
                f"{self.folder} holds a run with other settings: {', '.join(phrases)}.\n"
                f"Add {keep}--overwrite to train all runs of this command again, remove that folder to train only this "
                "one again, or choose another --output-dir."
            )

    def refuse_other_machine(self, found, machine):
        """Raises Failure where an unfinished run was trained on another kind of device, unless the command names this
        one, or in another precision."""
        phrases = differences(found, machine.must_match)
        if not phrases:
            return
        rest = f"--precision {found['precision']} --{'' if found['compiled'] else 'no-'}compile"
        here = found["device"] != machine.device.type
        here = f", or on this device, with other last bits (--device {machine.device} {rest})" if here else ""
        raise Failure(
            f"{self.folder} cannot be resumed here: {', '.join(phrases)}. Resume it as it was trained last "
            f"(--device {found['device']} {rest}){here}, or remove that folder to train it again."
        )

    def remove(self):
        """Removes the run's files, so that it is trained again; model.pt first, without which it is not finished."""
        remove(*self.files)
