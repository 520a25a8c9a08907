"""The MLLMU-Bench reader and writer: a round trip, the published quirks, and errors that name their place."""

import io
import pickle
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fastvkd.data import mllmu
from fastvkd.errors import DataError
from fastvkd.records import Choice, Open, Photo, Profile, Questions

COLOURS = ("red", "green", "blue", "black", "white")


def png(color=(200, 30, 30), size=(8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def profile(entity="1", photos=1) -> Profile:
    def questions(word: str) -> Questions:
        return Questions(
            choice=(Choice(f"{word} born where?", {"A": "Oslo", "B": "Rome", "C": "Lima"}, "B"),),
            generation=(Open(f"{word} job?", "A baker in Rome."),),
            cloze=(Open(f"{word} lives in __.", "Lima"),),
        )

    clothes = Choice("What colour are the clothes?", dict(zip("ABCDE", COLOURS, strict=True)), "E")
    return Profile(
        entity=entity,
        photos=tuple(Photo(png((9 * k, int(entity), 5)), "-") for k in range(photos)),
        visual=replace(questions("The person in the photo:"), description=(clothes,)),
        textual=questions("Ann:"),
        biography="Ann, a baker.",
        name="Ann",
    )


def comparable(one: Profile) -> tuple:
    return (one.entity, tuple(photo.data for photo in one.photos), one.visual, one.textual, one.biography, one.name)


@pytest.mark.parametrize(("split", "photos"), [("Full_Set", 1), ("Test_Set", 3)])
def test_what_is_written_is_read_back(tmp_path, split, photos):
    profiles = [profile("1", photos), profile("2", photos)]
    file = mllmu.write_split(tmp_path, split, profiles)
    assert file == tmp_path / split / "train-00000-of-00001.parquet"
    assert mllmu.splits(tmp_path) == [split]
    read = mllmu.read_split(tmp_path, split)
    assert [comparable(one) for one in read] == [comparable(one) for one in profiles]
    assert read[1].source == f"{file}:1"
    expected = mllmu.MLLMU_TEST_SCHEMA if photos > 1 else mllmu.MLLMU_SCHEMA
    assert pq.read_schema(file).equals(expected)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def published_rows() -> list[dict]:
    return [
        {
            "image": {"bytes": png(), "path": None},
            "ID": 7,
            "biography": None,
            "question": "q",
            "answer": "a",
            "Classification_Task": {
                "Image_Textual_Questions": [
                    {"Question": "q?", "Options": {"A": "x", "B": "y", "C": None, "D": "z"}, "Correct_Answer": "z"}
                ],
                "Pure_Text_Questions": None,
            },
            "Generation_Task": None,
            "Mask_Task": [{"Type": "Pure_Text", "Question": "He is __.", "Ground_Truth": "tall"}],
        }
    ]


def write(tmp_path, rows, **extra):
    folder = tmp_path / "forget_10"
    folder.mkdir(exist_ok=True)
    table = pa.Table.from_pylist(rows)
    for name, values in extra.items():
        table = table.append_column(name, pa.array(values))
    pq.write_table(table, folder / "train-00000-of-00001.parquet")
    return folder / "train-00000-of-00001.parquet"


def test_quirks_of_published_files_are_understood(tmp_path):
    write(tmp_path, published_rows(), metadata=['[{"Question": "?"}]'], Directory=["img/7"])
    (one,) = mllmu.read_split(tmp_path, "forget_10")
    assert one.entity == "7" and one.biography == ""
    assert one.visual.choice[0].options == {"A": "x", "B": "y", "D": "z"} and one.visual.choice[0].answer == "D"
    assert one.textual.cloze == (Open("He is __.", "tall"),)
    assert one.visual.generation == ()


def broken(change) -> list[dict]:
    rows = published_rows() + published_rows()
    change(rows[1])
    rows[0] |= dict.fromkeys(rows[1].keys() - rows[0].keys())  # a column is on every row
    return rows


def set_answer(row):
    row["Classification_Task"]["Image_Textual_Questions"][0]["Correct_Answer"] = "E"


def empty_cloze(row):
    row["Mask_Task"][0]["Ground_Truth"] = " "


def no_image(row):
    row["image"] = None


def wrong_type(row):
    row["Mask_Task"][0]["Type"] = "Audio"


def no_id(row):
    row["ID"] = None


def number_for_a_name(row):
    row["name"] = 7


def description_without_answer(row):
    options = {"A": "red", "B": "blue"}
    row["Description_Task"] = [{"Question": "What colour?", "Options": options, "Correct_Answer": "green"}]


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        (set_answer, "Correct_Answer 'E' is no option"),
        (empty_cloze, "Ground_Truth"),
        (no_image, "no image"),
        (wrong_type, "Type is 'Audio'"),
        (no_id, "column ID is empty"),
        (number_for_a_name, "expected the person.s name"),
        (description_without_answer, r"Description_Task\[0\]: Correct_Answer 'green' is no option"),
    ],
)
def test_a_bad_row_is_named(tmp_path, change, needle):
    file = write(tmp_path, broken(change))
    with pytest.raises(DataError, match=needle) as caught:
        mllmu.read_split(tmp_path, "forget_10")
    assert str(caught.value).startswith(f"{file}:1") and "\n" not in str(caught.value)


def test_a_missing_column_and_a_missing_split_are_named(tmp_path):
    rows = published_rows()
    del rows[0]["Mask_Task"]
    file = write(tmp_path, rows)
    with pytest.raises(DataError, match="missing column Mask_Task") as caught:
        mllmu.read_split(tmp_path, "forget_10")
    assert str(file) in str(caught.value)
    with pytest.raises(DataError, match="did you mean 'forget_10'"):
        mllmu.read_split(tmp_path, "forget_1O")
    with pytest.raises(DataError, match="no such folder"):
        mllmu.splits(tmp_path / "absent")


def test_a_pickle_is_never_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    folder = tmp_path / "forget_10"
    folder.mkdir()
    (folder / "train.parquet").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError, match="not a readable parquet"):
        mllmu.read_split(tmp_path, "forget_10")
    assert not (tmp_path / "owned").exists()


def test_the_writer_refuses_what_the_schema_cannot_hold(tmp_path):
    with pytest.raises(DataError, match="2 photos in one row"):
        mllmu.write_split(tmp_path, "Full_Set", [profile("1", 2)])
    odd = Profile("1", profile().photos, Questions(choice=(Choice("q", {"A": "x", "E": "y"}, "A"),)))
    with pytest.raises(DataError, match="letters A to D"):
        mllmu.write_split(tmp_path, "Full_Set", [odd])
    assert mllmu.splits(tmp_path) == []


def test_no_half_written_file_is_left(tmp_path, monkeypatch):
    def no_space(table, where, **options):
        where.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mllmu.pq, "write_table", no_space)
    with pytest.raises(DataError, match="No space left"):
        mllmu.write_split(tmp_path, "Full_Set", [profile()])
    assert list((tmp_path / "Full_Set").iterdir()) == []
