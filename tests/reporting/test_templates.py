"""The templates: a section is one file and one line, every value is escaped, and the package carries them all."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jinja2
import pytest
from example_run import report_parts
from jinja2 import nodes

from fastvkd.reporting import build_report
from fastvkd.reporting.html import TEMPLATES, render
from fastvkd.reporting.model_card import _CARDS
from fastvkd.reporting.sections import SECTIONS

ROOT = Path(__file__).parents[2]
NAMES = TEMPLATES.list_templates()


def test_a_section_is_one_template_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    template = {"sections/seed.html": "<section><h2>Seed</h2><p>{{ report.settings.seed }}, {{ more }}</p></section>"}
    monkeypatch.setattr(TEMPLATES, "loader", jinja2.ChoiceLoader([jinja2.DictLoader(template), TEMPLATES.loader]))
    monkeypatch.setitem(SECTIONS, "seed.html", lambda page: {"more": "<b>"})
    page = render(build_report(**report_parts()), [], [])
    assert "<section><h2>Seed</h2><p>0, &lt;b&gt;</p></section>" in page


def test_every_section_is_registered_and_used() -> None:
    assert {name.removeprefix("sections/") for name in NAMES if name.startswith("sections/")} == set(SECTIONS)


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith((".html", ".md"))])
def test_every_template_escapes_every_value(name: str) -> None:
    """No template switches the escaping off, or says of a value that it is safe."""
    assert TEMPLATES.autoescape is True and _CARDS.autoescape is True
    source = TEMPLATES.loader.get_source(TEMPLATES, name)[0]  # type: ignore[union-attr]
    tree = TEMPLATES.parse(source)
    assert not [found for found in tree.find_all(nodes.Filter) if found.name in ("safe", "forceescape")]
    assert not list(tree.find_all((nodes.MarkSafe, nodes.MarkSafeIfAutoescape, nodes.ScopedEvalContextModifier)))


def test_a_missing_value_is_an_error_and_not_an_empty_place() -> None:
    with pytest.raises(jinja2.UndefinedError):
        TEMPLATES.from_string("{{ nothing }}").render()


def test_only_charts_and_rendered_templates_count_as_markup() -> None:
    """Whoever calls Markup vouches for its text: the charts, which escape by hand, and what a template rendered."""
    package = ROOT / "fastvkd" / "reporting"
    users = {file.name for file in package.glob("*.py") if "Markup(" in file.read_text()}
    assert users == {"svg.py", "html.py", "model_card.py"}


def test_a_wheel_carries_every_template(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy: building leaves folders behind, from which a later build would take files
    for name in ("fastvkd", "kernels", "configs", "ds_configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w"]
    done = subprocess.run([*command, str(tmp_path), str(source)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert {f"fastvkd/reporting/templates/{name}" for name in NAMES} <= packed
