"""How scripts of this folder run programs of this repository."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def shown(program, words, processes=1):
    """The command as a person would type it in the repository's folder."""
    start = "python" if processes == 1 else f"torchrun --standalone --nproc-per-node {processes}"
    return f"{start} {program} {shlex.join(words)}".replace(f"{ROOT}{os.sep}", "")


def run(program, *words, processes=1):
    """Prints and runs a `program`, such as main.py, shared by so many `processes`; ends the script where it fails."""
    words = [str(word) for word in words]
    print(f"\n$ {shown(program, words, processes)}", flush=True)
    shared = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    start = [sys.executable, *(shared if processes > 1 else []), str(ROOT / program)]
    status = subprocess.run([*start, *words]).returncode
    if status:
        sys.exit(status)
