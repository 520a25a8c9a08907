"""The GPU suite says what it skips and loses nothing to a part that fails."""

import json
import subprocess
import sys
from pathlib import Path

import gpu_suite as suite
import optimizer_step
import pytest
import torch

ROOT = Path(__file__).parents[2]
ABOUT = {"device": "a test", "versions": {"torch": "0"}, "date": "2000-01-01", "command": "none"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU says")
def test_without_a_gpu_every_part_says_why_it_is_skipped(tmp_path):
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_suite.py", "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((tmp_path / "gpu-suite.json").read_text())["parts"]
    assert len(parts) == len(suite.PARTS) == 11
    assert all(part["status"] == "skipped" and "sees no GPU" in part["reason"] for part in parts.values())
    assert (tmp_path / "gpu-suite.md").read_text().count("sees no GPU") == 11


def part(name, run, missing=lambda: None):
    return suite.Part(name, 30, missing, run)


def test_a_part_that_fails_does_not_lose_the_others(tmp_path):
    def failing(folder, seconds):
        command = [sys.executable, "-c", "print('so far'); raise SystemExit('no luck')"]
        suite.command(command, seconds, folder / "failing.log")

    def hanging(folder, seconds):
        suite.command([sys.executable, "-c", "import time; time.sleep(60)"], 1, folder / "hanging.log")

    parts = [
        part("failing", failing),
        part("hanging", hanging),
        part("absent", failing, missing=suite.needs("no_such_module_anywhere")),
        part("good", lambda folder, seconds: {"loss": 1.5}),
    ]
    report = suite.run_parts(parts, tmp_path, seconds=100, about=ABOUT, skipped=["skipped"])
    assert [entry["status"] for entry in report["parts"].values()] == ["failed", "failed", "skipped", "passed"]
    assert "no luck" in report["parts"]["failing"]["reason"] and "failing.log" in report["parts"]["failing"]["reason"]
    assert "ran past 1 s" in report["parts"]["hanging"]["reason"]
    assert json.loads((tmp_path / "gpu-suite.json").read_text()) == report
    assert "loss 1.5" in (tmp_path / "gpu-suite.md").read_text()


def test_parts_beyond_the_time_are_skipped(tmp_path):
    report = suite.run_parts([part("late", lambda *_: {})], tmp_path, seconds=5, about=ABOUT)
    assert report["parts"]["late"]["reason"].startswith("no time left")


def test_the_parts_fit_the_time_and_each_may_take_what_others_leave(tmp_path):
    assert sum(part.seconds for part in suite.PARTS) <= 60 * suite.MINUTES
    given = []

    def run(folder, seconds):
        given.append(round(seconds))
        return {"loss": 0.0}

    parts = [part("a", run), part("absent", run, missing=lambda: "not here"), part("b", run), part("c", run)]
    suite.run_parts(parts, tmp_path, seconds=100, about=ABOUT)
    assert given == [40, 70, 100]  # 30 each: the absent one's, then all that those before did not use
    given.clear()
    suite.run_parts(parts, tmp_path, seconds=50, about=ABOUT)
    assert given == [30, 30, 50]


def test_a_benchmark_that_is_stopped_leaves_its_rows_and_says_so(tmp_path):
    script = tmp_path / "benchmark.py"
    script.write_text(
        "import json, sys, time\n"
        "open(sys.argv[-1], 'w').write(json.dumps({'rows': json.loads(sys.argv[1])}))\n"
        "time.sleep(60)\n"
    )
    result = suite.measured([str(script), "[1]"], 2, tmp_path / "some.json")
    assert result["rows"] == [1] and result["incomplete"].startswith("ran past 2 s")
    with pytest.raises(suite.PartFailedError, match="ran past 2 s"):  # stopped before its first row
        suite.measured([str(script), "[]"], 2, tmp_path / "some.json")


def test_a_kernel_that_is_less_accurate_than_eager_code_fails_its_part(tmp_path, monkeypatch):
    red = {"rows": [1], "gate_failed": [["mse", "LLaVA-7B", "bf16", "loss: error 1"]], "incomplete": "exit code 1"}
    monkeypatch.setattr(suite, "measured", lambda *_: red)
    with pytest.raises(suite.PartFailedError, match="loss: error 1"):
        suite.kernels(tmp_path, 1)


def test_a_step_report_without_all_its_figures_still_makes_a_table():
    report = json.loads((ROOT / "benchmarks" / "results" / "step-tiny-cpu.json").read_text())
    report["rows"][0] |= {"peak_bytes": None, "counted_flops_per_image": None, "speedup": None}
    about = {**ABOUT, "benchmark": "gpu_suite"}
    entry = {"status": "passed", "seconds": 1.0, "result": {**report, "incomplete": "ran past 140 s"}}
    text = suite.markdown({**about, "parts": {"step llava-1.5-13b": entry}})
    assert "incomplete: ran past 140 s" in text and "| (a) |" in text


def test_every_part_without_weights_of_real_size_can_be_rehearsed_on_a_cpu():
    """As long as what it imports is installed; what the parts do is run by the tests below."""
    reasons = {part.name: part.missing() for part in suite.parts_on("cpu")}
    rehearsed = [name for name, reason in reasons.items() if reason is None or reason.startswith("not installed")]
    assert rehearsed == [part.name for part in suite.PARTS[3:]]


def test_the_report_shows_what_any_part_found(tmp_path):
    report = suite.run_parts(
        [
            part(
                "rows",
                lambda *_: {"rows": [{"kind": "bf16", "bytes": 5}, {"kind": "nf4", "bytes": 2, "error": 0.123456}]},
            ),
            part("figures", lambda *_: {"loss": 0.25, "seconds": 3, "note": "words"}),
        ],
        tmp_path,
        seconds=100,
        about=ABOUT,
    )
    text = suite.markdown(report)
    assert "| nf4 | 2 | 0.1235 |" in text and "loss 0.25, seconds 3 |" in text and "words" not in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unlearning, local engine", "unlearning, Qwen2.5-VL", "unlearning, ZeRO-3"])
def test_the_suites_own_unlearning_runs_work_on_a_cpu(tmp_path, name):
    result = next(part for part in suite.parts_on("cpu") if part.name == name).run(tmp_path, 300)
    assert result["step"] == 12 and 0 < result["loss"] < result["first_loss"]


@pytest.mark.slow
def test_the_suite_evaluates_and_attacks(tmp_path):
    result = next(part for part in suite.parts_on("cpu") if part.name == "eval and attack").run(tmp_path, 300)
    assert set(result["cells"]) >= {"forget", "retain"} and result["relearning"]


@pytest.mark.slow
def test_the_suite_measures_quantised_loading(tmp_path):
    result = next(part for part in suite.parts_on("cpu") if part.name == "nf4 and int8").run(tmp_path, 300)
    rows = {row["kind"]: row for row in result["rows"]}
    assert rows["bf16"]["feature_error"] == 0 < rows["int8"]["feature_error"] < rows["nf4"]["feature_error"] < 0.3
    assert rows["nf4"]["tensor_bytes"] < rows["int8"]["tensor_bytes"] < rows["bf16"]["tensor_bytes"]


def test_every_way_of_an_optimisers_step_is_measured():
    kept = []
    report = optimizer_step.measure("tiny", torch.device("cpu"), 1, lambda report: kept.append(len(report["rows"])))
    assert kept == [1, 2, 3, 4, 5] and [row["way"] for row in report["rows"]] == list(optimizer_step.WAYS)
    assert all(row["wall_ms"] > 0 and row["peak_bytes"] > 0 for row in report["rows"])
    calls = {way: text.count("bitsandbytes::optimizer_update_8bit") for way, text in report["profiles"].items()}
    assert calls["adamw_8bit, in buffers"] == 1 and report["tensors"] > 50
