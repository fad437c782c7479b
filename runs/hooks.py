"""Functions of the user's own, named on the command line as FILE.py:FUNCTION.

Files are found and hashed before PyTorch is imported; they are run after it, once for each option that names them, from
the bytes that were hashed.
Only what the command line names is ever run: what a checkpoint names is compared, never imported.
"""

import contextlib
import functools
import hashlib
import importlib.util
import socket
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from runs.files import Failure, is_out_of_memory, read

FRAMES, LINES = 3, 6  # of a traceback: the last frames in the user's file, and the first lines of what it says


@dataclass(frozen=True)
class Hook:
    """A function in a file. `option` is where it was named."""

    option: str
    path: Path
    function: str
    content: bytes = field(repr=False)

    @property
    def file(self):
        """The file's name, without its folder."""
        return self.path.name

    @functools.cached_property
    def sha256(self):
        return hashlib.sha256(self.content).hexdigest()

    def __str__(self):
        return f"{self.option} {self.path}:{self.function}"

    @functools.cached_property
    def loaded(self):
        """The function itself. Raises Failure where the file cannot be imported or has no such function."""
        name = f"_hook_{self.sha256[:16]}"  # no package's name, and another one for every content
        spec = importlib.util.spec_from_file_location(name, self.path)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
        import torch  # only here, as a Hook is found before PyTorch is imported

        from runs.streams import stream

        with self.explained("cannot be imported"), stream("file"):  # what is drawn there is alike in every process
            torch.manual_seed(0)  # as in all versions; another seed would change what files that draw have drawn
            exec(compile(self.content, str(self.path), "exec"), vars(module))
        function = getattr(module, self.function, None)
        if not callable(function):
            own = [k for k, v in vars(module).items() if callable(v) and getattr(v, "__module__", None) == name]
            has = f"It has: {', '.join(own)}." if own else "It has none."
            raise Failure(f"{self.option} {self.path} has no function '{self.function}'. {has}")
        return function

    @contextlib.contextmanager
    def explained(self, what, inside=False):
        """A context in which the user's own code runs: an error in it becomes a Failure that says `what` happened and
        ends with the error's own traceback, as far as it is about the user's file. If `inside`, only errors that pass
        through that file do, and not those of memory."""
        try:
            yield
        except Failure:
            raise
        except (Exception, SystemExit) as error:
            frames = [each for each in traceback.extract_tb(error.__traceback__) if each.filename == str(self.path)]
            if inside and (not frames or is_out_of_memory(error)):
                raise
            lines = "".join(traceback.format_list(frames[-FRAMES:])).splitlines()
            lines += "".join(traceback.format_exception_only(error)).splitlines()[:LINES]
            raise Failure("\n".join([f"{self} {what}:", *lines])) from error


@dataclass(frozen=True)
class Hooks:
    """The functions that a command names, None where it names none; `others` are networks of further teachers."""

    loss: Hook | None = None
    student: Hook | None = None
    teacher: Hook | None = None
    others: tuple[Hook, ...] = ()

    @property
    def named(self):
        """The hooks that there are."""
        return [hook for hook in (self.loss, self.student, self.teacher, *self.others) if hook]

    def load(self):
        """Runs their files; raises Failure where one cannot be imported or has no such function."""
        for hook in self.named:
            hook.loaded  # noqa: B018 (a cached property)

    @contextlib.contextmanager
    def explained(self, what):
        """A context in which they are called among much else: an error that comes out of one of their files becomes a
        Failure that names it and says `what` happened; all others stay what they are."""
        with contextlib.ExitStack() as stack:
            for hook in reversed(self.named):  # where two are in one file, the teacher is the last to blame
                stack.enter_context(hook.explained(what, inside=True))
            yield

    def check_alike(self, group):
        """Raises Failure where a process of the `group` has read other files than the leading one."""
        own = [hook.sha256 for hook in self.named]
        for hook, here, there in zip(self.named, own, group.agree(lambda: own), strict=True):
            if here != there:
                raise Failure(
                    f"{hook} differs between the processes: SHA-256 {here[:12]}… on {socket.gethostname()}, "
                    f"{there[:12]}… where the first one runs. Give all machines the same file."
                )

    def network_of(self, settings, path):
        """The function that builds the network in the model.pt at `path`, from `settings` that are recorded there; None
        for a network of this program. Raises Failure where the function is not among these, or was edited since."""
        name, file, sha256 = (settings.get(f"network{more}") for more in ("", "_file", "_sha256"))
        if not name:
            return None
        is_teacher = settings.get("role") == "teacher"
        named = [hook for hook in (self.student, self.teacher, *self.others) if hook and hook.function == name]
        for hook in named:
            if hook.sha256 == sha256:
                return hook.loaded
        if named:
            then, now = f"SHA-256 {sha256[:12]}… then", f"{named[0].sha256[:12]}… now"
            again = "the teacher again: --train-teacher --overwrite" if is_teacher else "again: --overwrite"
            raise Failure(
                f"{path} cannot be read with {named[0]}: the network in {file} was edited since ({then}, {now}). Name "
                f"a copy of the file as it was, or train {again}, or another --output-dir."
            )
        option = f"--teacher-network FILE.py:{name}"
        option = option if is_teacher else f"--student FILE.py:{name} (as a teacher: {option})"
        all_of_them = "\nOf several teachers name all networks: --teacher-network ONE.py:FUNCTION OTHER.py:FUNCTION"
        raise Failure(
            f"{path} holds a network of your own, {name} in {file}, which is never imported by itself. Name it: "
            f"{option}{all_of_them if self.teacher else ''}"
        )


def find_hooks(arguments):
    """The Hooks that `arguments` name; raises Failure where a file cannot be read. Needs no PyTorch."""
    return Hooks(
        _find("--loss", arguments.loss),
        _find("--student", arguments.student),
        _find("--teacher-network", arguments.teacher_network),
        tuple(_find("--teacher-network", each) for each in arguments.other_networks),
    )


def settings_of(what, hook):
    """What Settings say of a Hook that is a "loss" or a "network", or of None."""
    return {what: hook.function, f"{what}_file": hook.file, f"{what}_sha256": hook.sha256} if hook else {}


def _find(option, named):
    if named is None:
        return None
    name, _, function = named.rpartition(":")
    path = Path(name)
    if not path.is_file():
        raise Failure(f"{option} {path} {'is a folder' if path.is_dir() else 'does not exist'}.")
    return Hook(option, path, function, read(path))
