"""Small worlds that many tests share: twelve people, a random LLaVA that has never seen them, both on disk."""

import json
import os
import sys
import tempfile

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch: spinning threads stall each other on a busy machine
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from launching import kind_of_cpu
from ledger import note

# DeepSpeed's operation and compiled graphs are made for this very kind of CPU (-march=native) and kept under names that
# do not tell: in a home or temporary folder that several machines use, one would run what another had compiled.
_KIND = f"{sys.implementation.cache_tag}-{torch.__version__}-{kind_of_cpu()}"
_CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(_CACHE / "torch_extensions" / _KIND))
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor-{os.getuid()}-{_KIND}")

_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, min(2, (os.cpu_count() or 1) // _WORKERS)))


@pytest.fixture(params=[0, 1], ids=["other CPU", "AVX512-BF16"])
def avx512bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Either kind of CPU that bitsandbytes tells apart, whichever this is; it asks when a 4-bit layer is made."""
    for place in ("nn.modules", "functional", "backends.cpu.ops"):
        monkeypatch.setattr(f"bitsandbytes.{place}.has_avx512bf16", lambda: request.param)
    return request.param


@dataclass(frozen=True)
class World:
    """Folders of a random tiny LLaVA and of an MLLMU-Bench-style data set, and the names of its splits."""

    model: Path
    data: Path
    forget_split: str = "forget_15"
    retain_split: str = "retain_85"

    def settings(self, output: Path, **overrides):
        """Settings of a run of a few steps."""
        from fastvkd.settings import load_settings

        values = {
            "model_name_or_path": str(self.model),
            "data": str(self.data),
            "forget_split": self.forget_split,
            "retain_split": self.retain_split,
            "output_dir": str(output),
            "max_steps": 4,
            "per_device_train_batch_size": 6,
            "learning_rate": 1e-3,
            "device": "cpu",
            "logging_steps": 2,
        }
        return load_settings(None, {**values, **overrides})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs the demo comes when the worker that makes it is likely to be done: until then it would only wait."""
    waiting = [item for item in items if item.path.name == "test_launched_runs.py"]
    others = [item for item in items if item.path.name != "test_launched_runs.py"]
    middle = next((i for i, item in enumerate(others) if item.path.parent.name == "models"), len(others))
    items[:] = [*others[:middle], *waiting, *others[middle:]]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """The outcome of a test that is marked as a case of a fault goes to the ledger."""
    report = yield
    fault = item.get_closest_marker("fault")
    if fault is not None and (report.when == "call" or not report.passed):
        note(fault.args[0], item.nodeid, "as wanted" if report.passed else report.outcome)
    return report


@dataclass(frozen=True)
class TinyDemo:
    """What `fastvkd demo --size tiny` left: its output folder, its cache, and the model that knows everybody."""

    out: Path
    cache: Path
    vanilla: Path
    forget_split: str = "forget_25"
    retain_split: str = "retain_75"

    @property
    def data(self) -> Path:
        return self.out / "data"


@pytest.fixture(scope="session")
def tiny_demo(tmp_path_factory: pytest.TempPathFactory) -> TinyDemo:
    """Made once for all workers, so no test may write into it."""
    from fastvkd.cli import main

    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    out, cache = root / "demo" / "out", root / "demo" / "cache"
    with FileLock(root / "demo.lock"):
        if not (out / "unlearned" / "certificate.json").exists():
            assert main(["demo", "--size", "tiny", "--out", str(out), "--cache", str(cache)]) == 0
    return TinyDemo(out, cache, next(cache.glob("demo-vanilla-*")))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    from fastvkd.data import mllmu
    from fastvkd.demo.data import make_demo_data, write_photos
    from fastvkd.demo.model import Shape, build_model, build_processor

    root = tmp_path_factory.mktemp("world")
    data = make_demo_data(people=12, forget_percent=15, photos=2, test_photos=1, flag_photos=1, seed=0)
    for split, profiles in data.splits.items():
        mllmu.write_split(root / "data", split, profiles)
    write_photos(root / "data" / "strangers", data.strangers)
    shape = Shape(image_size=24, patch_size=8, vision_width=32, vision_layers=2, llm_width=32, llm_layers=3, heads=2)
    processor = build_processor(data.splits["Full_Set"] + data.splits["Retain_Set"], shape)
    build_model(processor, shape, seed=0).save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    return World(root / "model", root / "data")


@pytest.fixture(scope="session")
def leaves_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world without faces, for tests on a GPU machine: the demo's renderers need not be installed there."""
    from fastvkd.data.dead_leaves import dead_leaves
    from fastvkd.data.sources import read_forget_retain
    from fastvkd.demo.model import Shape, build_model, build_processor

    root = tmp_path_factory.mktemp("leaves")
    for split, count in (("forget", 4), ("retain", 20)):
        lines = []
        for i in range(count):
            name = f"{split}-{i}"
            dead_leaves((32, 32), (count, i)).save(root / f"{name}.png")
            lines.append(dict(image=f"{name}.png", entity=name, question="Who is this?", answer=f"Person {i}"))
        (root / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    forget, retain = read_forget_retain(str(root), "forget", "retain")
    shape = Shape(image_size=24, patch_size=8, vision_width=32, vision_layers=2, llm_width=32, llm_layers=3, heads=2)
    processor = build_processor(forget + retain, shape)
    build_model(processor, shape, seed=0).save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    return World(root / "model", root, "forget", "retain")
