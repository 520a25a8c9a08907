"""A person whose name, question and answers are markup: a real browser shows them as text, and runs nothing.

The browser is Chromium, where it is installed; what holds for any reader of the page is checked everywhere.
"""

import html
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from ledger import note

sys.path.insert(0, str(Path(__file__).parents[1] / "reporting"))  # the example run of the page's own tests
from example_run import examples, people, training_log, with_strangers

from fastvkd.reporting import build_report
from fastvkd.reporting.html import render

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
HOSTILE = {
    "script": '<script>document.title="hit"</script>',
    "attribute": '"><img src=x onerror="document.title=\'hit\'">',
    "single quote": "'><svg onload=\"document.title='hit'\">",
    "end of the title": '</title><script>document.title="hit"</script>',
    "end of the style": '</style><script>document.title="hit"</script>',
    "comment": '--><script>document.title="hit"</script><!--',
    "link": "<a href=\"javascript:document.title='hit'\">x</a>",
    "template": "{{7*7}}{% set x = 1 %}${7*7}",
    "entity": "&lt;script&gt;&#60;script&#62;",
    "direction": "\u202e<script>document.title='hit'</script>\u2066",
}


def page(text: str) -> str:
    """The page of a run in which everything that comes from data or from a model is `text`."""
    parts = with_strangers()
    report: dict[str, Any] = build_report(**parts)
    report["settings"]["model_name_or_path"] = report["settings"]["data"] = text
    report["notes"] = [text]
    example = examples()[0] | dict.fromkeys(("name", "question", "truth", "before", "after"), text)
    person = people()[0] | dict.fromkeys(("entity", "name", "question"), text) | {"said": {"unlearned": text}}
    return render(report, [example], training_log(20), (), [person])


class Reader(HTMLParser):
    """Tags, handlers of events, and all text that is shown."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.handlers: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []
        self._within: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.handlers += [name for name, _ in attributes if name.startswith("on")]
        self.links += [value for name, value in attributes if name in ("href", "src") and value]

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def shown(self) -> str:
        return "".join(self.text)


def title(document: str) -> str:
    """As it is shown."""
    return html.unescape(document.split("<title>")[1].split("</title>")[0])


@pytest.mark.parametrize("kind", HOSTILE)
def test_markup_is_shown_as_the_text_that_it_is(kind: str) -> None:
    text = HOSTILE[kind]
    read = Reader(page(text))
    assert read.shown.count(text) >= 4  # a name, a question, and what was said
    assert not read.tags & {"script", "iframe", "object", "embed", "a"} and not read.handlers
    assert all(link.startswith("data:image/png") for link in read.links)
    note("markup in a name, a question or an answer", f"{kind}, parsed", "shown as text")


def browser() -> str:
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip(f"no browser here: none of {', '.join(_NAMES)} is installed")
    return found


def as_seen(file: Path) -> str:
    """The page's document once a browser has loaded it and let whatever runs in it run."""
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000"]
    command += [f"--user-data-dir={file.parent / 'profile'}", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "<body" in done.stdout, done.stderr[-2000:]
    return done.stdout


def test_a_real_browser_runs_a_script_that_is_one(tmp_path: Path) -> None:
    """Or the next test could not fail."""
    file = tmp_path / "page.html"
    file.write_text(f"<title>calm</title><p>{HOSTILE['script']}")
    assert title(as_seen(file)) == "hit"
    file.write_text(f'<title>calm</title><p title="{HOSTILE["attribute"]}">')
    assert title(as_seen(file)) == "hit"


def test_a_real_browser_runs_nothing_of_the_page(tmp_path: Path) -> None:
    """Every text at once; with one of them the title would be another."""
    text = " ".join(HOSTILE.values())
    written = page(text)
    file = tmp_path / "page.html"
    file.write_text(written)
    seen = as_seen(file)
    assert title(seen) == title(written) != "hit"
    read = Reader(seen)
    assert read.shown.count(text) >= 4
    assert not read.tags & {"script", "iframe", "object", "embed", "a"} and not read.handlers
    note("markup in a name, a question or an answer", "all, in Chromium", "shown as text", len(HOSTILE))
