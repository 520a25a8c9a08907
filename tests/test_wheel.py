"""The wheel, installed elsewhere: it has what it needs, and no package that would hide somebody else's."""

import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of the tracked files alone, offline, with the build backend that is installed."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    script = f"from setuptools import build_meta; print(build_meta.build_wheel({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


def test_nothing_but_our_two_packages_is_on_top(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if "." not in name} == {"fastvkd", "fastvkd_kernels"}
    code = {f"{path.relative_to(ROOT)}" for path in (ROOT / "fastvkd").rglob("*.py")}
    assert code <= set(names)
    assert {"fastvkd/py.typed", "fastvkd_kernels/py.typed", "fastvkd/reporting/templates/page.html"} <= set(names)


@pytest.mark.proof
def test_it_works_where_only_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own that borrows the libraries, far from the repository."""
    venv.create(tmp_path / "venv", with_pip=False)
    site = next((tmp_path / "venv" / "lib").glob("python*")) / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        data = next((name.partition("/")[0] for name in archive.namelist() if ".data/" in name), None)
    assert data is not None, "the recipes are not in the wheel"
    for file in (site / data / "data").rglob("*"):  # what an installer does with them
        target = tmp_path / "venv" / file.relative_to(site / data / "data")
        if file.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (site / "borrowed.pth").write_text("\n".join(libraries))
    python = tmp_path / "venv" / "bin" / "python"
    probe = (
        "import fastvkd, fastvkd_kernels, sys; print(fastvkd.__file__); from fastvkd.cli import main; sys.exit(main())"
    )

    def run(*arguments: str) -> str:
        environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
        command = [str(python), "-c", probe, *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert str(site) in run("--version")
    assert "GiB" in run("plan", "model_name_or_path=llava-1.5-7b", "--gpu", "RTX 4090")
    assert "usage: fastvkd purge" in run("purge", "--help")


def test_version_changes_and_citation_agree() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text()
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(cited["version"]) == version and cited["cff-version"] == "1.2.0" and cited["authors"]
