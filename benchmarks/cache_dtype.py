"""What a teacher cache in fewer bits does to unlearning: the demo's figures with float32, bfloat16 and float8 features.

    python benchmarks/cache_dtype.py --json benchmarks/results/cache-dtype.json

The recipe is the demo's without views, since views are not cached; all else is equal, the seeds' vanilla models too.
"""

import argparse
import json
from pathlib import Path
from typing import Any, get_type_hints

from world import World, command, write

from fastvkd.environment import measured_on
from fastvkd.settings import Settings, parse_override

CACHE_DTYPES = get_type_hints(Settings)["cache_dtype"].__args__


def row(world: World, cache_dtype: str, overrides: dict[str, Any]) -> dict[str, Any]:
    folder = world.out / f"cache-{cache_dtype}"
    fixed = {"augment": False, "cache_dtype": cache_dtype, "cache_dir": str(folder)}
    model, run = world.unlearn({**world.spec.overrides, **overrides, **fixed})
    return {
        "cache_dtype": cache_dtype,
        "seed": world.seed,
        "cache_bytes": sum(file.stat().st_size for file in folder.rglob("features-*.bin")),
        "seconds": run.seconds["prepare"] + run.seconds["unlearn"],
        **world.accuracy(model),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/cache-dtype.json"))
    parser.add_argument("--out", type=Path, default=Path("out/cache-dtype"))
    parser.add_argument("--size", default="default", help="default or tiny")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--override", nargs="*", default=[], metavar="key=value", help="settings of all runs")
    arguments = parser.parse_args()
    report: dict[str, Any] = {
        "benchmark": "cache_dtype",
        **measured_on("cpu"),
        "command": command(__file__),
        "size": arguments.size,
        "rows": [],
    }
    overrides = dict(map(parse_override, arguments.override))
    for seed in arguments.seeds:
        world = World(seed, arguments.out, size=arguments.size)
        for cache_dtype in CACHE_DTYPES:
            report["rows"].append(row(world, cache_dtype, overrides))
            print(json.dumps(report["rows"][-1]), flush=True)
            write(arguments.json, report)


if __name__ == "__main__":
    main()
