"""A small world without faces, for machines that lack the demo's renderers: pictures, questions and random models.

    python benchmarks/tiny_world.py FOLDER --family qwen2_5_vl

FOLDER gets forget.jsonl, retain.jsonl and their pictures, and `model-FAMILY`.
"""

import argparse
import json
from pathlib import Path

from tiny_models import BLUEPRINTS

from fastvkd.data.dead_leaves import dead_leaves
from fastvkd.data.sources import read_forget_retain
from fastvkd.demo.model import Shape

CITIES = ("Rome", "Oslo", "Lima", "Kyoto")
SIDE = 72  # pixels
PEOPLE, PHOTOS = {"forget": 4, "retain": 16}, 3
SIZES = {
    "small": Shape(vision_width=128, vision_layers=4, llm_width=256, llm_layers=4),
    # 80 million weights, nearly all of them in the LLM's linear layers
    "wide": Shape(vision_width=128, vision_layers=4, llm_width=1280, llm_layers=4, heads=8),
}


def write_data(folder: Path) -> None:
    """Every person has a city, and is asked about in every photo: openly and by choice."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (split, people) in enumerate(PEOPLE.items()):
        lines = []
        for person in range(people):
            for photo in range(PHOTOS):
                image = f"{split}-{person}-{photo}.png"
                dead_leaves((SIDE, SIDE), (number, person, photo)).save(folder / image)
                common = {"image": image, "entity": f"{split}-{person}", "answer": CITIES[person % len(CITIES)]}
                lines.append({**common, "question": "Where does this person live?"})
                lines.append({**common, "question": "Which city is this person's home?", "options": CITIES})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_model(folder: Path, family: str, size: str) -> None:
    """A random model and its processor, whose tokenizer knows the questions."""
    forget, retain = read_forget_retain(str(folder), "forget", "retain")
    blueprint, shape = BLUEPRINTS[family], SIZES[size]
    processor = blueprint.processor(forget + retain, shape)
    unfinished = folder / f"unfinished-{family}"
    blueprint.model(processor, shape, 0).save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    unfinished.rename(folder / f"model-{family}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", choices=BLUEPRINTS, default="llava")
    parser.add_argument("--size", choices=SIZES, default="small")
    arguments = parser.parse_args()
    if not (arguments.folder / "retain.jsonl").exists():
        write_data(arguments.folder)
    if not (arguments.folder / f"model-{arguments.family}").exists():
        write_model(arguments.folder, arguments.family, arguments.size)


if __name__ == "__main__":
    main()
