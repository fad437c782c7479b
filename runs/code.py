"""Which code trained a run. Who studies this program changes it, and what was trained before must not pass for the work
of the new code."""

import hashlib
import io
import tokenize
from pathlib import Path

THEN = ", then "  # between what a run was begun with and what resumed it


def fingerprint(path):
    """The first 12 digits of the SHA-256 of a Python file, in which comments and blank lines do not count."""
    text = Path(path).read_text(encoding="utf-8")
    lines = text.split("\n")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    code = "\n".join(line.rstrip() for line in lines if line.strip())
    return hashlib.sha256(code.encode()).hexdigest()[:12]


# Of the files that decide what a training gives, as they were when the program started.
CODE = {
    name: fingerprint(Path(__file__).resolve().parent.parent / name)
    for name in ("data.py", "distill.py", "models.py", "train.py")
}


def changed(before):
    """The names of the files that were others when a run was trained; `before` are their fingerprints then, by name, in
    a dict. A run of a version that recorded none is taken for one of this code."""
    return [name for name, now in CODE.items() if before.get(name, now) != now]


def resumed(before):
    """CODE as it is recorded of a run that was begun with files of the fingerprints `before`."""
    begun = CODE | before
    return {name: old if old.split(THEN)[-1] == CODE[name] else old + THEN + CODE[name] for name, old in begun.items()}
