"""Which code trained a run. Who studies this program changes it, and what was trained before must not pass for the work
of the new code."""

import ast
import hashlib
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
THEN = ", then "  # between what a run was begun with and what resumed it


def fingerprint(text):
    """The first 12 digits of the SHA-256 of Python code; comments, docstrings and blank lines do not count."""
    lines = text.split("\n")
    try:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                first, last = node.body[0].lineno, node.body[0].end_lineno
                lines[first - 1 : last] = [""] * (last - first + 1)
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                row, column = token.start
                lines[row - 1] = lines[row - 1][:column]
    except SyntaxError:
        pass  # which Python tells, with the place, where it imports the file
    code = "\n".join(line.rstrip() for line in lines if line.strip())
    return hashlib.sha256(code.encode()).hexdigest()[:12]


# Of the files that decide what a training gives, as they were when the program started.
FILES = ("data.py", "distill.py", "models.py", "train.py")
CODE = {name: fingerprint((ROOT / name).read_text(encoding="utf-8")) for name in FILES}


def deciding(settings):
    """The names of the files that decide what a run gives: without a teacher the loss of distill.py is not used."""
    return [name for name in FILES if name != "distill.py" or settings.asks_teacher or settings.omit_class]


def changed(before, settings):
    """The names of the files that were changed since a run was trained; `before` are their fingerprints then, by name,
    in a dict. A run of a version that recorded none is taken for one of this code."""
    return [name for name in deciding(settings) if before.get(name, CODE[name]) != CODE[name]]


def resumed(before):
    """CODE as it is recorded of a run that was begun with files of the fingerprints `before`."""
    begun = {name: before.get(name, now) for name, now in CODE.items()}
    return {name: old if old.split(THEN)[-1] == CODE[name] else old + THEN + CODE[name] for name, old in begun.items()}
