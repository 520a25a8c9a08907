"""The demo over several seeds: what it reports."""

from collections.abc import Iterator

from world import World

from fastvkd.demo.run import demo
from fastvkd.options import DemoOptions
from study import Row, Study, percent, share_columns

MODELS = ("vanilla", "gold", "unlearned")


def measure(world: World, variant: str) -> Row:
    report = demo(DemoOptions(out=world.out / "demo", size=world.size, seed=world.seed, gold=True))
    kept = ("seconds", "peak_memory_bytes", "language_model_sha256", "relearning_auc")
    row = {**{key: report[key] for key in kept}, "certificate": report["certificate"]["verdict"]}
    for name in MODELS:
        row[name] = {c: {k: f["accuracy"] for k, f in kinds.items()} for c, kinds in report[name].items()}
    return row


def a_line_a_model(rows: list[Row]) -> Iterator[Row]:
    for row in rows:
        for model in MODELS:
            areas = [row["relearning_auc"][weights].get(model) for weights in ("visual", "all")]
            yield {**row, "model": model, "sets": row[model], "areas": areas, "last": model == "unlearned"}


def worst_text(line: Row) -> str:
    return percent(min(kinds["qa"] for kinds in line["sets"].values() if kinds["qa"] is not None))


def unchanged(line: Row) -> str:
    return "yes" if len(set(line["language_model_sha256"].values())) == 1 else "NO"


STUDY = Study(
    about="The demo on three seeds",
    variants={"demo": {}},
    row=measure,
    lines=a_line_a_model,
    columns={
        "seed": lambda line: line["seed"],
        "model": lambda line: line["model"],
        **share_columns(lambda line: {cell: kinds["vqa"] for cell, kinds in line["sets"].items()}, vqa=True),
        "text QA, worst set": worst_text,
        "relearning AUC, visual / all": lambda line: (
            "" if None in line["areas"] else " / ".join(map(percent, line["areas"]))
        ),
        "LLM unchanged": lambda line: unchanged(line) if line["last"] else "",
        "certificate": lambda line: line["certificate"] if line["last"] else "",
        "s to unlearn": lambda line: f"{line['seconds']['unlearn']:.0f}" if line["last"] else "",
        "s in all": lambda line: f"{sum(line['seconds'].values()):.0f}" if line["last"] else "",
    },
    fresh=True,
)
