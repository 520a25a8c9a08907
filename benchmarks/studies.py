"""Runs a study of the demo's data: variants x seeds, measured row by row.

    python benchmarks/studies.py methods --seeds 0 1 2 --jobs 2
    python benchmarks/studies.py my_study.py --only 'noise*'

writes benchmarks/results/NAME.json whenever a row is done, and beside it the table as Markdown. Rows that are there
already, of the same recipe and protocol, are kept when it is run again. benchmarks/study/ has the studies.
"""

import argparse
import fnmatch
import functools
import itertools
import json
import multiprocessing
import os
import shlex
import shutil
import sys
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import tables
import torch
from study import Row, Study, find, names
from world import World

from fastvkd.demo.run import SIZES
from fastvkd.environment import measured_on
from fastvkd.settings import parse_override


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("study", metavar="NAME", help=f"{', '.join(names())}, or a file")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/NAME.json")
    parser.add_argument("--out", type=Path, help="data, caches and runs; default: out/NAME")
    parser.add_argument("--size", choices=SIZES, help="of the demo; default: the study's")
    parser.add_argument("--seeds", type=int, nargs="*", help="default: the study's")
    parser.add_argument("--only", nargs="*", default=["*"], metavar="PATTERN", help="variants, by name")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--override", nargs="*", default=[], metavar="key=value", help="settings of all runs")
    parser.add_argument("--markdown", action="store_true", help="print the table of finished rows and do nothing else")
    arguments = parser.parse_args()
    try:
        study = find(arguments.study)
    except ValueError as error:
        parser.error(str(error))
    name = Path(arguments.study).stem.replace("_", "-")
    file = arguments.json or tables.RESULTS / f"{name}.json"
    if arguments.markdown:
        print("\n".join(study.table(json.loads(file.read_text()))))
        return
    variants = [v for v in study.variants if any(fnmatch.fnmatch(v, pattern) for pattern in arguments.only)]
    if not variants:
        parser.error(f"--only: none of {', '.join(study.variants)}")
    report = run(
        arguments.study,
        cases=list(itertools.product(arguments.seeds or study.seeds, variants)),
        size=arguments.size or study.size,
        out=arguments.out or Path("out") / name,
        file=file,
        jobs=arguments.jobs,
        overrides=arguments.override,
    )
    sys.exit(1 if report["failed"] else 0)


def run(
    name: str,
    *,
    cases: Sequence[tuple[int, str]],
    size: str,
    out: Path,
    file: Path,
    jobs: int = 1,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure the (seed, variant) `cases` that `file` lacks; returns what then stands in it."""
    study = find(name)
    key = functools.partial(study.key, size, overrides=dict(map(parse_override, overrides)))
    rows: list[Row] = json.loads(file.read_text())["rows"] if file.exists() else []
    done = {row.get("key") for row in rows}
    missing = [case for case in cases if key(*case) not in done]
    threads = study.threads or max(1, len(os.sched_getaffinity(0)) // jobs)
    torch.set_num_threads(threads)  # which the head tells
    head = {"benchmark": Path(name).stem, **measured_on("cpu"), "command": command(), "jobs": jobs}
    report = {**head, "threads_a_job": threads, **study.protocol(), "rows": rows, "failed": []}
    with ProcessPoolExecutor(
        jobs,
        multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(threads,),
        max_tasks_per_child=1 if study.fresh else None,
    ) as pool:
        world = functools.partial(world_of, size, out, tuple(overrides))
        if study.fresh:  # no row's process is to be the one that trains
            list(pool.map(functools.partial(train_vanilla, world), dict.fromkeys(seed for seed, _ in missing)))
        futures = {pool.submit(measure, name, world, *case): case for case in missing}
        for future in as_completed(futures):
            seed, variant = futures[future]
            if (error := future.exception()) is not None:
                report["failed"].append(
                    {"seed": seed, "variant": variant, "reason": f"{type(error).__name__}: {error}"}
                )
                traceback.print_exception(error)
            else:
                row = {"key": key(seed, variant), "size": size, **future.result()}
                report["rows"] = with_row(study, report["rows"], row)
                print(json.dumps(row), flush=True)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(report, indent=1) + "\n")
    shutil.rmtree(out / "processes", ignore_errors=True)
    document = file.with_suffix(".md")
    if not document.exists():
        blocks = "\n".join(tables.empty_block(file.name, which) for which in ("origin", name))
        document.write_text(f"# {study.about}\n\n{blocks}")
    document.write_text(tables.fill(document.read_text(), file.parent))
    return report


def measure(name: str, world: Any, seed: int, variant: str) -> Row:
    """One row, in a process of the pool."""
    return {"seed": seed, "variant": variant, **find(name).row(world(seed), variant)}


@functools.lru_cache(maxsize=1)
def world_of(size: str, out: Path, overrides: tuple[str, ...], seed: int) -> World:
    """The data of a seed, in a folder of this process alone."""
    own = out / "processes" / str(os.getpid())
    return World(seed, own, size=size, overrides=dict(map(parse_override, overrides)), shared=out)


def train_vanilla(world: Any, seed: int) -> None:
    world(seed).vanilla  # noqa: B018


def with_row(study: Study, rows: list[Row], row: Row) -> list[Row]:
    """`rows` with one more, in the table's order; a row of the same size, seed and variant goes."""
    same = [row[what] for what in ("size", "seed", "variant")]
    others = [r for r in rows if [r[what] for what in ("size", "seed", "variant")] != same]
    return sorted([*others, row], key=study.order)


def command() -> str:
    """How this process was started, for the head of its results."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


if __name__ == "__main__":
    main()
