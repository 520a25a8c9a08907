"""Tables of the documents, made from the JSON files in benchmarks/results. A block of a Markdown file

    <!-- table: FILE.json NAME -->
    <!-- end -->

at the left edge, in docs/ or benchmarks/, holds a table of benchmarks/results/FILE.json: what `tables` of this JSON has
under NAME, {"head": [...], "rows": [[...]], "left": columns of text}; or one of `MAKERS`; or the table of a study.

    python benchmarks/tables.py            # fill every block
    python benchmarks/tables.py --check    # exit code 1 where a document is not what the results say
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"^<!-- table: (\S+\.json) (.+?) -->\n(?:(?!<!-- table: ).*\n)*?<!-- end -->\n", re.MULTILINE)


class TableError(Exception):
    """A document asks for a table that the results do not have."""


def table(head: Iterable[Any], rows: Iterable[Iterable[Any]], left: int = 1) -> list[str]:
    """A Markdown table whose first `left` columns are text and whose others are numbers."""
    head = list(head)
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return ["| " + " | ".join(map(str, cells)) + " |" for cells in (head, rule, *rows)]


def origin(report: dict[str, Any]) -> list[str]:
    """Where figures come from: device, date, versions, command."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [f"{report['device']}; {report['date']}; {versions}."]
    return [*lines, "", f"    {report['command']}"] if "command" in report else lines


def step_table(report: dict[str, Any]) -> list[str]:
    on_gpu = report["datasheet_flops_per_s"] is not None
    tokens = report["tokens"]
    lines = [
        f"{report['model']}, loss at `{report['site']}`, {tokens['visual']} visual and {tokens['text']} text tokens, "
        f"{report['dtype']}. Ceilings of the same run: {report['matmul_flops_per_s'] / 1e12:.3g} TFLOP/s (matrix "
        f"product), {report['copy_bytes_per_s'] / 1e9:.3g} GB/s (copy). Roofline: the longer of FLOPs at the first and "
        "least bytes (weights once a pass, update, cached features) at the second."
    ]
    head = [
        "", "step", "ms/image", "quartiles", "images/s", "speed-up", "batch", "GFLOP/image", "counted", "MB/image",
        "roofline ms", "of matmul", *(["MFU"] if on_gpu else []), "peak MB", "loss error", "gradient error",
    ]  # fmt: skip
    rows = []
    for row in report["rows"]:
        low, high = row["ms_per_image_quartiles"]
        cells = [f"({row['variant']})", row["name"], f"{row['ms_per_image']:.2f}", f"{low:.2f}-{high:.2f}"]
        cells += [f"{row['images_per_s']:.2f}", "" if row["speedup"] is None else f"{row['speedup']:.2f}x"]
        cells += [str(row["batch"]), f"{row['flops_per_image'] / 1e9:.2f}"]
        cells += ["" if row["counted_flops_per_image"] is None else f"{row['counted_flops_per_image'] / 1e9:.2f}"]
        cells += [f"{row['least_bytes_per_image'] / 1e6:.1f}", f"{row['roofline_ms_per_image']:.2f}"]
        cells += [f"{row['mfu_of_matmul']:.0%}", *([f"{row['mfu']:.1%}"] if on_gpu else [])]
        few = f" ({alone})" if (alone := row.get("peak_batch", row["batch"])) != row["batch"] else ""
        cells += ["" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}{few}"]
        cells += [f"{row['max_loss_error']:.0e}", f"{row['max_grad_error']:.0e}"]
        rows.append(cells)
    lines += ["", *table(head, rows, left=2), ""]
    lines.append(
        "Speed-up: every step is taken once a round, and this is the median over rounds of the time of step "
        f"({report.get('speedup_over', 'a')}) over that of the step in the same round. It need not equal the ratio of "
        "the medians in the table."
    )
    last = report["rows"][-1] if report["rows"] else None
    if last is not None:
        share = report["loss_ms_per_image"] / last["ms_per_image"]
        lines.append(
            f"The loss kernel alone takes {report['loss_ms_per_image']:.3g} ms an image, {share:.1%} of step "
            f"({last['variant']}). Peak: bytes in live tensors, models and optimiser included, built alone, with fewer "
            "images where that many had no room (in brackets)."
        )
    lines += [f"({letter}) is left out: {reason}." for letter, reason in report["left_out"].items()]
    return lines


def kernels_table(report: dict[str, Any]) -> list[str]:
    lines = [
        f"Copy ceiling {report['copy_gb_per_s']} GB/s; torch {report['torch']}, {report['device']}; {report['date']}.",
        "",
    ]
    head = ["operation", "shape", "dtype", "implementation", "batch", "ms", "GB/s", "of copy"]
    rows = [
        [
            *(str(row[key]) for key in ("operation", "shape", "dtype", "implementation", "batch")),
            *(f"{row['ms']:.3f}", f"{row['gb_per_s']:.0f}", f"{row['of_copy']:.0%}"),
        ]
        for row in report["rows"]
    ]
    return lines + table(head, rows, left=4)


def scaling_table(report: dict[str, Any]) -> list[str]:
    head = ["what grows", "value", "ms/image measured", "GFLOP/image planned", "GFLOP/s", "planned / measured"]
    rows = [
        [
            *(row["axis"], str(row["value"]), f"{row['ms_per_image']:.2f}", f"{row['flops_per_image'] / 1e9:.3f}"),
            *(f"{row['flops_per_image'] / row['ms_per_image'] / 1e6:.1f}", f"{row['predicted_over_measured']:.2f}"),
        ]
        for row in report["rows"]
    ]
    return [report["note"], "", *table(head, rows)]


def registers_table(report: dict[str, Any]) -> list[str]:
    """Registers a thread by kernel and target, the worst of the kernel's variants, with all spills added up."""
    targets = list(dict.fromkeys(row["target"] for row in report["entries"]))
    groups: dict[tuple[str, Any, int], list[dict[str, Any]]] = {}
    for row in report["entries"]:
        groups.setdefault((row["kernel"], row["H"], row["warps"]), []).append(row)
    said = (
        f"{len(report['entries'])} compiled entries; Triton {report['triton']}, torch {report['torch']}, "
        f"{report['date']}. Registers a thread, the most of the kernel's variants:"
    )
    rows = []
    for (kernel, H, warps), entries in groups.items():
        most = [max(row["registers"] for row in entries if row["target"] == target) for target in targets]
        cells = [f"`{kernel}`", H or "any", warps, len(entries) // len(targets), *most]
        rows.append([*cells, max(row["shared"] for row in entries), sum(row["spills"] for row in entries)])
    return [said, "", *table(["kernel", "H", "warps", "variants", *targets, "shared bytes", "spills"], rows)]


MAKERS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "origin": origin,
    "step": step_table,
    "kernels": kernels_table,
    "scaling": scaling_table,
    "registers": registers_table,
}


def made(report: dict[str, Any], name: str) -> list[str]:
    """The lines of a block. Raises TableError where nothing makes a table of this name."""
    plain = report.get("tables", {})
    if name in plain:
        return table(plain[name]["head"], plain[name]["rows"], plain[name].get("left", 1))
    if name in MAKERS:
        return MAKERS[name](report)
    from study import find  # late: studies need torch

    try:
        return find(name).table(report)
    except ValueError as error:
        raise TableError(
            f"no table {name!r}: in the file are {sorted(plain)}, made are {sorted(MAKERS)}, {error}"
        ) from None


def fill(text: str, results: Path = RESULTS) -> str:
    """A document with every block made anew from the JSON files in `results`. Raises TableError."""

    def filled(block: re.Match[str]) -> str:
        file, name = block.groups()
        if not (results / file).exists():
            raise TableError(f"{results / file} is not there")
        lines = made(json.loads((results / file).read_text()), name)
        return "".join(f"{line}\n" for line in (f"<!-- table: {file} {name} -->", *lines, "<!-- end -->"))

    new, count = BLOCK.subn(filled, text)
    if count != len(re.findall("^<!-- table: ", text, re.MULTILINE)):
        raise TableError("a block is not closed by <!-- end -->, or names no FILE.json")
    return new


def empty_block(file: str, name: str) -> str:
    return f"<!-- table: {file} {name} -->\n<!-- end -->\n"


def documents() -> list[Path]:
    return [path for folder in ("docs", "benchmarks") for path in sorted((ROOT / folder).rglob("*.md"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a document is out of date")
    arguments = parser.parse_args()
    wrong = []
    for path in documents():
        try:
            new = fill(path.read_text())
        except TableError as error:
            sys.exit(f"{path.relative_to(ROOT)}: {error}")
        if new != path.read_text():
            wrong.append(f"{path.relative_to(ROOT)}")
            if not arguments.check:
                path.write_text(new)
    if arguments.check and wrong:
        sys.exit(f"{', '.join(wrong)}: not what benchmarks/results say; run python benchmarks/tables.py")


if __name__ == "__main__":
    main()
