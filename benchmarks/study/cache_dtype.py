"""What a teacher cache in fewer bits does to unlearning.

The recipe is the demo's without views, since views are not cached; all else is equal, the seeds' vanilla models too.
"""

from typing import get_type_hints

from world import World

from fastvkd.settings import Settings
from study import Row, Study, share_columns


def measure(world: World, variant: str) -> Row:
    folder = world.out / f"cache-{variant}"
    fixed = {"augment": False, "cache_dtype": variant, "cache_dir": str(folder)}
    model, run = world.unlearn({**world.spec.overrides, **fixed})
    return {
        "cache_bytes": sum(file.stat().st_size for file in folder.rglob("features-*.bin")),
        "seconds": run.seconds["prepare"] + run.seconds["unlearn"],
        **world.accuracy(model),
    }


STUDY = Study(
    about="Teacher cache in fewer bits",
    variants={dtype: {} for dtype in get_type_hints(Settings)["cache_dtype"].__args__},
    row=measure,
    columns={
        "cache_dtype": lambda row: row["variant"],
        "seed": lambda row: row["seed"],
        "MB": lambda row: f"{row['cache_bytes'] / 1e6:.1f}",
        **share_columns(),
        "s": lambda row: f"{row['seconds']:.0f}",
    },
    left=1,
    seeds=(0,),
)
