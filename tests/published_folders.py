"""Small folders in the published schemas of CLEAR and UMU-Bench, quirks included."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TEXTS = pa.list_(pa.string())
NAMES = ("Ann Ash", "Bob Oak", "Cem Elm", "Dia Fir")
CITIES = ("Oslo", "Rome", "Lima", "Bonn")


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, split: str, rows: list[dict], schema: pa.Schema | None = None) -> Path:
    file = folder / split / "train-00000-of-00001.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), file)
    return file


def photo(seed: int) -> dict:
    return {"bytes": png(seed), "path": None}


def caption_row(person: int, seed: int, perturbed: bool = False) -> dict:
    name, wrong = NAMES[person], [other for other in NAMES if other != NAMES[person]]
    row = {"image": photo(seed), "caption": f"{name} at photo {seed}.", "name": name}
    if perturbed:
        row |= {
            "paraphrased_caption": f"Photo {seed} shows {name}.",
            "perturbed_captions": [f"{other} at photo {seed}." for other in wrong],
            "perturbed_names": wrong,
        }
    return row


CAPTIONS = pa.schema([("image", IMAGE), ("caption", pa.string()), ("name", pa.string())])
PERTURBED = pa.schema(
    [*CAPTIONS, ("paraphrased_caption", pa.string()), ("perturbed_captions", TEXTS), ("perturbed_names", TEXTS)]
)
TOFU = pa.schema([("image", IMAGE), ("caption", pa.string()), ("question", pa.string()), ("answer", pa.string())])
REAL_FACES = pa.schema([("image", IMAGE), ("answer", pa.string()), ("options", TEXTS)])
REAL_WORLD = pa.schema([*REAL_FACES, ("question", pa.string())])


def clear_folder(root: Path) -> Path:
    """Person 0 is forgotten (two photos), 1 to 3 are retained (one each)."""
    people = {"forget05": [(0, 0), (0, 1)], "retain95": [(1, 2), (2, 3), (3, 4)]}
    for split, shown in people.items():
        write(root, split, [caption_row(*one) for one in shown], CAPTIONS)
        captions = [{"image": photo(seed), "caption": caption_row(p, seed)["caption"]} for p, seed in shown]
        questions = [
            {"image": None, "question": f"Where was {NAMES[p]} born?", "answer": f"{NAMES[p]} was born in {CITIES[p]}."}
            for p in dict.fromkeys(p for p, _ in shown)
        ]
        write(root, f"{split}+tofu", captions + questions, TOFU)
    write(root, "full", [caption_row(*one) for shown in people.values() for one in shown], CAPTIONS)
    write(root, "forget05_perturbed", [caption_row(*one, perturbed=True) for one in people["forget05"]], PERTURBED)
    write(root, "retain_perturbed", [caption_row(*one, perturbed=True) for one in people["retain95"][:2]], PERTURBED)
    faces = [{"image": photo(10 + i), "answer": f"Star {i}", "options": ["Star 7", "Star 8"]} for i in range(2)]
    write(root, "real_faces", faces, REAL_FACES)
    world = [
        {"image": photo(20 + i), "question": "Which city is this?", "answer": CITIES[i], "options": ["Kiev", "Baku"]}
        for i in range(2)
    ]
    write(root, "real_world", world, REAL_WORLD)
    return root


def umu_row(person: int, seed: int) -> dict:
    name, options = NAMES[person], dict(zip("ABCD", CITIES, strict=True))

    def both(column: str) -> dict:
        found = {}
        for kind, who in (("unimodal", name), ("muitimodal", "the person in the image")):
            items = {}
            for key, what in (("1", "born"), ("2", "at school")):
                item = {"question": f"Where was {who} {what}?", "answer": f"{name} was {what} in {CITIES[person]}."}
                if column == "Classify":
                    item |= {"options": options, "answer": f"{'ABCD'[person]}. {CITIES[person]}"}
                elif column == "Cloze":
                    item["answer"] = CITIES[person]
                items[key] = item
            found[kind] = items
        return found

    return {
        "ID": f"{person:03d}",
        "image": photo(seed),
        "Biography": f"{name} was born in {CITIES[person]}.",
        "MM_QA": str({"question": {"1": "Who is this?"}, "answer": {"1": name}}),
        "UM_QA": str({"question": {"1": f"Who is {name}?"}, "answer": {"1": f"{name}, it's me."}}),
        **{column: str(both(column)) for column in ("Classify", "Cloze", "Generation")},
    }


def umu_folder(root: Path) -> Path:
    """Person 0 is forgotten, 1 and 2 are retained, 3 is real."""
    rows = [umu_row(person, 30 + person) for person in range(4)]
    write(root, "Full_Set", rows[:3])
    write(root, "forget_5", rows[:1])
    write(root, "retain_95", rows[1:3])
    write(root, "Real_Person_Set", rows[3:])
    return root
