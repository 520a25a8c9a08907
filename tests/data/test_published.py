"""CLEAR and UMU-Bench as published, JSON folders, recognition, hub ids, and `data check` on all of them."""

import base64
import json
import pickle

import pyarrow.parquet as pq
import pytest
from published_folders import (
    CAPTIONS,
    NAMES,
    PERTURBED,
    TOFU,
    caption_row,
    clear_folder,
    photo,
    png,
    umu_folder,
    umu_row,
)
from published_folders import write as write_rows

from fastvkd.data import clear, mllmu, umu
from fastvkd.data.check import check_data
from fastvkd.data.hub import data_folder
from fastvkd.data.sources import evaluation_cells, read_forget_retain, read_split, reader_of, recognise
from fastvkd.errors import DataError, SettingsError
from fastvkd.records import Open, Questions


@pytest.fixture
def clear_data(tmp_path):
    return clear_folder(tmp_path / "clear")


@pytest.fixture
def umu_data(tmp_path):
    return umu_folder(tmp_path / "umu")


def test_clear_is_read_for_training(clear_data):
    forget, retain = read_forget_retain(str(clear_data), "forget_5", "retain_95")  # the default settings' names
    first, second, text = forget
    assert [one.entity for one in (first, second)] == [NAMES[0]] * 2 and first.photos[0].data == png(0)
    (question,) = first.visual.generation
    assert question.answer == "Ann Ash at photo 0." and question.question in clear.CAPTION_QUESTIONS
    assert text.photos == () and text.visual == Questions()
    assert text.textual.generation == (Open("Where was Ann Ash born?", "Ann Ash was born in Oslo."),)
    assert [len(one.photos) for one in retain] == [1, 1, 1, 0, 0, 0]
    assert read_forget_retain(str(clear_data), "forget05", "retain95") == (forget, retain)


def test_the_cells_of_clear(clear_data):
    cells = evaluation_cells(str(clear_data), "forget05", "retain95", "clear")
    assert list(cells) == ["forget", "forget_faces", "retain", "retain_faces", "real_faces", "real_world"]
    assert [len(cells[name]) for name in cells] == [3, 2, 5, 2, 2, 2]
    first = cells["forget"][0]
    (choice,), (truth,) = first.visual.choice, first.visual.truth
    assert choice.answer_text == NAMES[0] and sorted(choice.options.values()) == sorted(NAMES)
    assert choice == clear.read_split(clear_data, "forget05_perturbed")[0].visual.choice[0]  # the same place every time
    assert (truth.answer, truth.paraphrase) == ("Ann Ash at photo 0.", "Photo 0 shows Ann Ash.")
    assert truth.perturbed == tuple(f"{name} at photo 0." for name in NAMES[1:])
    face = cells["forget_faces"][0].visual
    assert face.generation == (Open(clear.FACE_QUESTION, NAMES[0]),) and sorted(face.truth[0].perturbed) == sorted(
        NAMES[1:]
    )
    star = cells["real_faces"][1].visual
    assert star.choice[0].answer_text == "Star 1" and len(star.choice[0].options) == 3
    assert star.truth[0].perturbed == ("Star 7", "Star 8") and star.truth[0].question == clear.FACE_QUESTION
    assert cells["real_world"][0].visual.generation[0].question == "Which city is this?"


def test_places_of_the_right_name_differ_between_photos(clear_data):
    rows = [caption_row(0, seed, perturbed=True) for seed in range(40, 72)]
    write_rows(clear_data, "forget05_perturbed", rows, PERTURBED)
    places = [one.visual.choice[0].answer for one in clear.read_split(clear_data, "forget05_perturbed")]
    assert set(places) == set("ABCD")


def test_clear_without_perturbed_splits_still_has_captions(clear_data):
    for split in ("forget05_perturbed", "retain_perturbed", "real_faces"):
        (clear_data / split / "train-00000-of-00001.parquet").unlink()
    cells = evaluation_cells(str(clear_data), "forget05", "retain95")
    assert list(cells) == ["forget", "retain", "real_world"]
    assert cells["retain"][0].visual.generation and not cells["retain"][0].visual.truth


def test_umu_is_read_for_training_and_evaluation(umu_data):
    forget, retain = read_forget_retain(str(umu_data), "forget_5", "retain_95")
    assert [one.entity for one in (*forget, *retain)] == ["000", "001", "002"]
    assert forget[0].visual.generation == (Open("Who is this?", NAMES[0]),)
    assert forget[0].textual.generation == (Open("Who is Ann Ash?", "Ann Ash, it's me."),)
    cells = evaluation_cells(str(umu_data), "forget_5", "retain_95")
    assert list(cells) == ["forget", "retain", "realworld"]
    one = cells["retain"][0]
    assert one.visual.choice[0].question == "Where was the person in the image born?"
    assert one.visual.choice[0].answer == "B" and one.visual.choice[0].pair == one.textual.choice[0].pair == "1"
    assert [len(part) for part in (one.textual.choice, one.textual.cloze, one.textual.generation)] == [2, 2, 2]


@pytest.mark.parametrize("answer", ["B", "B.", "B. Rome", "Rome"])
def test_answers_of_umu_are_letters_or_texts(umu_data, answer):
    row = umu_row(1, 31)
    row["Classify"] = row["Classify"].replace("B. Rome", answer)
    write_rows(umu_data, "retain_95", [row])
    assert [c.answer for c in umu.read_split(umu_data, "retain_95")[0].visual.choice] == ["B", "B"]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("D. H. Lawrence", "A"), ("A. D. H. Lawrence", "A"), ("D", "D"), ("D. Oslo", "D"), ("C.", "C"), ("Oslo", "D")],
)
def test_an_options_text_may_begin_like_a_letter(answer, letter):
    options = {"A": "D. H. Lawrence", "B": "T. S. Eliot", "C": "D", "D": "Oslo"}
    choice = umu._choice({"question": "Who?", "answer": answer, "options": options}, "1", "here")
    assert choice.answer == letter


def test_two_options_of_the_same_text_cannot_be_the_answer():
    item = {"question": "Who?", "answer": "B. Rome", "options": {"A": "B. Rome", "B": "B. Rome"}}
    with pytest.raises(DataError, match="is no option, or several"):
        umu._choice(item, "1", "here")


def asked(profiles):
    parts = [part for one in profiles for part in (one.visual, one.textual)]
    return {question.question for part in parts for question in (*part.choice, *part.generation, *part.cloze)}


def test_finetuning_on_umu_asks_nothing_that_the_evaluation_asks(umu_data):
    learnt = read_split(str(umu_data), "Full_Set")
    cells = evaluation_cells(str(umu_data), "forget_5", "retain_95")
    assert learnt[0].visual == Questions(generation=(Open("Who is this?", NAMES[0]),))
    assert learnt[0].textual == Questions(generation=(Open("Who is Ann Ash?", "Ann Ash, it's me."),))
    assert not asked(learnt) & asked([one for cell in cells.values() for one in cell])
    forget, retain = read_forget_retain(str(umu_data), "forget_5", "retain_95")
    assert asked(learnt) == asked(forget + retain)  # what was learnt is what is unlearnt


def test_finetuning_on_clear_learns_captions_and_text_questions(clear_data):
    learnt = read_split(str(clear_data), "retain95+tofu")
    _, retain = read_forget_retain(str(clear_data), "forget05", "retain95")
    assert asked(learnt) == asked(retain)


METADATA = [{"Question": "What is his name?", "Answer": "Ann"}, {"Question": "Is he tall?", "Answer": ""}]


def mllmu_row(number, seed):
    question = {"Type": "Image_Textual", "Question": f"Who is {number}?", "Ground_Truth": "Ann"}
    choice = {"Question": "Where?", "Options": {"A": "Oslo", "B": "Rome"}, "Correct_Answer": "B"}
    tasks = {"Image_Textual_Questions": [choice], "Pure_Text_Questions": [choice]}
    row = {"ID": number, "image": photo(seed), "Classification_Task": tasks, "Generation_Task": [question]}
    return row | {"Mask_Task": [question | {"Type": "Pure_Text", "Question": "He is __."}]}


@pytest.fixture
def mllmu_data(tmp_path):
    """As published: of all splits only `ft_Data` has `metadata`; it numbers people otherwise here."""
    root = tmp_path / "mllmu"
    training = [{"ID": f"p{n}", "image": photo(n), "metadata": json.dumps(METADATA)} for n in range(3)]
    write_rows(root, "ft_Data", training)
    for split, people in (("Full_Set", range(3)), ("forget_5", [0]), ("retain_95", [1, 2])):
        write_rows(root, split, [mllmu_row(n, n) for n in people])
    return root


def test_mllmu_is_finetuned_on_metadata_and_otherwise_on_the_splits_own_questions(mllmu_data):
    learnt = read_split(str(mllmu_data), "ft_Data")
    question = Open("What is his name?", "Ann")  # the one without an answer is left out, as published
    assert [one.visual for one in learnt] == [Questions(generation=(question,))] * 3
    assert all(one.textual == Questions() for one in learnt)
    assert [one.visual for one in mllmu.read_split(mllmu_data, "ft_Data")] == [Questions()] * 3
    assert asked(read_split(str(mllmu_data), "Full_Set")) == asked(mllmu.read_split(mllmu_data, "Full_Set"))
    forget, _ = read_forget_retain(str(mllmu_data), "forget_5", "retain_95")
    assert forget == mllmu.read_split(mllmu_data, "forget_5")
    assert check_data(mllmu_data).ok


def test_a_split_without_the_people_of_another_trains_the_gold_model(mllmu_data, umu_data):
    assert [one.entity for one in read_split(str(mllmu_data), "ft_Data-forget_5")] == ["p1", "p2"]
    assert [one.entity for one in read_split(str(umu_data), "Full_Set-forget_5")] == ["001", "002"]
    with pytest.raises(DataError, match="finetune_split=retain_95-forget_5: the two splits have nobody in common"):
        read_split(str(mllmu_data), "retain_95-forget_5")
    (mllmu_data / "retain_95").rename(mllmu_data / "retain-95")
    assert [one.entity for one in read_split(str(mllmu_data), "retain-95")] == ["1", "2"]


@pytest.mark.parametrize(
    ("metadata", "needle"),
    [
        ("[{]", "column metadata: not JSON"),
        ('[{"Question": "<image> Who?", "Answer": "Ann"}]', "the question '<image> Who\\?' holds"),
        ('{"Question": "Who?"}', "column metadata is a dict"),
        ('["Who?"]', r"metadata\[0\] is a str"),
        ('[{"Question": ["Who?"], "Answer": "Ann"}]', r"metadata\[0\]: a list"),
    ],
)
def test_bad_metadata_is_named(mllmu_data, metadata, needle):
    write_rows(mllmu_data, "ft_Data", [{"ID": "0", "image": photo(0), "metadata": metadata}])
    with pytest.raises(DataError, match=f"ft_Data/train-00000-of-00001.parquet:0: {needle}"):
        read_split(str(mllmu_data), "ft_Data")
    assert not check_data(mllmu_data).ok


def test_literals_are_read_and_never_run(umu_data, tmp_path):
    row = umu_row(1, 31) | {"Cloze": f"open({str(tmp_path / 'owned')!r}, 'w')"}
    write_rows(umu_data, "retain_95", [row])
    with pytest.raises(DataError, match="Cloze is no Python literal"):
        umu.read_split(umu_data, "retain_95")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("make", [clear_folder, umu_folder])
def test_json_folders_hold_what_parquet_folders_hold(make, tmp_path):
    root = make(tmp_path / "parquet")
    for file in sorted(root.glob("*/*.parquet")):
        rows = pq.read_table(file).to_pylist()
        folder = tmp_path / "json" / file.parent.name
        folder.mkdir(parents=True)
        for number, row in enumerate(rows):
            if row["image"] is not None and number % 2:
                row["image"] = {"bytes": base64.b64encode(row["image"]["bytes"]).decode()}
            elif row["image"] is not None:
                (folder / f"{number}.png").write_bytes(row["image"]["bytes"])
                row["image"] = f"{number}.png"
        if "forget" in file.parent.name:
            (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        else:
            (folder / "train.json").write_text(json.dumps(rows))

    def content(folder):
        cells = evaluation_cells(str(folder), "forget_5", "retain_95")
        return [
            (name, one.entity, [p.data for p in one.photos], one.visual, one.textual)
            for name, profiles in cells.items()
            for one in profiles
        ]

    assert content(tmp_path / "json") == content(root)
    assert check_data(tmp_path / "json").ok


def test_images_outside_the_folder_and_broken_json_are_refused(umu_data):
    folder = umu_data / "retain_95"
    (folder / "train-00000-of-00001.parquet").unlink()
    for image, needle in (("../../x.png", "outside the data folder"), ("gone.png", "is neither in"), (3, "a int")):
        (folder / "train.json").write_text(json.dumps([umu_row(1, 31) | {"image": image}]))
        with pytest.raises(DataError, match=needle):
            umu.read_split(umu_data, "retain_95")
    (folder / "train.json").write_text("[{]")
    with pytest.raises(DataError, match="not JSON"):
        umu.read_split(umu_data, "retain_95")


def test_photos_may_be_links_as_in_the_cache_of_the_hub(umu_data, tmp_path):
    folder = umu_data / "retain_95"
    (folder / "train-00000-of-00001.parquet").unlink()
    (tmp_path / "blob").write_bytes(png(31))
    (folder / "1.png").symlink_to(tmp_path / "blob")
    (folder / "train.json").write_text(json.dumps([umu_row(1, 31) | {"image": "1.png"}]))
    assert umu.read_split(umu_data, "retain_95")[0].photos[0].data == png(31)


def test_formats_are_recognised(clear_data, umu_data, world):
    assert [recognise(folder).NAME for folder in (clear_data, umu_data, world.data)] == ["clear", "umu", "mllmu"]
    with pytest.raises(SettingsError, match=r"'umu', but .* holds CLEAR"):
        reader_of(clear_data, "umu")
    with pytest.raises(SettingsError, match="allowed: mllmu, clear, umu, jsonl"):
        reader_of(clear_data, "clearer")


def only_problem(folder) -> str:
    report = check_data(folder)
    assert len(report.problems) == 1, report.problems
    return report.problems[0]


def test_sound_folders_pass_the_check_with_their_counts(clear_data, umu_data):
    report = check_data(clear_data)
    assert report.ok and report.format == "CLEAR", report.problems
    counts = report.splits["forget05_perturbed"]
    assert (counts.rows, counts.entities, counts.visual_choice, counts.visual_truth) == (2, 1, 2, 2)
    assert report.splits["retain95+tofu"].text_generation == 3 and report.splits["retain95+tofu"].images == 3
    report = check_data(umu_data)
    assert report.ok and report.format == "UMU-Bench" and report.notes == []
    assert report.splits["Full_Set"].visual_choice == report.splits["Full_Set"].text_cloze == 6


@pytest.mark.parametrize(
    ("split", "row", "schema", "needle"),
    [
        ("retain95", {"caption": " "}, CAPTIONS, "caption is a str"),
        ("retain95", {"image": {"bytes": b"GIF", "path": None}}, CAPTIONS, "unreadable image"),
        ("retain95+tofu", {"image": None, "question": "q", "answer": None}, TOFU, "answer is null"),
        ("retain_perturbed", {"perturbed_names": []}, PERTURBED, "0 wrong options"),
        ("retain_perturbed", {"paraphrased_caption": None}, PERTURBED, "paraphrased_caption is null"),
        (
            "retain_perturbed",
            {"perturbed_captions": ["Dia Fir at photo 4.", "x"]},
            PERTURBED,
            "is among its own wrong answers",
        ),
        ("retain_perturbed", {"perturbed_names": ["a", "a"]}, PERTURBED, "are the same"),
    ],
)
def test_a_bad_row_of_clear_is_named(clear_data, split, row, schema, needle):
    good = caption_row(3, 4, perturbed=True)
    write_rows(clear_data, split, [{name: (good | row).get(name) for name in schema.names}], schema)
    problem = only_problem(clear_data)
    assert needle in problem and f"{split}/train-00000-of-00001.parquet:0" in problem


def test_overlap_and_shared_images_of_clear_are_named(clear_data):
    write_rows(clear_data, "retain95", [caption_row(0, 50), caption_row(1, 2)], CAPTIONS)
    problems = check_data(clear_data).problems
    assert any("1 entity is in both forget05 and retain95: Ann Ash" in problem for problem in problems)
    with pytest.raises(DataError, match="'Ann Ash' is in both forget05 and retain95"):
        read_forget_retain(str(clear_data), "forget05", "retain95")
    write_rows(clear_data, "retain95", [caption_row(1, 0)], CAPTIONS)
    with pytest.raises(DataError, match="the same image"):
        read_forget_retain(str(clear_data), "forget05", "retain95")
    problems = check_data(clear_data).problems
    assert any("1 image in both forget05 and retain95" in problem for problem in problems)


def drop(key):
    def change(row):
        del row[key]

    return change


def replace(column, old, new):
    def change(row):
        assert old in row[column]
        row[column] = row[column].replace(old, new)

    return change


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        (drop("Cloze"), "missing column Cloze"),
        (lambda row: row.update(ID=None), "column ID is empty"),
        (lambda row: row.update(image=None), "column image is null"),
        (replace("Classify", "B. Rome", "E. Rome"), "answer 'E. Rome' is no option"),
        (replace("Generation", "muitimodal", "images"), "no key 'muitimodal'"),
        (replace("Cloze", "'Rome'", "''"), "answer is ''"),
        (replace("MM_QA", "'answer'", "'answers'"), "'question' and 'answer' need to be dicts"),
    ],
)
def test_a_bad_row_of_umu_is_named(umu_data, change, needle):
    row = umu_row(1, 31)
    change(row)
    file = write_rows(umu_data, "retain_95", [row])
    problem = only_problem(umu_data)
    assert needle in problem and str(file) in problem and "\n" not in problem


def test_pairs_of_umu_that_do_not_fit_are_noted(umu_data):
    row = umu_row(1, 31)
    row["Cloze"] = row["Cloze"].replace("'Rome'", "'Bonn'", 1)
    write_rows(umu_data, "retain_95", [row])
    assert any("has the answer 'Rome' about the photo and 'Bonn'" in note for note in check_data(umu_data).notes)


def test_labels_are_checked_with_the_models_processor(clear_data, umu_data, world, monkeypatch):
    report = check_data(world.data, model=str(world.model))
    assert report.ok and any(note.endswith(f"processor of {world.model}") for note in report.notes), report.problems
    from fastvkd.models import answers

    right = answers.collate_answers

    def placeholders_too(processor, pairs, indices, is_forget):
        batch = right(processor, pairs, indices, is_forget)
        batch.predicts[:] = batch.inputs["input_ids"]
        return batch

    monkeypatch.setattr(answers, "collate_answers", placeholders_too)
    report = check_data(world.data, model=str(world.model))
    assert not report.ok and all("image placeholders" in problem for problem in report.problems)

    def one_token_short(processor, pairs, indices, is_forget):
        batch = right(processor, pairs, indices, is_forget)
        for row in batch.predicts:
            row[(row != -100).nonzero()[0]] = -100
        return batch

    monkeypatch.setattr(answers, "collate_answers", one_token_short)
    report = check_data(world.data, model=str(world.model))
    assert report.problems and all(", but the answer is " in problem for problem in report.problems)


def test_hub_ids(tmp_path, monkeypatch):
    asked = {}

    def snapshot(repo, **options):
        asked.update(options, repo=repo)
        return str(tmp_path)

    assert data_folder(tmp_path) == tmp_path
    for path in ("out/data/clear", str(tmp_path / "gone"), "https://x.y/z"):
        with pytest.raises(DataError, match="no such folder"):
            data_folder(path)
    with pytest.raises(DataError, match=r"^therem/CLEAR: neither a folder nor a data set") as caught:
        data_folder("therem/CLEAR")  # the tests run offline
    assert "\n" not in str(caught.value)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert data_folder("therem/CLEAR", local_files_only=True) == tmp_path
    assert asked["repo"] == "therem/CLEAR" and asked["repo_type"] == "dataset" and asked["local_files_only"] is True
    assert "*.parquet" in asked["allow_patterns"] and not any(
        "pkl" in one or "pt" in one for one in asked["allow_patterns"]
    )


def test_pickles_beside_tables_are_never_loaded(clear_data, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    (clear_data / "forget05" / "cache.pkl").write_bytes(pickle.dumps(Bomb()))
    report = check_data(clear_data)
    assert report.ok and any("never loaded" in note for note in report.notes)
    assert not (tmp_path / "owned").exists() and photo(0)["bytes"] == png(0)
