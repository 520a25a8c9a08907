"""Damaged and odd data: each is read, or refused in one line that names file, row and mend."""

import base64
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastvkd.data import jsonl
from fastvkd.data.check import check_data
from fastvkd.data.dead_leaves import dead_leaves
from fastvkd.data.sources import recognise
from fastvkd.data.strangers import read_strangers
from fastvkd.data.texts import PLACEHOLDERS
from fastvkd.errors import DataError
from fastvkd.photos import decode_image

pytestmark = pytest.mark.fault("damaged data")

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12345\n"


def encoded_image(number: int) -> bytes:
    buffer = io.BytesIO()
    dead_leaves((24, 24), (number,)).save(buffer, "PNG")
    return buffer.getvalue()


def row(number: int) -> dict:
    choice = [{"Question": "What job?", "Options": {"A": "pilot", "B": "baker"}, "Correct_Answer": "A"}]
    return {
        "image": {"bytes": encoded_image(number), "path": None},
        "ID": f"{number:03d}",
        "biography": "b",
        "Classification_Task": {"Image_Textual_Questions": choice, "Pure_Text_Questions": choice},
        "Generation_Task": [{"Type": "Image_Textual", "Question": "Where born?", "Ground_Truth": "Oslo"}],
        "Mask_Task": [{"Type": "Image_Textual", "Question": "Lives in __.", "Ground_Truth": "Rome"}],
    }


def in_json(number: int) -> dict:
    return row(number) | {"image": {"bytes": base64.b64encode(encoded_image(number)).decode()}}


SPLITS = {"forget_5": 0, "retain_95": 10}


def tables(root: Path, write: Callable[[Path, int], object]) -> Path:
    """A folder whose two splits hold what `write(folder, first number)` puts there."""
    for split, number in SPLITS.items():
        (root / split).mkdir(parents=True)
        write(root / split, number)
    return root


def parquet(folder: Path, number: int) -> None:
    pq.write_table(pa.Table.from_pylist([row(number)]), folder / "train.parquet")


def saved_to_disk(folder: Path, number: int) -> None:
    table = pa.Table.from_pylist([row(number)])
    with (
        pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as to,
    ):
        to.write_table(table)
    (folder / "state.json").write_text('{"_split": null}')
    (folder / "dataset_info.json").write_text('{"features": {}}')


def own(root: Path, **first: object) -> Path:
    """Own data of two people; `first` overrides keys of the first line."""
    root.mkdir(parents=True, exist_ok=True)
    for side, number in (("forget", 0), ("retain", 10)):
        (root / f"{side}.png").write_bytes(encoded_image(number))
        line = {"image": f"{side}.png", "entity": side, "question": "What is this?", "answer": "a red cube"}
        (root / f"{side}.jsonl").write_text(json.dumps(line | (first if side == "forget" else {})) + "\n")
    return root


def problem(root: Path) -> str:
    """The one problem that a check finds."""
    (found,) = check_data(root).problems
    return found


UNKNOWN: dict[str, tuple[Callable[[Path], object], str]] = {
    "Git LFS pointers": (
        lambda root: tables(root, lambda folder, _: (folder / "train.parquet").write_text(LFS)),
        "forget_5/train.parquet: is a Git LFS pointer and not the file itself; run `git lfs pull`",
    ),
    "save_to_disk": (lambda root: tables(root, saved_to_disk), r"written by save_to_disk.*\.to_parquet\("),
    "CSV": (
        lambda root: tables(root, lambda folder, _: (folder / "train.csv").write_text("ID,question\n1,a\n")),
        "forget_5/train.csv is of a kind that is not read; write parquet or JSON lines",
    ),
    "parquet in the folder itself": (
        lambda root: [root.mkdir(), [parquet(root, number) for number in SPLITS.values()]],
        "train.parquet lies in the folder itself; a split is a folder of its own: move it to train/train.parquet",
    ),
    "an empty folder": (lambda root: root.mkdir(), "the folder is empty"),
    "another thing": (lambda root: [root.mkdir(), (root / "notes.txt").write_text("")], "found notes.txt"),
    "zero bytes": (
        lambda root: tables(root, lambda folder, _: (folder / "train.parquet").touch()),
        "forget_5/train.parquet: not a readable parquet file",
    ),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_why_no_format_is_recognised(tmp_path: Path, kind: str) -> None:
    make, message = UNKNOWN[kind]
    make(tmp_path / "data")
    with pytest.raises(DataError, match=message):
        recognise(tmp_path / "data")


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    def write(folder: Path, number: int) -> None:
        (folder / "rows.json").write_text(json.dumps([in_json(number)]), encoding="utf-8-sig")

    assert check_data(tables(tmp_path / "tables", write)).ok
    file = own(tmp_path / "own") / "forget.jsonl"
    file.write_text(file.read_text(), encoding="utf-8-sig")
    assert check_data(tmp_path / "own").ok


def test_names_that_begin_with_a_dot_are_passed_over(tmp_path: Path) -> None:
    root = tables(tmp_path / "data", parquet)
    (root / "forget_5/._train.parquet").write_bytes(b"\0\5\x16\7")
    (root / ".ipynb_checkpoints").mkdir()
    (root / ".ipynb_checkpoints/a-checkpoint.json").write_text("{}")
    report = check_data(root)
    assert report.ok and set(report.splits) == set(SPLITS)
    (root / "strangers/ann").mkdir(parents=True)
    (root / "strangers/ann/1.png").write_bytes(encoded_image(30))
    (root / "strangers/ann/._1.png").write_bytes(b"\0\5\x16\7")
    assert [len(photos) for photos in read_strangers(root / "strangers")] == [1]


def test_what_describes_a_data_set_is_not_a_row(tmp_path: Path) -> None:
    def write(folder: Path, number: int) -> None:
        (folder / "rows.jsonl").write_text(json.dumps(in_json(number)))
        (folder / "dataset_info.json").write_text('{"features": {}}')

    assert check_data(tables(tmp_path / "data", write)).ok


LINES = {
    "nested without end": ("[" * 100_000, "forget.jsonl:1: JSON nested too deeply"),
    "a number of 5,000 digits": ('{"image": ' + "1" * 5000 + "}", "forget.jsonl:1: not JSON that can be read"),
    "half a character": ('{"answer": "a \\ud83d cube"}', "forget.jsonl:1: '\\ud83d' is half a character"),
    "a key twice": ('{"answer": "a", "answer": "b"}', "forget.jsonl:1: says 'answer' twice"),
    "cut off": ('{"answer": "a', "forget.jsonl:1: not JSON"),
}


@pytest.mark.parametrize("kind", LINES)
def test_json_that_cannot_be_used(tmp_path: Path, kind: str) -> None:
    line, message = LINES[kind]
    file = own(tmp_path) / "forget.jsonl"
    file.write_text(line + "\n" + file.read_text())
    assert message in problem(tmp_path)
    with pytest.raises(DataError):
        jsonl.training_sets(tmp_path, "forget", "retain")


def test_a_whole_character_and_a_line_separator_within_a_text_are_read(tmp_path: Path) -> None:
    file = own(tmp_path) / "forget.jsonl"
    file.write_text(file.read_text().replace("a red cube", "a red\u2028cube \\ud83d\\ude00"), encoding="utf-8")
    assert check_data(tmp_path).ok
    assert jsonl.read_split(tmp_path, "forget")[0].visual.generation[0].answer == "a red\u2028cube 😀"


def test_text_that_is_no_utf8_names_its_line(tmp_path: Path) -> None:
    file = own(tmp_path) / "forget.jsonl"
    file.write_bytes(file.read_bytes() * 2 + "é".encode("latin-1"))
    assert "forget.jsonl:3: not UTF-8 text" in problem(tmp_path)


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    assert "forget.jsonl:1: image " in (found := problem(own(tmp_path, image="forget\0.png")))
    assert "null character" in found
    assert "cannot be read" in problem(own(tmp_path, image="a" * 5000))


@pytest.mark.parametrize("make", [os.mkfifo, lambda at: at.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_what_has_no_end_is_not_read(tmp_path: Path, make: Callable[[Path], object]) -> None:
    """A pipe would be waited for, and a device gives bytes for ever."""
    image = own(tmp_path / "own") / "forget.png"
    table = tables(tmp_path / "tables", parquet) / "forget_5/train.parquet"
    for file in (image, table):
        file.unlink()
        make(file)
    assert "forget.jsonl:1: image 'forget.png' is a pipe or a device" in problem(tmp_path / "own")
    assert any(f"{table}: is a pipe or a device" in found for found in check_data(tmp_path / "tables").problems)


def test_a_message_quotes_what_a_terminal_would_obey_as_escapes(tmp_path: Path) -> None:
    report = check_data(own(tmp_path / "a\nb", question=" "))
    assert all(line.isprintable() for line in report.lines()) and r"a\nb" in report.lines()[0]
    with pytest.raises(DataError) as caught:
        jsonl.training_sets(tmp_path / "a\nb", "forget", "retain")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("key", ["question", "answer", "options"])
@pytest.mark.parametrize("mark", PLACEHOLDERS)
def test_an_image_placeholder_in_a_text(tmp_path: Path, key: str, mark: str) -> None:
    text = f"who is in {mark} ?"
    first = {"options": [text, "a red cube"]} if key == "options" else {key: text}
    own(tmp_path, **first)
    assert f"forget.jsonl:1: the {key.removesuffix('s')}" in (found := problem(tmp_path)) and repr(mark) in found
    with pytest.raises(DataError, match="remove it"):
        jsonl.training_sets(tmp_path, "forget", "retain")


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ({"bytes": "é"}, "bytes are no base64"),
        ({"bytes": "abc"}, "bytes are no base64"),
        ({"path": [1]}, "has a list for a path; expected a text"),
        ({"bytes": [1]}, "holds a list; expected encoded image bytes"),
    ],
)
def test_a_photo_in_json_that_is_none(tmp_path: Path, cell: dict, message: str) -> None:
    def write(folder: Path, number: int) -> None:
        (folder / "rows.jsonl").write_text(json.dumps(in_json(number) | ({"image": cell} if not number else {})))

    report = check_data(tables(tmp_path / "data", write))
    assert any("forget_5/rows.jsonl:1: column image" in found and message in found for found in report.problems)


def test_messages_name_no_address_in_memory(tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        decode_image(b"<html>not found</html>", "a.png")
    assert "0x" not in str(refused.value) and "unreadable image" in str(refused.value)
    with pytest.raises(DataError, match="git lfs pull"):
        decode_image(LFS.encode(), "a.png")
