"""Every family, end to end: a tiny model of each learns the demo's people and is made to forget some of them.

The models are those of `tiny_models.py`, the recipe is configs/demo.yaml as it is, and a row has the same figures
before and after, measured as in methods.py. There is no gold model, so the band is that of strangers alone and the
tell-tale has no bar.
"""

from collections.abc import Iterator
from typing import Any

from tables import table
from tiny_models import BLUEPRINTS
from world import World

from fastvkd.models.loading import load_model
from study import Row, Study
from study.methods import BARS, examined, held_to, judged
from study.methods import STUDY as METHODS

KEPT = 0.90  # of descriptions of the forgotten, and of neighbours, has to remain
# By variant, the family and what is changed in the recipe.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": ("llava", {}),
    "llava_next": ("llava_next", {}),
    "llava_onevision": ("llava_onevision", {}),
    "qwen2_5_vl": ("qwen2_5_vl", {}),
    # Behind the last layer that gets further visual features, as docs/method.md has it; and what happens elsewhere.
    "qwen3_vl": ("qwen3_vl", {"sites": {"llm:1": 1.0}}),
    "qwen3_vl at projector": ("qwen3_vl", {}),
    "internvl": ("internvl", {}),
    "smolvlm": ("smolvlm", {}),
}
NAMES = {
    "llava": "LLaVA-1.5",
    "llava_next": "LLaVA-NeXT",
    "llava_onevision": "LLaVA-OneVision",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL, at `llm:1`",
    "qwen3_vl at projector": "Qwen3-VL, at `projector`",
    "internvl": "InternVL",
    "smolvlm": "SmolVLM",
}
_SAME = (
    "unseen photos",
    "person by person",
    "strangers",
    "named right / wrong (strangers wrong)",
    "description: forgotten / strangers / retained / neighbours",
    "told from strangers (chance)",
    "retain",
    "neighbours",
    "real world",
    "text QA, worst set",
    "LLM unchanged",
)


def measure(world: World, variant: str) -> Row:
    name, changes = VARIANTS[variant]
    family = world.of(BLUEPRINTS[name])
    before = examined(family, load_model(family.vanilla))
    model, run = family.unlearn({**family.spec.overrides, **changes})
    return {
        "before": before,
        "after": examined(family, model),
        "unlearning_seconds": sum(run.seconds.values()),
        "images_seen": run.images_seen,
    }


def a_line_a_model(rows: list[Row]) -> Iterator[Row]:
    for row in rows:
        for when in ("before", "after"):
            after = when == "after"
            yield {**row[when], "seed": row["seed"], "family": NAMES[row["variant"]], "trained": after}


def bars(report: dict[str, Any]) -> list[str]:
    """Each figure after forgetting beside its bar, `NO` where it misses."""
    own = [bar.replace("95 (90)", f"{100 * KEPT:.0f}").replace(" and gold's", "") for bar in BARS[:-1]]
    lines = [
        [row["seed"], NAMES[row["variant"]], *judged(list(held_to(row["after"], row["before"], None, KEPT))[:-1])]
        for row in report["rows"]
    ]
    return table(["seed", "family", *own], lines, 2)


STUDY = Study(
    about="Every family, end to end",
    note=bars,
    variants=VARIANTS,
    row=measure,
    lines=a_line_a_model,
    columns={
        "seed": lambda line: line["seed"],
        "family": lambda line: line["family"],
        "forgotten": lambda line: "yes" if line["trained"] else "not yet",
        **{head: METHODS.columns[head] for head in _SAME},
    },
    left=3,
    protocol=lambda: {"kept": KEPT, "samples": METHODS.protocol()["samples"]["chosen"]},
    seeds=(0,),
    threads=1,
    size="small",
)
