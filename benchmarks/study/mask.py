"""Whether MMUnlearner's mask helps to retain: gradient difference with and without it, otherwise alike.

Every run is asked every fifth step how many forget and retained photos it still knows, until the first one whose forget
accuracy lies within 0.10 of chance; the retained accuracy there is what is compared. The published rule,
F_forget / F_retain >= 1, lets another share of the weights move on each seed, so the mask is also tried with a share
that is the same on all, and that share is drawn at random as well, which tells the choice of weights from their number.
Learning rate and lambda are the same with and without a mask; a masked run takes more steps.
"""

from typing import Any

from world import World

from fastvkd.demo.data import CHANCE
from study import Row, Study, percent, share_columns

STEPS, EVERY, BATCH, SAMPLES, BAND = 300, 5, 16, 504, 0.10
STRENGTHS = {
    "lr 2e-4, lambda 1": {"learning_rate": 2e-4, "lambda_retain": 1.0},
    "lr 4e-4, lambda 2": {"learning_rate": 4e-4, "lambda_retain": 2.0},
}
_FISHER = {"granularity": "weight", "batches": 32}
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "ratio at least 1": {"saliency": {**_FISHER, "threshold": 1.0}},
    "highest ratio, half": {"saliency": {**_FISHER, "fraction": 0.5}},
    "highest ratio, a fifth": {"saliency": {**_FISHER, "fraction": 0.2}},
    "random, half": {"saliency": {**_FISHER, "fraction": 0.5, "score": "random"}},
    "random, a fifth": {"saliency": {**_FISHER, "fraction": 0.2, "score": "random"}},
}
VARIANTS = {f"{strength}; {mask}": (strength, mask) for strength in STRENGTHS for mask in MASKS}


def measure(world: World, variant: str) -> Row:
    """One run: `curve` until the bar, and `reached`, its last point, or None where the bar was not reached."""
    strength, mask = VARIANTS[variant]
    overrides = {"method": "gd", "per_device_train_batch_size": BATCH, **STRENGTHS[strength], **MASKS[mask]}
    row: Row = {"strength": strength, "mask": mask, "reached": None, "curve": []}
    for step, model, run in world.follow(overrides, steps=STEPS, every=EVERY):
        point = {"step": step, **world.accuracy(model, SAMPLES, ("forget", "retain"))}
        row["share"] = run.trained_share
        row["curve"].append(point)
        if abs(point["forget"] - CHANCE) <= BAND:
            row["reached"] = {**point, **world.accuracy(model, SAMPLES, ("test", "realworld"))}
            break
    return row


STUDY = Study(
    about="What MMUnlearner's mask helps",
    variants=VARIANTS,
    row=measure,
    columns={
        "strength": lambda row: row["strength"],
        "mask": lambda row: row["mask"],
        "seed": lambda row: row["seed"],
        "weights that may move": lambda row: percent(row["share"], ".0f"),
        "steps to the bar": lambda row: row["reached"]["step"] if row["reached"] else f"> {row['curve'][-1]['step']}",
        **share_columns(lambda row: row["reached"]),
    },
    protocol=lambda: {"steps": STEPS, "every": EVERY, "batch": BATCH, "samples": SAMPLES, "band": BAND},
    by_seed=False,
    threads=1,
    uses_recipe=lambda variant: False,
)
