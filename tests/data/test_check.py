"""Own JSONL data, and `data check`: sound data pass, and every planted fault is named in one line."""

import dataclasses
import io
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fastvkd.data import jsonl, mllmu
from fastvkd.data.check import check_data
from fastvkd.data.sources import evaluation_cells, read_forget_retain
from fastvkd.errors import DataError
from fastvkd.records import Choice, Open, Photo, Profile, Questions

pytestmark = pytest.mark.fault("damaged data")


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def person(entity: int, *photos: int) -> Profile:
    def questions(who: str) -> Questions:
        return Questions(
            (Choice(f"Where was {who} born?", {"A": "Oslo", "B": "Rome"}, "B"),),
            (Open(f"What does {who} do?", "She bakes."),),
            (Open(f"{who} lives in __.", "Lima"),),
        )

    data = tuple(Photo(png(seed), "-") for seed in photos or (entity,))
    return Profile(str(entity), data, questions("this person"), questions(f"Person {entity}"))


@pytest.fixture
def benchmark(tmp_path):
    """Ten people: 1 is forgotten at 5 %, 1 and 2 at 10 %, photos of the test set are others."""
    everyone = [person(number) for number in range(1, 11)]
    mllmu.write_split(tmp_path, "Full_Set", everyone)
    mllmu.write_split(tmp_path, "forget_5", everyone[:1])
    mllmu.write_split(tmp_path, "retain_95", everyone[1:])
    mllmu.write_split(tmp_path, "forget_10", everyone[:2])
    mllmu.write_split(tmp_path, "retain_90", everyone[2:])
    mllmu.write_split(tmp_path, "Test_Set", [person(number, 100 + number, 200 + number) for number in range(1, 11)])
    mllmu.write_split(tmp_path, "Retain_Set", [person(number, 300 + number) for number in range(1, 4)])
    return tmp_path


def test_sound_benchmark_data_pass(benchmark):
    ticks = []
    report = check_data(benchmark, progress=lambda *state: ticks.append(state))
    assert report.ok and report.problems == [] and report.verdict == "ok"
    assert report.format == "MLLMU-Bench schema"
    counts = report.splits["Test_Set"]
    assert (counts.rows, counts.entities, counts.images) == (10, 10, 20)
    assert counts.visual_choice == counts.text_choice == counts.text_cloze == counts.visual_generation == 10
    assert ticks[-1][:2] == (7, 7)
    assert report.lines()[-1] == "verdict: ok" and any("forget_10" in line for line in report.lines())


def only_problem(path) -> str:
    report = check_data(path)
    assert len(report.problems) == 1, report.problems
    assert not report.ok and report.verdict == "1 problem" and "\n" not in report.problems[0]
    return report.problems[0]


def test_an_entity_in_forget_and_its_complement_is_named(benchmark):
    extra = person(1, 900)
    mllmu.write_split(benchmark, "retain_90", [*(person(number) for number in range(3, 11)), extra])
    assert "1 entity is in both forget_10 and retain_90: 1;" in only_problem(benchmark)


def test_a_test_photo_seen_in_training_is_named(benchmark):
    mllmu.write_split(benchmark, "Test_Set", [person(1, 101), person(9, 9, 209)])
    report = check_data(benchmark)
    assert [problem.split(", the first")[0].split(": ", 1)[1] for problem in report.problems] == [
        f"1 image in both {pair}"
        for pair in ("Full_Set and Test_Set", "Test_Set and retain_90", "Test_Set and retain_95")
    ]


def test_one_image_under_two_entities_is_named(benchmark):
    mllmu.write_split(benchmark, "Retain_Set", [person(1, 301), person(2, 301)])
    problem = only_problem(benchmark)
    assert "Retain_Set/train-00000-of-00001.parquet:1" in problem and "'2', not '1'" in problem


def test_every_bad_row_is_reported_not_only_the_first(benchmark):
    zero, torn = (dataclasses.replace(person(1), photos=(Photo(data, "-"),)) for data in (b"", png(5)[:60]))
    mllmu.write_split(benchmark, "Retain_Set", [zero, torn])
    no_blank = dataclasses.replace(person(3, 303), visual=Questions(cloze=(Open("No blank", "x"),)))
    same = dataclasses.replace(person(4, 304), visual=Questions(choice=(Choice("q", {"A": "x", "B": "x"}, "A"),)))
    mllmu.write_split(benchmark, "ft_Data", [no_blank, same])
    needles = ("(0 bytes)", "damaged PNG", "no blank", "are the same")
    problems = check_data(benchmark).problems
    assert len(problems) == len(needles)
    for needle in needles:
        assert sum(needle in problem for problem in problems) == 1


def test_empty_splits_broken_files_and_pickles(benchmark):
    mllmu.write_split(benchmark, "Retain_Set", [])
    (benchmark / "forget_15").mkdir()
    (benchmark / "forget_15" / "train.parquet").write_bytes(b"PAR1 broken")
    (benchmark / "forget_15" / "forget.pt").write_bytes(b"\x80\x04.")
    report = check_data(benchmark)
    assert any("Retain_Set is empty" in problem for problem in report.problems)
    assert any("not a readable parquet" in problem for problem in report.problems)
    assert any("never loaded" in note and "forget.pt" in note for note in report.notes)


def test_what_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(DataError, match="no known data format"):
        check_data(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        check_data(tmp_path / "absent")


@pytest.fixture
def own(tmp_path):
    (tmp_path / "photos").mkdir()
    for name, seed in (("ann", 1), ("ann2", 2), ("bob", 3)):
        (tmp_path / "photos" / f"{name}.png").write_bytes(png(seed))
    ann, bob = {"image": "photos/ann.png", "entity": "ann"}, {"image": "photos/bob.png", "entity": "bob"}
    rows = {
        "forget": [
            {**ann, "question": "Where was she born?", "answer": "Rome", "options": ["Oslo", "Rome", "Lima"]},
            {**ann, "question": "She lives in __.", "answer": "Oslo"},
            {**ann, "image": "photos/ann2.png", "question": "What does she do?", "answer": "She bakes."},
            {"entity": "ann", "question": "Where was Ann born?", "answer": "Rome", "options": ["Rome", "Lima"]},
        ],
        "retain": [{**bob, "question": "Where was he born?", "answer": "Lima", "options": ["Rome", "Lima"]}],
    }
    write_own(tmp_path, rows)
    return tmp_path, rows


def write_own(folder, rows):
    for split, lines in rows.items():
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")


def test_own_data_are_read_by_entity_and_photo(own):
    folder, _ = own
    first, second, text = jsonl.read_split(folder, "forget")
    assert first.photos[0].data == png(1) and second.photos[0].data == png(2) and text.photos == ()
    assert first.visual.choice == (Choice("Where was she born?", {"A": "Oslo", "B": "Rome", "C": "Lima"}, "B"),)
    assert first.visual.cloze == (Open("She lives in __.", "Oslo"),)
    assert second.visual.generation == (Open("What does she do?", "She bakes."),)
    assert text.textual.choice[0].answer_text == "Rome" and text.visual == Questions()
    report = check_data(folder)
    assert report.ok and report.format == "own data (JSONL)" and report.splits["forget"].images == 2


def test_own_data_may_name_people_and_describe_photos(own):
    folder, rows = own
    bob = rows["retain"][0]
    asked = {**bob, "name": "Bob Lee", "question": "What is worn?", "answer": "a cap", "options": ["a cap", "nothing"]}
    write_own(folder, {"retain": [bob, {**asked, "description": True}, {**asked, "description": False}]})
    (read,) = jsonl.read_split(folder, "retain")
    assert read.name == "Bob Lee" and len(read.visual.choice) == 2
    assert read.visual.description == (Choice("What is worn?", {"A": "a cap", "B": "nothing"}, "A"),)
    report = check_data(folder)
    assert report.ok and report.splits["retain"].visual_description == 1


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        ({"answer": "Paris"}, "answer 'Paris' is no option"),
        ({"answer": "  "}, "answer is '  '"),
        ({"option": ["a", "b"]}, "did you mean 'options'"),
        ({"options": ["Lima"]}, "1 options"),
        ({"options": ["Lima", "Lima"]}, "different ones"),
        ({"options": "Lima"}, "expected a list of texts"),
        ({"image": "photos/gone.png"}, "cannot be read"),
        ({"image": "../../etc/passwd"}, "outside the data folder"),
        ({"image": "/etc/passwd"}, "outside the data folder"),
        ({"image": 3}, "expected a path"),
        ({"entity": None}, "entity is None"),
        ({"name": 3}, "name is 3"),
        ({"description": "yes"}, "true or false"),
        ({"description": True, "options": None}, "a description without options"),
        ({"description": True, "image": None}, "a description without image"),
    ],
)
def test_a_bad_line_of_own_data_is_named(own, change, needle):
    folder, rows = own
    write_own(folder, {"retain": [rows["retain"][0], {**rows["retain"][0], **change}]})
    with pytest.raises(DataError, match=needle) as caught:
        jsonl.read_split(folder, "retain")
    assert str(caught.value).startswith(f"{folder}/retain.jsonl:2") and "\n" not in str(caught.value)
    assert needle in only_problem(folder)


def test_own_data_that_are_no_json_or_overlap(own):
    folder, rows = own
    (folder / "test.jsonl").write_text('{"entity": "ann",\n')
    assert "test.jsonl:1: not JSON" in only_problem(folder)
    write_own(folder, {"test": rows["forget"][2:3]})
    assert "1 image in both forget and test" in only_problem(folder)
    (folder / "test.jsonl").unlink()
    write_own(folder, {"retain": [*rows["retain"], {**rows["forget"][3], "question": "Again?"}]})
    assert "1 entity is in both forget and retain: ann" in only_problem(folder)
    (folder / "retain.jsonl").unlink()
    assert "retain.jsonl is missing" in only_problem(folder)


def write_table(folder, split: str, rows: list[dict], name: str = "train-00000-of-00001.parquet") -> None:
    (folder / split).mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / split / name)


def published_row(number: int, identity: object, **others: object) -> dict:
    """A row as published, whose ID is what somebody's table made of it."""
    question = {"Question": "What job?", "Options": {"A": "pilot", "B": "baker"}, "Correct_Answer": "A"}
    tasks = {"Image_Textual_Questions": [question], "Pure_Text_Questions": [question]}
    asked = {"Type": "Image_Textual", "Question": "Lives in __.", "Ground_Truth": "Rome"}
    image = {"bytes": png(number), "path": None}
    return {"image": image, "ID": identity, "Classification_Task": tasks, "Mask_Task": [asked], **others} | {
        "Generation_Task": [asked]
    }


ANOTHER_SPELLING = [(1, 1.0), ("1", " 1 "), ("001", 1), ("Zo\u00eb", "Zoe\u0308"), ("1.0", "01")]


@pytest.mark.parametrize(("here", "there"), ANOTHER_SPELLING)
def test_a_person_is_the_same_however_the_id_is_written(tmp_path, here, there):
    """In forget and retain it is refused; of a test set it is the one who is forgotten."""
    write_table(tmp_path, "forget_5", [published_row(0, here)])
    write_table(tmp_path, "retain_95", [published_row(1, there)])
    assert "1 entity is in both forget_5 and retain_95" in only_problem(tmp_path)
    with pytest.raises(DataError, match="is in both forget_5 and retain_95"):
        read_forget_retain(str(tmp_path), "forget_5", "retain_95")
    other = type(there)(9) if isinstance(there, int | float) else "9"
    write_table(tmp_path, "retain_95", [published_row(1, other)])
    write_table(tmp_path, "Test_Set", [published_row(2, there)])
    assert check_data(tmp_path).ok
    cells = evaluation_cells(str(tmp_path), "forget_5", "retain_95")
    assert [p.entity for p in cells["test"]] == [p.entity for p in cells["forget"]]


def refused_alike(path, needle: str) -> None:
    """The check's problem, training's error and the evaluation's are about the same thing."""
    report = check_data(path)
    assert not report.ok and any(re.search(needle, problem) for problem in report.problems), report.problems
    with pytest.raises(DataError, match=needle):
        read_forget_retain(str(path), "forget_5", "retain_95")
        evaluation_cells(str(path), "forget_5", "retain_95")


class TestOkMeansThatItStarts:
    @pytest.fixture
    def folder(self, tmp_path):
        write_table(tmp_path, "forget_5", [published_row(0, "0")])
        write_table(tmp_path, "retain_95", [published_row(1, "1")])
        assert check_data(tmp_path).ok
        return tmp_path

    @pytest.mark.parametrize("here", ["00000-of-00002", "00001-of-00002"])
    def test_a_missing_shard(self, folder, here):
        for split in ("forget_5", "retain_95"):
            (folder / split / "train-00000-of-00001.parquet").rename(folder / split / f"train-{here}.parquet")
            refused_alike(
                folder, f"{split}: 1 of 2 shards missing: train-0000{'1' if here[4] == '0' else '0'}-of-00002"
            )
            (folder / split / f"train-{here}.parquet").rename(folder / split / "train-00000-of-00001.parquet")

    def test_shards_of_two_downloads(self, folder):
        write_table(folder, "forget_5", [published_row(0, "0")], "train-00000-of-00002.parquet")
        write_table(folder, "forget_5", [published_row(3, "3")], "train-00001-of-00002.parquet")
        refused_alike(folder, "holds both train-")

    def test_a_test_set_of_others(self, folder):
        write_table(folder, "Test_Set", [published_row(2, "7")])
        refused_alike(folder, "Test_Set: shows nobody of forget_5")

    def test_a_split_in_a_format_that_is_not_read(self, folder):
        (folder / "forget_5" / "train-00000-of-00001.parquet").unlink()
        (folder / "forget_5" / "train.csv").write_text("ID\n1\n")
        refused_alike(folder, "forget_5.*train.csv")

    def test_a_side_without_photos(self, tmp_path):
        line = {"entity": "a", "question": "Who?", "answer": "A"}
        (tmp_path / "forget.jsonl").write_text(json.dumps(line) + "\n")
        (tmp_path / "a.png").write_bytes(png(0))
        (tmp_path / "retain.jsonl").write_text(json.dumps(line | {"entity": "b", "image": "a.png"}) + "\n")
        refused_alike(tmp_path, "forget: holds no image")

    def test_splits_that_are_named(self, folder):
        write_table(folder, "forget_10", [published_row(0, "0")])
        assert not check_data(folder, forget_split="forget_10", retain_split="retain_90").ok
        assert check_data(folder, forget_split="forget_10", retain_split="retain_95").ok
        same = check_data(folder, forget_split="forget_5", retain_split="forget_10")
        assert any("in both" in problem for problem in same.problems)

    def test_what_runs_write_into_the_data_folder_is_no_split(self, folder):
        for name, file in (("run", "metrics.jsonl"), ("eval", "samples.jsonl"), ("merged", "config.json")):
            (folder / name).mkdir()
            (folder / name / file).write_text('{"step": 1}\n')
            (folder / name / "rank-0.pt").write_bytes(b"")
        report = check_data(folder)
        assert report.ok and set(report.splits) == {"forget_5", "retain_95"} and report.notes == []


def test_image_and_images_of_one_row_are_both_read(tmp_path):
    images = [{"bytes": png(5), "path": None}, {"bytes": png(0), "path": None}]
    write_table(tmp_path, "forget_5", [published_row(0, "0", images=images), published_row(6, "0", images=images)])
    write_table(tmp_path, "retain_95", [published_row(1, "1")])
    forget, _ = read_forget_retain(str(tmp_path), "forget_5", "retain_95")
    assert [len(profile.photos) for profile in forget] == [2, 3]
