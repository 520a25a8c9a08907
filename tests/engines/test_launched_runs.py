"""`deepspeed fastvkd/train.py --config configs/demo.yaml` on two CPU ranks: the weights and the figures of one process,
also after a kill, a SIGTERM, and with fewer images than ranks."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import ROOT, TRAIN, kill_tree, launch, ranks_of, start, wait_until
from PIL import Image

from fastvkd import evaluate
from fastvkd.cli import main
from fastvkd.engines.checkpoints import find_latest, load_weights
from fastvkd.exporting import export

PRESETS = ["zero0", "zero2", "zero3"]
STEPS = 12


def demo_arguments(tiny_demo, output: Path, batch: int, **settings) -> list[str]:
    """The demo's own recipe, with augmented views and auxiliary images, on the tiny demo's people."""
    values = {
        "model_name_or_path": tiny_demo.vanilla,
        "data": tiny_demo.data,
        "forget_split": tiny_demo.forget_split,
        "retain_split": tiny_demo.retain_split,
        "cache_dir": tiny_demo.out / "teacher_cache",  # as the demo itself left it
        "output_dir": output,
        # `saturate` starts from whole weights, which no rank has under ZeRO-3: aim at a noise image, more gently.
        "forget_target": "noise",
        "lambda_forget": 1.0,
        "lambda_retain": 4.0,
        "learning_rate": 1e-3,
        "forget_share": 0.33,  # of 24 images and of 2 x 12 as many of each kind
        "auxiliary_images": 256,
        "auxiliary_share": 0.25,
        "per_device_train_batch_size": batch,
        "max_steps": STEPS,
        "warmup_steps": 2,
        "save_steps": 1,
        "save_total_limit": STEPS,
        "device": "cpu",
    }
    values |= settings
    return ["--config", str(ROOT / "configs" / "demo.yaml"), *(f"{key}={value}" for key, value in values.items())]


def on_ranks(preset: str, **settings) -> dict:
    return {"engine": "deepspeed", "deepspeed": preset, **settings}


def weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = find_latest(run)
    assert checkpoint is not None
    return load_weights(checkpoint)


def relative_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm, of all weights as one vector."""
    assert found.keys() == expected.keys()
    a, b = (torch.cat([w[name].double().flatten() for name in expected]) for w in (found, expected))
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def local(tiny_demo, tmp_path_factory) -> Path:
    """One process, all 24 images of a step."""
    out = tmp_path_factory.mktemp("local")
    assert main(["train", *demo_arguments(tiny_demo, out, 24)]) == 0
    return out


@pytest.fixture(scope="module")
def launched(tiny_demo, tmp_path_factory):
    """Preset -> the folder of a run of two ranks with 12 images each; every preset runs once."""
    done: dict[str, Path] = {}

    def run(preset: str) -> Path:
        if preset not in done:
            out = tmp_path_factory.mktemp(preset)
            launch(TRAIN, *demo_arguments(tiny_demo, out, 12, **on_ranks(preset)), log=out / "log")
            done[preset] = out
        return done[preset]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_two_ranks_end_with_the_weights_of_one_process(local, launched, preset) -> None:
    found, expected = weights(launched(preset)), weights(local)
    assert relative_difference(found, expected) < 1e-5
    for name in expected:
        # Softmax does not see a constant added to every key: the gradient of a key's bias is nothing but rounding.
        if not name.endswith("k_proj.bias"):
            assert relative_difference({name: found[name]}, {name: expected[name]}) < 1e-5, name
    figures = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (launched(preset), local)
    ]
    assert [line["step"] for line in figures[0]] == list(range(1, STEPS + 1))
    for there, here in zip(*figures, strict=True):
        for key in ("loss", "loss_forget", "loss_retain", "grad_norm", "learning_rate"):
            assert there[key] == pytest.approx(here[key], rel=1e-4, abs=1e-6)


def kill_at_random_step(process: subprocess.Popen, run: Path, generator: random.Random) -> int:
    """SIGKILL everything once a random checkpoint is there; returns the last step that was saved."""
    wanted = generator.randrange(2, STEPS // 2)  # early: a busy machine may be slow to kill
    wait_until(lambda: (run / f"checkpoint-{wanted}").exists(), process)
    kill_tree(process)
    latest = find_latest(run)
    assert latest is not None
    saved = int(latest.name.removeprefix("checkpoint-"))
    assert wanted <= saved < STEPS, "the run was over before it could be killed"
    return saved


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["zero2", "zero3"])
def test_killed_ranks_resume_where_they_were(tiny_demo, launched, tmp_path, preset) -> None:
    arguments = demo_arguments(tiny_demo, tmp_path, 12, **on_ranks(preset))
    launcher = start(TRAIN, *arguments, log=tmp_path / "log")
    saved = kill_at_random_step(launcher, tmp_path, random.Random(preset))
    output = launch(TRAIN, *arguments, "resume_from_checkpoint=auto", log=tmp_path / "log")
    assert f"resumed from {tmp_path}/checkpoint-{saved} at step {saved}" in output
    assert "moments start from zero" not in output
    assert relative_difference(weights(tmp_path), weights(launched(preset))) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_a_killed_process_resumes_to_the_same_bits(tiny_demo, tmp_path, optim) -> None:
    arguments = demo_arguments(tiny_demo, tmp_path / "killed", 24, optim=optim)
    command = [sys.executable, str(TRAIN), *arguments]
    # float32 sums depend on the number of threads: the same one as here
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    kill_at_random_step(process, tmp_path / "killed", random.Random(optim))
    assert main(["train", *arguments, "resume_from_checkpoint=auto"]) == 0
    assert main(["train", *demo_arguments(tiny_demo, tmp_path / "whole", 24, optim=optim)]) == 0
    found, expected = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_sigterm_to_one_rank_saves_on_all_and_ends_well(tiny_demo, tmp_path) -> None:
    arguments = demo_arguments(tiny_demo, tmp_path, 12, **on_ranks("zero2", max_steps=5000, save_total_limit=1))
    launcher = start(TRAIN, *arguments, log=tmp_path / "log")
    try:
        wait_until(lambda: find_latest(tmp_path) is not None, launcher)
        ranks_of(launcher)[1].send_signal(signal.SIGTERM)
        assert launcher.wait(timeout=120) == 0, (tmp_path / "log").read_text()[-4000:]
    finally:
        kill_tree(launcher)
    output = (tmp_path / "log").read_text()
    assert "SIGTERM: saving at step" in output
    saved = int(output.split("SIGTERM: saving at step ")[1].split()[0])
    assert find_latest(tmp_path) == tmp_path / f"checkpoint-{saved}"


@pytest.mark.slow
def test_sigterm_to_one_process_saves_and_exits_with_0(tiny_demo, tmp_path) -> None:
    arguments = demo_arguments(tiny_demo, tmp_path, 24, max_steps=5000, save_total_limit=1)
    process = subprocess.Popen([sys.executable, str(TRAIN), *arguments], stderr=subprocess.PIPE, text=True)
    wait_until(lambda: find_latest(tmp_path) is not None, process)
    process.terminate()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    saved = int(errors.split("SIGTERM: saving at step ")[1].split()[0])
    assert find_latest(tmp_path) == tmp_path / f"checkpoint-{saved}"


@pytest.mark.slow
def test_another_world_size_takes_weights_and_masters_and_says_so(tiny_demo, launched, tmp_path, capfd, caplog) -> None:
    source = launched("zero2") / f"checkpoint-{STEPS - 2}"
    arguments = demo_arguments(tiny_demo, tmp_path, 24, resume_from_checkpoint=source)
    assert main(["train", *arguments]) == 0
    assert "written by 2 rank(s)" in caplog.text
    assert "moments start from zero" in caplog.text
    assert 0 < relative_difference(weights(tmp_path), load_weights(source)) < 0.05  # two more steps, not a new run


@pytest.mark.slow
def test_fewer_images_than_ranks_cannot_stall_zero3(tiny_demo, tmp_path) -> None:
    """One forget image, three retained: two ranks with three images a step each share them unevenly."""
    data = tmp_path / "data"
    data.mkdir()
    generator = random.Random(0)
    for side, count in (("forget", 1), ("retain", 3)):
        lines = []
        for i in range(count):
            buffer = io.BytesIO()
            Image.frombytes("RGB", (48, 48), generator.randbytes(48 * 48 * 3)).save(buffer, "PNG")
            (data / f"{side}-{i}.png").write_bytes(buffer.getvalue())
            row = {"image": f"{side}-{i}.png", "entity": f"{side}-{i}", "question": "Who?", "answer": f"{side} {i}"}
            lines.append(json.dumps(row) + "\n")
        (data / f"{side}.jsonl").write_text("".join(lines))

    def arguments(output: Path, batch: int, **settings) -> list[str]:
        settings |= {"data": data, "cache_dir": output / "cache", "auxiliary_images": 0, "save_steps": 0}
        return demo_arguments(tiny_demo, output, batch, **settings)

    launch(TRAIN, *arguments(tmp_path / "ranks", 3, **on_ranks("zero3")), log=tmp_path / "log")
    assert main(["train", *arguments(tmp_path / "local", 6)]) == 0
    assert relative_difference(weights(tmp_path / "ranks"), weights(tmp_path / "local")) < 1e-5


@pytest.fixture(scope="module")
def figures_of(tiny_demo, tmp_path_factory):
    """Accuracy on forgotten people's known and unseen photos and on retained people's, of a run's exported model."""

    def measure(run: Path) -> dict[str, float]:
        merged = tmp_path_factory.mktemp("merged") / "model"
        export(run, merged, model_card="")
        figures = evaluate(
            str(merged),
            str(tiny_demo.data),
            forget_split=tiny_demo.forget_split,
            retain_split=tiny_demo.retain_split,
            max_samples=400,
            device="cpu",
        )
        shutil.rmtree(merged)
        return {cell: figures["cells"][cell]["vqa"]["accuracy"] for cell in ("forget", "test", "retain")}

    return measure


EIGHT_BIT = {"optim": "adamw_8bit", "max_steps": 150, "warmup_steps": 20, "save_steps": 0}


@pytest.fixture(scope="module")
def local_figures(tiny_demo, figures_of, tmp_path_factory) -> dict[str, float]:
    out = tmp_path_factory.mktemp("local-8bit")
    assert main(["train", *demo_arguments(tiny_demo, out, 24, **EIGHT_BIT)]) == 0
    return figures_of(out)


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_eight_bit_moments_forget_and_retain_as_much_on_two_ranks(
    tiny_demo, figures_of, local_figures, tmp_path, preset
) -> None:
    arguments = demo_arguments(tiny_demo, tmp_path, 12, **on_ranks(preset, **EIGHT_BIT))
    launch(TRAIN, *arguments, log=tmp_path / "log")
    figures = figures_of(tmp_path)
    for cell, here in local_figures.items():
        assert figures[cell] == pytest.approx(here, abs=0.02), (cell, figures, local_figures)
    assert abs(figures["forget"] - 0.25) < 0.15
    assert figures["retain"] > 0.9
