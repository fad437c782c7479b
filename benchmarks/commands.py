"""How paper.py, unlabeled.py and widths.py run their steps: each is a command, which is printed."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(program, *words, processes=1):
    """Prints and runs a `program` of this repository, such as main.py, shared by so many `processes`; ends the script
    where it fails. Returns what was printed: the command as a person would type it in the current folder."""
    words = [str(ROOT / program), *map(str, words)]
    here = f"{Path.cwd()}{os.sep}"
    options = ["--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = shlex.join(["torchrun" if options else "python", *options, *(word.removeprefix(here) for word in words)])
    print(f"\n$ {command}", flush=True)
    start = [sys.executable, *(["-m", "torch.distributed.run"] if options else []), *options]
    status = subprocess.run([*start, *words]).returncode
    if status:
        sys.exit(status)
    return command
