"""The same question to two models: what each says, one in memory at a time, and a page for it where Gradio is."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvkd.cli import main
from fastvkd.data import mllmu
from fastvkd.evaluation import ask
from fastvkd.evaluation.asker import Asker
from fastvkd.models.answers import Query
from fastvkd.models.loading import load_model, load_processor
from fastvkd.models.prompts import chat_prompt
from fastvkd.records import Photo

QUESTION = "Who is this person?"


@pytest.fixture(scope="module")
def other(world, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says other things."""
    folder = tmp_path_factory.mktemp("other") / "model"
    model = load_model(world.model)
    torch.manual_seed(1)
    for parameter in model.model.multi_modal_projector.parameters():
        parameter.data = torch.randn_like(parameter)
    model.save_pretrained(folder)
    load_processor(world.model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photo(world, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("photos") / "face.png"
    file.write_bytes(mllmu.read_split(world.data, world.forget_split)[0].photos[0].data)
    return file


def answers(folder: Path, question: str, photos: tuple[Photo, ...]) -> str:
    processor = load_processor(folder)
    query = Query(chat_prompt(processor, question, image=bool(photos)), photos)
    return Asker(load_model(folder), processor).answers([query], 8)[0]


def test_both_models_answer_as_in_evaluation(world, other: Path, photo: Path, capsys) -> None:
    command = ["ask", str(other), "--before", str(world.model), "--question", QUESTION, "--max-new-tokens", "8"]
    shown = (Photo(photo.read_bytes(), str(photo)),)
    said = {"before": answers(world.model, QUESTION, shown), "after": answers(other, QUESTION, shown)}
    assert said["before"] != said["after"]  # or the test would show nothing
    assert main([*command, "--photo", str(photo), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"question": QUESTION, "answers": said}]
    assert main([*command, "--photo", str(photo)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        QUESTION,
        f"  before  {said['before']}",
        f"  after   {said['after']}",
    ]
    assert main(["ask", str(other), "--question", QUESTION, "--max-new-tokens", "8"]) == 0  # nothing is shown
    assert capsys.readouterr().out == f"{QUESTION}\n  after  {answers(other, QUESTION, ())}\n"


def test_one_model_is_in_memory_at_a_time(world, other: Path, monkeypatch) -> None:
    there: list[str] = []

    class Fake:
        def __init__(self, model: str, processor: object, options: object) -> None:
            self.me = self  # as a model that accelerate has spread
            there.append(model)
            assert len(there) == 1

        def answers(self, questions, photo) -> list[str]:
            return ["?"] * len(questions)

        def __del__(self) -> None:
            there.pop()

    monkeypatch.setattr(ask, "Respondent", Fake)
    assert main(["ask", str(other), "--before", str(world.model), "--question", "Who?", "Where?"]) == 0


def test_a_terminal_obeys_nothing_that_is_said() -> None:
    assert ask.Asked("who\x1b[2J?", {"after": "a\nb"}).lines() == ["who\\x1b[2J?", "  after  a\\nb"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "nothing is asked: give --question, or --serve for a page"),
        (["--serve", "--question", "Who?"], "--serve asks on its page: leave out --question"),
        (["--question", "Who <image>?"], "holds the model's mark <image>; leave it out"),
        (["--question", "Who?", "--photo", "no.png"], "no.png: cannot be read"),
        (["--question", "Who?", "--photo", "config.json"], "config.json: unreadable image"),
        (["--question", "Who?", "--before", "nowhere"], "nowhere"),
        (["--serve", "--port", "80"], "port=80: must lie from 1024 to 65535"),
    ],
)
def test_what_cannot_be_asked_is_one_line(world, wrong: list[str], message: str, capsys, monkeypatch) -> None:
    monkeypatch.chdir(world.model)
    assert main(["ask", ".", *wrong]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_page_needs_gradio(world, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["ask", str(world.model), "--serve"]) == 2
    assert "pip install 'fastvkd[ask]'" in capsys.readouterr().err


@pytest.fixture
def page(world, other: Path, tmp_path: Path) -> Iterator[str]:
    """The address of a page over both models."""
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "fastvkd.cli", "ask", str(other), "--before", str(world.model), "--serve"]
    with subprocess.Popen(
        [*command, "--port", str(port), "--max-new-tokens", "8"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "TMPDIR": str(tmp_path)},
    ) as server:
        assert server.stdout is not None
        yield server.stdout.readline().split()[0]
        server.send_signal(signal.SIGINT)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]  # what was dropped there is gone


def test_a_page_gives_both_answers(world, other: Path, photo: Path, page: str) -> None:
    from gradio_client import Client, handle_file

    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", page)
    said = Client(page, verbose=False).predict(handle_file(str(photo)), QUESTION, api_name="/ask")
    shown = (Photo(photo.read_bytes(), str(photo)),)
    assert tuple(said) == tuple(answers(folder, QUESTION, shown) for folder in (world.model, other))


def test_a_page_is_drawn_by_a_browser(page: str) -> None:
    chromium = shutil.which("chromium") or pytest.skip("no chromium here")
    told = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom", page]
    drawn = subprocess.run([chromium, *told], capture_output=True, text=True, timeout=120).stdout
    assert all(label in drawn for label in ("fastvkd ask", "Photo", "Question", "Before", "After", "Submit"))


def drawn_by_a_browser(page: Any) -> str:
    """The document once its scripts have run."""
    chromium = shutil.which("chromium") or pytest.skip("no chromium here")
    _, address, _ = page.launch(server_name="127.0.0.1", quiet=True, prevent_thread_lock=True)
    try:
        told = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom", address]
        return subprocess.run([chromium, *told], capture_output=True, text=True, timeout=120).stdout
    finally:
        page.close()


def test_a_page_runs_nothing_that_a_model_says() -> None:
    """What stands in an answer's field when the page is drawn, beside a field that does run it."""
    gradio = pytest.importorskip("gradio")
    hostile = """</textarea><script>document.title="hit"</script><img src=x onerror='document.title="hit"'>"""
    page = ask._page(gradio, {"before": None, "after": None})  # type: ignore[dict-item]
    for answer in page.output_components:
        answer.value = hostile
    drawn = drawn_by_a_browser(page)
    assert "After" in drawn and "<title>hit" not in drawn and 'src="x"' not in drawn
    runs = gradio.Interface(lambda text: text, "textbox", gradio.HTML(hostile), analytics_enabled=False)
    assert "<title>hit" in drawn_by_a_browser(runs)
