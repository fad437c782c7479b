"""What the README promises is so."""

import re
import shlex
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT

from arguments import parse, parser

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "results").rglob("*.md"))]
FENCES = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
PROGRAM = [
    *ROOT.glob("*.py"),
    *(path for name in ("runs", "reports", "sources", "use") for path in (ROOT / name).glob("*.py")),
]


def test_the_first_fence_is_two_lines_that_need_nothing_else():
    lines = FENCES[0][1].splitlines()
    assert len(lines) == 2
    assert all("python -m venv" in line and "pip install" in line for line in lines)
    assert lines[0].endswith("main.py --demo") and "pytest" in lines[1]


def test_every_command_is_one_that_the_program_takes():
    text = "\n".join(text for _, text in FENCES)
    commands = re.findall(r"^(?:.*&& )?\S*(?:python|torchrun .*) main\.py (.*)$", text, re.MULTILINE)
    assert len(commands) == text.count(" main.py ") == len(re.findall(r"main\.py --", text))
    for words in commands:
        parse(shlex.split(words))


def test_every_option_named_exists():
    known = {name for action in parser()._actions for name in action.option_strings}
    known |= {"--index-url", "--dist", "--resolution"}  # of pip, of pytest-xdist, of uv
    known |= {"--standalone", "--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint", "--max-restarts"}
    told = README + (ROOT / "results" / "findings.md").read_text()
    ours = re.sub(r"(?m)`python benchmarks[^`]*`|^python benchmarks.*$", "", told)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", ours)) <= known


def anchors(page):
    """The headings of a page as GitHub makes links to them."""
    titles = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    targets = re.findall(r"\]\(([^)]+)\)", page.read_text())
    for path, _, anchor in (each.partition("#") for each in targets if not each.startswith("http")):
        linked = page.parent / path if path else page
        assert linked.exists(), path
        assert not anchor or anchor in anchors(linked), f"{path}#{anchor}"


def test_the_tables_are_those_of_the_results():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "tables.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_table_that_would_lose_a_row_or_pair_other_seeds_is_refused(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tables

    record = tables.record

    def changed(what, value):
        def read(folder=tables.RECORD):
            found = record(folder)
            if folder.name == "seeds-6-to-10":
                found["baseline"][what] = value(found["baseline"][what])
            return found

        return read

    monkeypatch.setattr(tables, "record", changed("seeds", lambda seeds: [*seeds[1:], 11]))
    with pytest.raises(ValueError, match="no baseline of the same seeds"):
        tables.results()
    monkeypatch.setattr(tables, "record", changed("accuracies", lambda found: [*found, 0.9]))
    with pytest.raises(ValueError, match="no record has the baselines of teacher-200-epochs"):
        tables.results()


def test_tables_are_written_where_their_marks_are_and_nothing_else_is_lost(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tables

    pages = [tmp_path / page.name for page in tables.PAGES]
    texts = [page.read_text() for page in tables.PAGES]

    def run(*new):
        for page, text in zip(pages, new, strict=True):
            page.write_text(text)
        monkeypatch.setattr(tables, "PAGES", pages)
        monkeypatch.setattr(sys, "argv", ["tables.py"])
        tables.main()
        return [page.read_text() for page in pages]

    assert run(re.sub(r"(?m)^\| teacher \|.*$", "| nobody |", texts[0]), texts[1]) == texts
    without_end = re.sub(r"(<!-- few labels -->.*?)<!-- end -->\n", r"\1", texts[1], count=1, flags=re.DOTALL)
    for new, told in (
        ([texts[0], without_end], r"findings.md the block <!-- few labels --> has no <!-- end -->"),
        ([texts[0], texts[1].replace("<!-- paper -->", "")], "have 0 blocks <!-- paper -->"),
        ([texts[0] + "<!-- paper -->\n<!-- end -->", texts[1]], "have 2 blocks <!-- paper -->"),
    ):
        with pytest.raises(SystemExit, match=told):
            run(*new)
        assert [page.read_text() for page in pages] == new


def test_the_snippet_classifies_an_image(finished, images, tmp_path):
    (snippet,) = (text for kind, text in FENCES if kind == "python" and "read_image" in text)
    assert len(snippet.strip().splitlines()) <= 12
    image = next((images / "test" / "red").iterdir())
    snippet = snippet.replace("outputs/pets/kd-T4-a0.9-s0/model.pt", str(finished / "kd-T4-a0.1-s0" / "model.pt"))
    script = tmp_path / "snippet.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + snippet.replace("photo.jpg", str(image)))
    done = subprocess.run([sys.executable, script], check=True, capture_output=True, text=True)
    rows = re.findall(r"^ *([\d.]+)%  (\w+)$", done.stdout, re.MULTILINE)
    assert not done.stderr
    assert len(rows) == 3 and {name for _, name in rows} == {"blue", "green", "red"}
    assert abs(sum(float(share) for share, _ in rows) - 100) < 0.3


def test_the_onnx_snippet_is_the_one_that_test_export_runs():
    (snippet,) = (text for kind, text in FENCES if kind == "python" and "onnxruntime" in text)
    lines = textwrap.indent(snippet.replace("\n\n", "\n"), "    ")
    assert lines in (ROOT / "use" / "export.py").read_text()


def test_the_output_files_are_those_of_the_table(finished):
    rows = re.findall(r"^\| (`.*?) \|", README, re.MULTILINE)
    named = {name.rstrip("/") for row in rows for name in re.findall(r"`([^`]+)`", row)}
    existing = {path.name for path in finished.iterdir() if not path.name.startswith(".")}
    assert existing <= named and named - existing == {"selection", "kd-unlabeled-T4-a0.9-s0"}


def test_the_requirements_are_what_the_modules_import():
    required = {re.split(r"[<>=]", line)[0] for line in (ROOT / "requirements.txt").read_text().split()}
    imported = set()
    for path in PROGRAM:
        imported |= set(re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.MULTILINE))
    own = {path.stem for path in ROOT.glob("*.py")} | {"runs", "reports", "sources", "use"}
    others = {{"PIL": "pillow"}.get(name, name) for name in imported - own - set(sys.stdlib_module_names)}
    export = {re.split(r"[<>=]", line)[0] for line in (ROOT / "requirements-export.txt").read_text().split()}
    assert required <= others <= required | export  # torch.onnx imports onnxscript itself
