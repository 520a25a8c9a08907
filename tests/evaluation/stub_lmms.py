"""Stands for the Python of an environment that has lmms-eval 0.7.3: takes its command line, and writes its files.

What it notes and how it goes wrong is told by `told.json` beside it.
"""

import json
import os
import sys
import time
from pathlib import Path

HERE = Path(sys.argv[0]).parent
FAULTS = {
    "unknown": "ValueError: Tasks not found: nosuch, other, nosuch, other. Try `lmms-eval --tasks {list}` to list out\n"
    "2026-11-28 | ERROR    | lmms_eval.__main__:cli_evaluate:614 - Error during evaluation: Tasks not found: nosuch",
    "hub": "ConnectionError: Couldn't reach 'lmms-lab/POPE' on the Hub (OfflineModeIsEnabled)\n"
    "tenacity.RetryError: RetryError[<Future at 0x7f0c519af450 state=finished raised ConnectionError>]",
    "file": "FileNotFoundError: Unable to find '/data/test.parquet'\n"
    "tenacity.RetryError: RetryError[<Future at 0x7f89c6163b90 state=finished raised FileNotFoundError>]",
    "module": "ModuleNotFoundError: No module named 'decord'",
    "memory": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
    "silence": "",
}
RESULTS = {
    "results": {
        "faces": {
            "alias": "faces",
            "exact_match,none": 0.25,
            "exact_match_stderr,none": 0.125,
            "exact_match_stderr_clt,none": 0.1,
            "exact_match_stderr_clustered,none": "N/A",
            "score,strict": 1500.0,
            "score_stderr,strict": "N/A",
            "submission,none": None,
        },
        "both": {"alias": "both", "exact_match,none": 0.5, "exact_match_stderr,none": "N/A"},
    },
    "group_subtasks": {"both": ["faces", "places"], "faces": [], "places": []},
    "n-samples": {"faces": {"original": 6, "effective": 4}, "places": {"original": 3, "effective": 3}},
}


def main() -> int:
    told = json.loads((HERE / "told.json").read_text())
    if sys.argv[1] == "-c":
        print(told["version"])
        return 0 if told["version"] else 1
    options = dict(zip(sys.argv[3::2], sys.argv[4::2], strict=True))
    arguments = dict(one.split("=") for one in options["--model_args"].split(","))
    environment = {name: os.environ.get(name) for name in told["ask"]}
    cache = sorted(path.name for path in Path(os.environ["HF_DATASETS_CACHE"]).iterdir())
    (Path(os.environ["HF_DATASETS_CACHE"]) / "photos.arrow").write_text("a copy of photos")
    noted = {
        "pid": os.getpid(),
        "module": sys.argv[1:3],
        "options": options,
        "arguments": arguments,
        "environment": environment,
    }
    noted |= {"cache": cache, "config": json.loads((Path(arguments["pretrained"]) / "config.json").read_text())}
    (HERE / "noted.json").write_text(json.dumps(noted))
    print(
        "Model Responding:   0%|          | 0/4 [00:00<?, ?it/s]\rModel Responding:  50%|█████     | 2/4 [00:00<00:00]"
    )
    if told["fault"] in FAULTS:
        print(f"Traceback (most recent call last):\n{FAULTS[told['fault']]}", file=sys.stderr)
        return 0
    if told["fault"] == "unanswered":
        print("\r 50%|█ | 2/4 [00:00<00:00]\x1b[31mERROR\x1b[0m | llava_hf:f:9 - Error no\nroom in generating")
    if told["fault"] == "sleep":
        time.sleep(600)
    out = Path(options["--output_path"]) / "model"
    out.mkdir(parents=True)
    results = {} if told["fault"] == "form" else RESULTS | told["changed"]
    (out / "20261128_022343_results.json").write_text(json.dumps(results))
    return 1 if told["fault"] == "table" else 0


if __name__ == "__main__":
    sys.exit(main())
