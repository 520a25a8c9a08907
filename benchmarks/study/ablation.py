"""Ablation of VKD: site x forget target, with the gentle settings `COMMON` on top of configs/demo.yaml.

`saturate` acts in the projector and has settings of its own.
"""

from typing import Any

from world import World

from fastvkd.models.loading import load_model
from study import Row, Study, share_columns

STEPS = 250
# A length and a rate of its own for every target; a neighbour is left alone only where the target is a stranger.
FIXED: dict[str, Any] = {"ends": "max_steps", "watch_steps": 0, "elsewhere": 0.0, "beside": 0.0, "strangers": None}
COMMON = {
    **FIXED,
    "learning_rate": 1e-3,
    "lambda_forget": 1.0,
    "lambda_retain": 4.0,
    "per_device_train_batch_size": 32,
    "auxiliary_share": 0.25,
}
SATURATE = {
    **FIXED,
    "forget_target": "saturate",
    "saturation_margin": 10.0,
    "lambda_forget": 30.0,
    "lambda_retain": 6.0,
    "auxiliary_images": 512,
    "auxiliary_share": 0.35,
    "learning_rate": 1.5e-3,
}
SITES = ("vision:2", "vision:4", "projector", "llm:2", "llm:4")
TARGETS: dict[str, dict[str, Any]] = {
    "noise": COMMON,
    "mean": COMMON,
    "redirect": COMMON,
    "reference": {**COMMON, "augment": False},
    "repel": {**COMMON, "repel_margin": 3.0},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "(vanilla)": {"site": "-", "target": "(vanilla)"},
    **{
        f"{target} at {site}": {"site": site, "target": target, **settings}
        for target, settings in TARGETS.items()
        for site in SITES
    },
    "saturate": {"site": "projector", "target": "saturate", **SATURATE},
}


def measure(world: World, variant: str) -> Row:
    settings = dict(VARIANTS[variant])
    row = {what: settings.pop(what) for what in ("site", "target")}
    if variant == "(vanilla)":
        return {**row, "seconds": 0.0, **world.accuracy(load_model(world.vanilla))}
    if row["target"] == "reference":
        settings["reference_model"] = str(world.gold)
    chosen = {"sites": {row["site"]: 1.0}, "forget_target": row["target"], "max_steps": STEPS}
    model, run = world.unlearn({**chosen, **settings})
    return {**row, "seconds": run.seconds["unlearn"], **world.accuracy(model)}


STUDY = Study(
    about="Site x target",
    variants=VARIANTS,
    row=measure,
    columns={
        "target": lambda row: row["target"],
        "site": lambda row: row["site"],
        **share_columns(),
        "seconds": lambda row: f"{row['seconds']:.0f}",
    },
    protocol=lambda: {"steps": STEPS},
    seeds=(0,),
)
