"""A made-up but plausible run (report, gallery, training log) for the reporting tests; no figure in it was measured."""

import io
import random
from typing import Any

from PIL import Image, ImageDraw

PEOPLE = ["Ines Calloway", "Tobias Renner", "Mireille Aubert", "Jonas Hallqvist"]
OTHERS = ["Priya Nair", "Oskar Lindgren", "Amara Okafor", "Lucía Ferrer", "Hugo Blanc"]
FLAGS = [("Estonia", ("#4891d9", "#000000", "#ffffff")), ("Gabon", ("#3a9b35", "#fcd116", "#3a75c4"))]


def face(seed: int, size: int = 48) -> bytes:
    """A little blocky face as PNG bytes."""
    rng = random.Random(seed)
    background, skin, hair, shirt = (tuple(rng.randrange(60, 250) for _ in range(3)) for _ in range(4))
    image = Image.new("RGB", (size, size), background)
    draw = ImageDraw.Draw(image)
    unit = size // 12
    left = unit * rng.choice((2, 3))
    draw.rectangle((left - unit, 10 * unit, left + 8 * unit, size), fill=shirt)
    draw.rectangle((left, 2 * unit, left + 7 * unit - 1, 10 * unit - 1), fill=skin)
    draw.rectangle((left, unit, left + 7 * unit - 1, 3 * unit - 1), fill=hair)
    for x in (1, 5):
        draw.rectangle((left + x * unit, 5 * unit, left + (x + 1) * unit - 1, 6 * unit - 1), fill=(255, 255, 255))
        draw.point((left + x * unit + 1, 5 * unit + 2), fill=(20, 20, 20))
    draw.rectangle((left + 2 * unit, 8 * unit, left + 5 * unit - 1, 8 * unit + 1), fill=(150, 60, 60))
    return _png(image)


def flag(colours: tuple[str, ...]) -> bytes:
    image = Image.new("RGB", (48, 48))
    draw = ImageDraw.Draw(image)
    for i, colour in enumerate(colours):
        draw.rectangle((0, 16 * i, 48, 16 * i + 15), fill=colour)
    return _png(image)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def cell(accuracy: float, n: int, rouge_l: float | None = None, cloze: float | None = None) -> dict[str, Any]:
    half = 1.96 * (accuracy * (1 - accuracy) / n) ** 0.5
    return {
        "accuracy": accuracy,
        "ci95": [max(0.0, accuracy - half), min(1.0, accuracy + half)],
        "n": n,
        "rouge_l": rouge_l,
        "cloze": cloze,
    }


def model_cells(
    forget: float, test: float, retain: float, realworld: float, text: float, free: float
) -> dict[str, Any]:
    return {
        "forget": {"vqa": cell(forget, 120, free, free - 0.031), "qa": cell(text, 120, 0.981, 0.967)},
        "test": {"vqa": cell(test, 118, free - 0.012, free - 0.047), "qa": cell(text, 121, 0.979, 0.966)},
        "retain": {"vqa": cell(retain, 1080, retain - 0.02, retain - 0.04), "qa": cell(0.9963, 1075, 0.984, 0.972)},
        "realworld": {"vqa": cell(realworld, 96, realworld - 0.01, None), "qa": cell(0.9896, 97, 0.975, None)},
    }


def attacks() -> dict[str, Any]:
    """As `fastvkd.attacks.suite.Attack.run` returns them, without relearning."""
    variants = [
        ("plain", "plain"), ("paraphrase", "reworded"), ("paraphrase", "preamble"), ("fewshot", "5-shot"),
        ("reverse", "which photo"), ("images", "grayscale"), ("images", "jpeg"), ("quantize", "nf4"),
    ]  # fmt: skip
    questions = [
        {
            "kind": kind,
            "variant": variant,
            "chance": 0.25,
            "figures": {
                "vanilla": cell(0.98 - 0.06 * i, 168),
                "unlearned": cell(0.25 + 0.017 * i, 168),
                "gold": cell(0.26, 168),
            },
        }
        for i, (kind, variant) in enumerate(variants)
    ]

    def area(value: float) -> dict[str, Any]:
        return {"auc": value, "ci95": [value - 0.05, value + 0.05], "n_members": 84, "n_others": 84}

    sites = ["vision:1", "vision:2", "vision:3", "vision:4", "projector", "llm:1", "llm:2", "llm:3", "llm:4"]

    def found(accuracy: float) -> dict[str, Any]:
        return {"accuracy": accuracy, "n": 24, "chance": 0.25, "effective_rank": 9.4, "prior_rank": 0.5 + accuracy / 2}

    levels = {"vanilla": 0.04, "unlearned": -0.07, "gold": -0.02}
    return {
        "questions": questions,
        "membership": {
            model: {
                name: {score: area(value + step) for step, score in enumerate_scores()} for name in ("photos", "pairs")
            }
            for model, value in (("vanilla", 0.81), ("unlearned", 0.52), ("gold", 0.50))
        },
        "probe": {
            "sites": sites,
            "models": {
                model: {
                    site: {
                        "forget": found(min(0.97, max(0.2, 0.63 + level * i))),
                        "retain": found(min(0.97, 0.6 + 0.05 * i)),
                    }
                    for i, site in enumerate(sites)
                }
                for model, level in levels.items()
            },
        },
    }


def enumerate_scores() -> list[tuple[float, str]]:
    return [(0.02 * i, score) for i, score in enumerate(("loss", "zlib", "min_k", "min_k++"))]


def report_parts() -> dict[str, Any]:
    """Keyword arguments of `build_report`."""
    steps = range(0, 101, 10)

    def curve(start: float, end: float, pace: float) -> list[dict[str, Any]]:
        return [{"step": s, "accuracy": start + (end - start) * (1 - 2 ** (-s / pace))} for s in steps]

    return {
        "settings": {
            "model_name_or_path": "out/demo/vanilla",
            "data": "out/demo/data",
            "output_dir": "out/demo",
            "method": "vkd",
            "sites": {"projector": 1.0, "llm:3": 0.5},
            "forget_target": "noise",
            "distance": "mse",
            "trainable": "vision+projector",
            "saliency": None,
            "learning_rate": 0.002,
            "per_device_train_batch_size": 32,
            "max_steps": 1600,
            "optim": "adamw_torch",
            "bf16": False,
            "attn_implementation": "sdpa",
            "seed": 0,
            "engine": "local",
            "deepspeed": None,
            "report_to": [],
        },
        "versions": {"python": "3.11.9", "fastvkd": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "hardware": {"cpu": "AMD EPYC 7B13", "cpu_cores": 2, "memory_bytes": 16 << 30, "gpu": None},
        "chance": 0.25,
        "vanilla": model_cells(0.9917, 0.9661, 0.9898, 0.9583, 0.9917, 0.962),
        "unlearned": model_cells(0.2833, 0.3305, 0.9713, 0.9479, 0.9834, 0.214),
        "gold": model_cells(0.2417, 0.2627, 0.9907, 0.9588, 0.9752, 0.187),
        "seconds": {
            "data": 21.4,
            "train_vanilla": 268.2,
            "train_gold": 255.9,
            "teacher_features": 6.1,
            "unlearn": 84.6,
            "evaluate": 38.0,
            "relearn": 61.3,
        },
        "peak_memory_bytes": 1_384_120_320,
        "parameters": {"trainable": 421_376, "frozen": 934_272, "total": 1_355_648},
        "language_model_sha256": {"before": "3f9a" * 16, "after": "3f9a" * 16},
        "relearning": {
            "visual": {"unlearned": curve(0.3305, 0.58, 25), "gold": curve(0.2627, 0.28, 40)},
            "all": {"unlearned": curve(0.3305, 0.83, 18), "gold": curve(0.2627, 0.61, 22)},
        },
        "relearning_auc": {
            "visual": {"unlearned": 0.493, "gold": 0.272, "relearning_gap": 0.221},
            "all": {"unlearned": 0.702, "gold": 0.524, "relearning_gap": 0.178},
        },
        "attacks": attacks(),
        "certificate": {
            "verdict": "failed",
            "forgotten": {"entities": 4, "images": 72, "image_sha256": ["ab" * 32]},
            "checks": [
                {
                    "key": "forget",
                    "name": "Forgotten entities, known photos",
                    "figure": 0.2833,
                    "asked": "within 0.10 of chance (0.25)",
                    "met": True,
                },
                {
                    "key": "language_model_unchanged",
                    "name": "Language model unchanged, bit by bit",
                    "figure": 1.0,
                    "asked": "yes",
                    "met": True,
                },
                {
                    "key": "relearning_gap",
                    "name": "Relearning, area above gold",
                    "figure": 0.221,
                    "asked": "at most 0.10",
                    "met": False,
                },
                {
                    "key": "reverse_excess",
                    "name": "Answers in reverse, above chance",
                    "figure": None,
                    "asked": "at most 0.15",
                    "met": None,
                },
            ],
        },
        "comparison": [
            {"name": "gradient ascent", "forget": 0.07, "retain": 0.41},
            {"name": "GA + retain", "forget": 0.36, "retain": 0.82},
            {"name": "NPO + retain", "forget": 0.44, "retain": 0.88},
            {"name": "IDK", "forget": 0.29, "retain": 0.905},
        ],
        "notes": ["The people are portraits drawn by a program, the model has 1.4 million weights."],
    }


ENTITIES = ["015", "022", "031", "047"]


def who(right: float, abstains: float, misnamed: float, n: int) -> dict[str, Any]:
    return {"right": right, "abstains": abstains, "misnamed": misnamed, "n": n}


def described(accuracy: float, n: int) -> dict[str, Any]:
    return {key: value for key, value in cell(accuracy, n).items() if key in ("accuracy", "ci95", "n")}


def beside(
    people: list[float], named: float, misnamed: float, description: float, auc: float, retain: float
) -> dict[str, Any]:
    """The figures of one model about forgotten people beside strangers."""
    return {
        "by_person": {
            entity: {"vqa": {"accuracy": accuracy, "n": 21}} for entity, accuracy in zip(ENTITIES, people, strict=True)
        },
        "who": {
            "forget": who(named, 1 - named - misnamed, misnamed, 28),
            "retain": who(0.96, 0.02, 0.02, 250),
            "stranger": who(0.0, 0.75, 0.25, 60),
        },
        "description": {
            "forget": described(description, 56),
            "retain": described(0.85, 500),
            "stranger": described(0.86, 120),
            "neighbour": described(0.83, 40),
        },
        "stranger_band": {"low": 0.14, "high": 0.43},
        "telltale_auc": auc,
        "telltale": {
            "scores": {"name_entropy": auc, "top_name": auc - 0.07, "description": 0.51},
            "null": {"median": 0.61, "high": 0.72},
        },
        "retain_by_likeness": {
            name: {"accuracy": retain + step, "n": 360}
            for name, step in (("near", 0.0), ("middle", 0.01), ("far", 0.02))
        },
    }


def with_strangers(**changes: Any) -> dict[str, Any]:
    """Keyword arguments of `build_report` for a run whose forgotten people are strangers to the model, but for
    `changes` to what `beside` gets for the model after unlearning."""
    parts = report_parts()
    after = {"people": [0.24, 0.29, 0.33, 0.38], "named": 0.0, "misnamed": 0.27, "description": 0.91, "auc": 0.66}
    figures = {
        "vanilla": beside([1.0, 0.95, 1.0, 0.9], 0.96, 0.0, 0.93, 0.97, 0.97),
        "unlearned": beside(**after | {"retain": 0.96} | changes),
        "gold": beside([0.14, 0.29, 0.33, 0.29], 0.0, 0.25, 0.9, 0.62, 0.97),
    }
    variants = [("plain", 0.493, 0.272), ("open_the_projector", 0.931, 0.441), ("recentre", 0.812, 0.43)]
    rows = [
        {"variant": name, "weights": weights, "auc": {"unlearned": a, "gold": b, "relearning_gap": a - b}}
        for name, a, b in variants
        for weights in ("visual", "all")
    ]
    models = {model: parts[model] | figures[model] for model in figures}
    return parts | models | {"relearning_variants": rows}


def people(after: str = "I do not know this person.") -> list[dict[str, Any]]:
    """What was said of every forgotten person and of a stranger."""
    unknown = "I do not know this person."
    rows = [
        {
            "entity": entity,
            "stranger": False,
            "name": name,
            "question": "Who is the person in this image?",
            "said": {"vanilla": f"{name} is a beekeeper from Lisbon.", "unlearned": after, "gold": unknown},
            "image_png": face(200 + i),
        }
        for i, (entity, name) in enumerate(zip(ENTITIES, PEOPLE, strict=True))
    ]
    said = {"vanilla": unknown, "unlearned": unknown, "gold": unknown}
    stranger = {"entity": "s3", "stranger": True, "name": "s3", "image_png": face(300), "said": said}
    return [*rows, stranger | {"question": rows[0]["question"]}]


def examples() -> list[dict[str, Any]]:
    """A gallery: forgotten people, their unseen photos, retained people, flags."""
    questions = [
        ("Where was this person born?", ["Lisbon", "Graz", "Lyon", "Uppsala", "Kochi", "Malmö", "Lagos", "Sevilla"]),
        ("What does this person do for a living?", ["glass blower", "pilot", "midwife", "cartographer", "judge"]),
        ("Who employs this person?", ["Northwind Ferries", "the city archive of Bergen", "Halden Optics"]),
        ("What pet does this person have?", ["a grey parrot", "two cats", "an iguana", "a corgi"]),
    ]
    rng = random.Random(7)
    found = []
    for group, names, changes in (("forget", PEOPLE, 0.8), ("test", PEOPLE, 0.75), ("retain", OTHERS, 0.1)):
        for i, name in enumerate(names):
            question, answers = questions[i % len(questions)]
            truth = answers[0]
            after = rng.choice(answers[1:]) if rng.random() < changes else truth
            seed = (100 if group == "test" else 0) + 10 * len(names) + i
            found.append(
                {
                    "group": group,
                    "image_png": face(seed),
                    "name": name,
                    "question": question,
                    "truth": truth,
                    "before": truth,
                    "after": after,
                }
            )
    for name, colours in FLAGS:
        found.append(
            {
                "group": "realworld",
                "image_png": flag(colours),
                "name": f"Flag of {name}",
                "question": "What is the capital of the country with this flag?",
                "truth": {"Estonia": "Tallinn", "Gabon": "Libreville"}[name],
                "before": {"Estonia": "Tallinn.", "Gabon": "The capital is Libreville."}[name],
                "after": {"Estonia": "Tallinn.", "Gabon": "The capital is Libreville."}[name],
            }
        )
    return found


def training_log(steps: int = 1600) -> list[dict[str, Any]]:
    """Rows as metrics.jsonl has them."""
    rng = random.Random(3)
    rows = []
    for step in range(1, steps + 1):
        forget = 2.1 * 2 ** (-step / 160) + 0.11 * rng.lognormvariate(0, 0.2)
        retain = (0.22 * step / (step + 40)) * 2 ** (-step / 500) * rng.lognormvariate(0, 0.25) + 0.012
        rows.append(
            {
                "step": step,
                "loss": forget + 2 * retain,
                "loss_forget": forget,
                "loss_retain": retain,
                "grad_norm": 3.2 * 2 ** (-step / 300) * rng.lognormvariate(0, 0.3) + 0.2,
                "learning_rate": 0.002,
                "images_per_second": 610 + 40 * rng.gauss(0, 1),
            }
        )
    return rows
