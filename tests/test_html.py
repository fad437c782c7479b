"""report.html: one file that fetches nothing, whose figures load and whose text is only text."""

import base64
import hashlib
import io
import re
from html.parser import HTMLParser

from PIL import Image

from reports.comparison import Comparison
from reports.html import page


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.texts, self.inside = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, text):
        (self.scripts if self.inside == "script" else self.texts).append(text)


def test_one_file_that_fetches_nothing(finished):
    text = (finished / "report.html").read_text(encoding="utf-8")
    found = Page(text)
    for tag, attributes in found.tags:
        assert tag not in {"link", "iframe", "object", "embed", "base", "form"}
        for name in ("href", "src", "srcset", "action", "poster"):
            assert attributes.get(name, "data:").startswith("data:")
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in text
    assert "@import" not in text
    images = [attributes for tag, attributes in found.tags if tag == "img"]
    assert len(images) == len(list((finished / "figures").iterdir()))
    for image in images:
        content = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"), validate=True)
        Image.open(io.BytesIO(content)).verify()
        assert image["alt"]
    (policy,) = (each["content"] for tag, each in found.tags if each.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256("".join(found.scripts).encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ")
    assert f"script-src 'sha256-{digest}'" in policy


def test_it_says_what_the_comparison_says(finished):
    comparison = Comparison(finished)
    content = (finished / "report.html").read_text(encoding="utf-8")
    texts = " ".join(Page(content).texts)
    for name, *accuracies in zip(comparison.classes, comparison.teacher["class_accuracies"], strict=True):
        assert re.search(rf"<td>{name}</td>\s*<td>{accuracies[0]:.4f}</td>", content), name
    assert f"{comparison.kd[0]['mean']:.4f}" in texts
    for words in (
        "Compared with the teacher the student",
        "exact McNemar test",
        "Temperature scaling",
        "kd-T4-a0.1-s0",
        "weight decay",
    ):
        assert words in texts
    for name in comparison.environment.values():
        assert str(name) in texts


def test_class_names_and_paths_are_escaped(finished):
    """A class is a folder's name, which may hold anything but a slash."""
    comparison = Comparison(finished)
    comparison.classes[0] = comparison.environment["device"] = "<script>alert(1)</script>"
    comparison.classes[1] = "<img src=x onerror=alert(1)>"
    text = page(comparison, [])
    assert "<script>alert" not in text and "<img src=x" not in text
    assert len(Page(text).scripts) == 1
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 2 and "&lt;img src=x onerror=alert(1)&gt;" in text
