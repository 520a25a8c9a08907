"""lmms-eval, the public harness of benchmarks for multimodal LLMs, run on a model folder: `--benchmark lmms:pope,...`.

It is not a dependency: it may live in a Python environment of its own, which `--lmms-python` names. It is started there
as its command line, with no way to the network, and writes into a folder that is gone afterwards; its figures are read
back. Model names, arguments and the form of its results are those of version 0.7.3.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME

from fastvkd.bounds import is_finite_number
from fastvkd.devices import pick_device, warn_of_slow_bfloat16
from fastvkd.engines.exporting import read_record, settings_of
from fastvkd.errors import DataError, FastVKDError, ModelError, SettingsError, one_line
from fastvkd.evaluation.protocol import OnProgress
from fastvkd.files import read_json_object, write_atomically
from fastvkd.models.folder import local_folder
from fastvkd.models.foreign import read_config
from fastvkd.options import EvalOptions

LOG = "lmms-eval.log"
_MIN_PIXELS = 256 * 28 * 28  # lmms-eval enlarges smaller photos for Qwen-VL
_LINES = 10_000
_INSTALL = "python3 -m venv lmms && lmms/bin/pip install lmms-eval==0.7.3 decord pytz 'filelock<4'"
_BAR = re.compile(r"^(.*?):?\s*\d+%\|.*?\| (\d+)/(\d+) \[[^]]*\]")  # tqdm's
_NOT_AT_HAND = re.compile(
    r"^\S*: (Couldn't (?:find|reach) .*|Unable to find .*|Dataset .* doesn't exist on the Hub .*)$", re.M
)
_UNANSWERED = re.compile(r" - Error (.{1,1000}?) in generating", re.S)  # and goes on with an empty answer
_ERROR = re.compile(r"^((?!tenacity)[\w.]*(?:Error|Exception)(?:: .*)?)$", re.M)


@dataclass(frozen=True)
class Adapter:
    """How lmms-eval runs a family: its `--model`, the dtype that it cannot be told another than ("folder": that of the
    weights; None: any), whether it answers several questions at once, and whether it takes `max_pixels`."""

    name: str
    dtype: str | None = "bfloat16"
    batches: bool = True
    pixels: bool = False


_LLAVA = Adapter("llava_hf", dtype=None, batches=False)
ADAPTERS = {
    "llava": _LLAVA,
    "llava_next": _LLAVA,
    "llava_onevision": _LLAVA,
    "qwen2_vl": Adapter("qwen2_vl", dtype="folder", pixels=True),
    "qwen2_5_vl": Adapter("qwen2_5_vl", pixels=True),
    "qwen3_vl": Adapter("qwen3_vl", pixels=True),
    "internvl": Adapter("internvl_hf", batches=False),
    "gemma3": Adapter("gemma3"),
}


def lmms_figures(options: EvalOptions, progress: OnProgress | None = None) -> dict[str, Any]:
    """What lmms-eval measured of the model on the tasks that `options.benchmark` names: its `version`, `tasks`,
    `adapter`, `device`, `loading`, `max_pixels`, `batch_size`, `max_samples` (the first so many of each task), and
    - `figures`: of every task and group `task`, `metric`, `filter` (how answers were read), `value`, `stderr` (or None)
      and `n`.

    Raises FastVKDError where the package, a task or its data are not there, no adapter fits, or lmms-eval fails. What
    it said then lies in `out` as lmms-eval.log.
    """
    folder = local_folder(options.model)
    adapter, facts, arguments = _told(options, folder)
    if options.lmms_tasks is not None and not any(options.lmms_tasks.glob("**/*.yaml")):
        raise SettingsError(
            f"--lmms-tasks {options.lmms_tasks}: no folder with a task file (.yaml) in it; give another"
        )
    python, version = _found(options)
    log = options.out / LOG
    with tempfile.TemporaryDirectory(prefix="fastvkd-lmms-") as name:
        scratch = Path(name)
        # lmms-eval reads no path with a comma or an equals sign, but a link without them, called like the model.
        model = scratch / re.sub(r"[,=]", "_", folder.resolve().name)
        model.symlink_to(folder.resolve())
        told = ",".join(f"{key}={value}" for key, value in {"pretrained": model, **arguments}.items())
        command = [python, "-m", "lmms_eval", "--model", adapter.name, "--model_args", told]
        # Named twice, a task is no folder of that name, of which lmms-eval would run the task files.
        command += ["--tasks", f"{facts['tasks']},{facts['tasks']}", "--batch_size", str(facts["batch_size"])]
        command += ["--device", facts["device"], "--output_path", f"{scratch}/out", "--verbosity", "WARNING"]
        if options.max_samples is not None:
            command += ["--limit", str(options.max_samples)]
        if options.lmms_tasks is not None:
            command += ["--include_path", str(options.lmms_tasks.resolve())]
        code, said = _run(command, _environment(scratch), progress)
        written = sorted(scratch.glob("out/**/*_results.json"))
        if code or not written or _UNANSWERED.search(said):
            write_atomically(log, said.encode())
            raise _error(said, code, python, log)
        results = read_json_object(written[-1], DataError, "run it again")
    log.unlink(missing_ok=True)
    try:
        figures = figures_of(results)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"lmms-eval {version}: results of another form than 0.7.3's ({one_line(error, 80)}); install that version"
        ) from error
    if not figures:
        raise DataError(
            f"lmms-eval counted nothing on {facts['tasks']} (are its answers judged elsewhere?); name others"
        )
    return {"version": version, **facts, "figures": figures}


def figures_of(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The numbers in a results file of lmms-eval. Raises KeyError and others of its kind where it is none."""
    counts, groups = results["n-samples"], results["group_subtasks"]

    def samples(task: str) -> int:
        return int(counts[task]["effective"]) if task in counts else sum(map(samples, groups[task]))

    return [
        {
            "task": task,
            "metric": metric,
            "filter": how,
            "value": value,
            "stderr": stderr if is_finite_number(stderr := values.get(f"{metric}_stderr,{how}")) else None,
            "n": samples(task),
        }
        for task, values in results["results"].items()
        for key, value in values.items()
        for metric, _, how in [key.partition(",")]
        if how and not re.search("_stderr(_clt|_clustered)?$", metric) and is_finite_number(value)
    ]


def _told(options: EvalOptions, folder: Path) -> tuple[Adapter, dict[str, Any], dict[str, Any]]:
    """The family's adapter, what results state of how it ran, and its arguments."""
    config = read_config(folder)
    family = str(config.get("model_type"))
    if family not in ADAPTERS:
        raise ModelError(
            f"{folder}: lmms-eval has no adapter for {family} that fastvkd knows, but for {', '.join(ADAPTERS)}; "
            "evaluate it with --data"
        )
    adapter = ADAPTERS[family]
    device = pick_device(options.device)
    dtype = adapter.dtype
    if dtype is None:
        dtype = "bfloat16" if options.bf16 or (device.type == "cuda" and not options.fp32) else "float32"
    elif dtype == "folder":
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if (options.fp32 and dtype != "float32") or (options.bf16 and dtype != "bfloat16"):
        flag = "--fp32" if options.fp32 else "--bf16"
        raise SettingsError(f"{flag}: lmms-eval loads this {family} in {dtype} and nothing else; leave it out")
    warn_of_slow_bfloat16(device, getattr(torch, dtype, torch.float32))
    spread = options.device_map == "auto" and device.type == "cuda"
    arguments: dict[str, Any] = {"device_map": "auto" if spread else str(device)}
    if adapter.dtype is None:
        arguments["dtype"] = dtype
    max_pixels = options.max_pixels
    if adapter.pixels:
        max_pixels = max_pixels or settings_of(read_record(folder)).get("max_pixels")
    elif max_pixels is not None:
        raise SettingsError(f"--max-pixels: lmms-eval has it for Qwen-VL alone, and this is {family}; leave it out")
    if max_pixels is not None:
        arguments |= {"max_pixels": max_pixels, "min_pixels": min(max_pixels, _MIN_PIXELS)}
    facts = {
        "tasks": options.lmms,
        "adapter": adapter.name,
        "device": str(device),
        "loading": {"dtype": dtype, "quantize": "none", "device_map": "auto" if spread else "none"},
        "max_pixels": max_pixels,
        "batch_size": options.batch_size if adapter.batches else 1,
        "max_samples": options.max_samples,
    }
    return adapter, facts, arguments


def _found(options: EvalOptions) -> tuple[str, str]:
    """The Python to start lmms-eval with, links in its path kept, since they stand for an environment; its version."""
    python = shutil.which(options.lmms_python or sys.executable)
    if python is None:
        raise SettingsError(f"--lmms-python {options.lmms_python}: no program; name the Python that has lmms-eval")
    python = os.path.abspath(python)
    ask = [python, "-c", "from importlib.metadata import version; print(version('lmms_eval'))"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True)  # noqa: S603 - the program that the user names
    except OSError as error:
        raise SettingsError(f"{python}: {error.strerror}; name the Python that has lmms-eval, --lmms-python") from error
    if done.returncode:
        raise SettingsError(
            f"{python} has no lmms-eval; make an environment for it ({_INSTALL}) and give --lmms-python lmms/bin/python"
        )
    return python, done.stdout.strip()


def _environment(scratch: Path) -> dict[str, str]:
    """That of this process, without a hub's token or a way to the network, but to this machine's own servers.

    Data sets that were loaded from a hub before are found. What is made of other files, photos among them, is written
    beside links to those, into `scratch`.
    """
    environment = {name: value for name, value in os.environ.items() if not re.match("HF_TOKEN|HUGGING_FACE_HUB", name)}
    known = environment.get("LMMS_EVAL_DATASETS_CACHE") or environment.get("HF_DATASETS_CACHE") or f"{HF_HOME}/datasets"
    cache = scratch / "datasets"
    cache.mkdir()
    for data in Path(known).expanduser().glob("*___*"):  # OWNER___NAME; other files' are called by their kind alone
        (cache / data.name).symlink_to(data.resolve())
    offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE")
    nowhere = {"http_proxy", "https_proxy", "all_proxy"}
    return environment | {
        **dict.fromkeys(offline, "1"),
        **dict.fromkeys([*nowhere, *map(str.upper, nowhere)], "http://127.0.0.1:9"),  # where nothing listens
        **dict.fromkeys(["no_proxy", "NO_PROXY"], "127.0.0.1,localhost"),
        **dict.fromkeys(["HF_DATASETS_CACHE", "LMMS_EVAL_DATASETS_CACHE"], str(cache)),
        "WANDB_MODE": "disabled",
        "PYTHONUNBUFFERED": "1",
    }


def _run(command: list[str], environment: dict[str, str], progress: OnProgress | None) -> tuple[int, str]:
    """Exit code of a command and the last lines of what it said, without colours and bars; a bar over the model's
    answers becomes our own. Whatever ends this process's wait ends the command too."""
    said: deque[str] = deque(maxlen=_LINES)
    with subprocess.Popen(  # noqa: S603 - the program that the user names
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:  # a carriage return ends one too
                bar = _BAR.match(line)
                if bar and progress and bar[1] == "Model Responding":
                    progress(int(bar[2]), int(bar[3]), "")
                if rest := re.sub(r"\x1b\[[0-9;]*m", "", line[bar.end() if bar else 0 :]).rstrip():
                    said.append(rest)
        except BaseException:
            process.kill()
            raise
    return process.returncode, "\n".join([*said, ""])


def _error(said: str, code: int, python: str, log: Path) -> FastVKDError:
    """What to tell of a run without figures: lmms-eval ends with exit code 0 whatever went wrong in it."""
    if found := re.search(r"Tasks not found: (.+?)\. Try", said):
        unknown = ",".join(dict.fromkeys(found[1].split(", ")))
        return SettingsError(
            f"--benchmark lmms:{unknown}: lmms-eval has no such task; `{python} -m lmms_eval tasks` "
            "lists them, and --lmms-tasks FOLDER adds your own"
        )
    if found := _NOT_AT_HAND.search(said):
        return DataError(
            f"the data of a task are not at hand ({one_line(Exception(found[1]), 160)}), nothing is downloaded now: "
            "load them once before, with datasets.load_dataset, or name a task of files that are here, --lmms-tasks"
        )
    if found := _UNANSWERED.search(said):
        what = f"lmms-eval left questions unanswered: {found[1]}"
    else:
        errors = _ERROR.findall(said) or said.splitlines() or [f"exit code {code}"]
        what = f"lmms-eval failed: {errors[-1]}"
    mend = "mend what it names"
    if missing := re.search(r"No module named '(\w+)", what):
        mend = f"{python} -m pip install {missing[1]}"
    elif "out of memory" in what:
        mend = "give a smaller --batch-size, or --device-map auto"
    return ModelError(f"{one_line(Exception(what))}; {mend}; {log} has all that it said")
