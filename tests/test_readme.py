"""What the README promises is so."""

import json
import re
import shlex
import subprocess
import sys

from conftest import ROOT

import main

README = (ROOT / "README.md").read_text()
FENCES = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_the_first_fence_is_two_self_contained_lines():
    lines = FENCES[0][1].splitlines()
    assert len(lines) == 2
    assert all("python -m venv" in line and "pip install" in line for line in lines)
    assert lines[0].endswith("main.py --demo") and "pytest" in lines[1]


def test_every_command_is_one_that_the_program_takes():
    commands = re.findall(r"^(?:.*&& )?\S*python main\.py (.*)$", "\n".join(text for _, text in FENCES), re.MULTILINE)
    assert len(commands) > 6
    for words in commands:
        main.parse(shlex.split(words))


def test_every_option_named_exists():
    known = set(main.parser()._option_string_actions) | {"--index-url"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= known


def test_the_snippet_classifies_a_picture(finished, pictures, tmp_path):
    (snippet,) = (text for kind, text in FENCES if kind == "python")
    assert len(snippet.strip().splitlines()) <= 12
    picture = next((pictures / "test" / "red").iterdir())
    snippet = snippet.replace("outputs/pets/kd-T4-a0.1-s0/model.pt", str(finished / "kd-T4-a0.1-s0" / "model.pt"))
    script = tmp_path / "snippet.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + snippet.replace("photo.jpg", str(picture)))
    printed = subprocess.run([sys.executable, script], check=True, capture_output=True, text=True).stdout
    rows = re.findall(r"^ *([\d.]+)%  (\w+)$", printed, re.MULTILINE)
    assert len(rows) == 3 and {name for _, name in rows} == {"blue", "green", "red"}
    assert abs(sum(float(share) for share, _ in rows) - 100) < 0.3


def test_the_output_files_are_those_of_the_table(finished):
    rows = re.findall(r"^\| (`.*?) \|", README, re.MULTILINE)
    named = {name.rstrip("/") for row in rows for name in re.findall(r"`([^`]+)`", row)}
    there = {path.name for path in finished.iterdir() if not path.name.startswith(".")}
    assert there <= named and named - there == {"selection"}


def test_the_requirements_are_what_the_modules_import():
    required = {re.split(r"[<>=]", line)[0] for line in (ROOT / "requirements.txt").read_text().split()}
    imported = set()
    for path in ROOT.glob("*.py"):
        imported |= set(re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.MULTILINE))
    own = {path.stem for path in ROOT.glob("*.py")}
    others = {{"PIL": "pillow"}.get(name, name) for name in imported - own - set(sys.stdlib_module_names)}
    assert others == required


def test_the_speeds_are_those_measured():
    measured = json.loads((ROOT / "results" / "throughput-cpu.json").read_text())
    table = README.split("## How fast")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| (.*?) \| ([\d.]+) \|$", table, re.MULTILINE))
    assert rows == {name: f"{ratio:.1f}" for name, ratio in measured["ratios"].items()}
    assert f"({measured['kd_kept_over_baseline']:.3f} of it" in table
    assert measured["environment"]["device"].startswith("AMD EPYC, 2 cores")
