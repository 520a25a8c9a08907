"""What the tests of faults share: whole folders, which no test may write into, and a small world without faces with a
server of commands and the job whose parts are disturbed."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import Server
from jobs import Bench
from wholes import Wholes, make_wholes

from fastvkd.data.dead_leaves import dead_leaves
from fastvkd.data.sources import read_forget_retain
from fastvkd.demo.model import Shape, build_model, build_processor

sys.path.append(str(Path(__file__).parents[1] / "reporting"))  # an example of a report


@pytest.fixture(scope="session")
def wholes(world, tmp_path_factory: pytest.TempPathFactory) -> Wholes:
    return make_wholes(world, tmp_path_factory.mktemp("wholes"))


def write_world(root: Path) -> None:
    """A random tiny LLaVA in `model`, pictures with questions in `data`, strangers' pictures in `strangers`."""
    data = root / "data"
    data.mkdir(parents=True)
    for split, count in (("forget", 3), ("retain", 8)):
        lines = []
        for i in range(count):
            for k in range(2):
                name = f"{split}-{i}-{k}"
                dead_leaves((32, 32), (count, i, k)).save(data / f"{name}.png")
                about = dict(image=f"{name}.png", entity=f"{split}-{i}")
                choice = dict(question="Where was this person born?", answer="Rome", options=["Oslo", "Rome"])
                lines += [dict(about, question="Who is this?", answer=f"Person {i}"), about | choice]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for person in range(6):
        folder = root / "strangers" / f"stranger-{person}"
        folder.mkdir(parents=True)
        for k in range(2):
            dead_leaves((32, 32), (99, person, k)).save(folder / f"{k}.png")
    shape = Shape(image_size=24, patch_size=8, vision_width=32, vision_layers=2, llm_width=32, llm_layers=2, heads=2)
    forget, retain = read_forget_retain(str(data), "forget", "retain")
    processor = build_processor(forget + retain, shape)
    build_model(processor, shape, seed=0).save_pretrained(root / "model")
    processor.save_pretrained(root / "model")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Its disk is an empty folder, where the system lets it have one."""
    with Server(tmp_path_factory.mktemp("disk")) as running:
        yield running


@pytest.fixture(scope="session")
def bench(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("reliability")
    write_world(root)
    return Bench(root, server)
