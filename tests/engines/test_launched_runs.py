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
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launching import ROOT, TRAIN, kill_tree, launch, ranks_of, start, wait_until
from PIL import Image
from safetensors.torch import load_file

from fastvkd import EvalOptions, evaluate
from fastvkd.cli import main
from fastvkd.engines.checkpoints import find_latest, load_weights
from fastvkd.engines.exporting import export
from fastvkd.engines.manifests import read_manifest

SEVERAL_RUNS = Path(__file__).with_name("several_runs.py")
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
        # No search, no looks, no scenes: aim at a noise image, gently, for a few steps.
        "forget_target": "noise",
        "ends": "max_steps",
        "watch_steps": 0,
        "elsewhere": 0.0,
        "beside": 0.0,
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


def uneven_arguments(tiny_demo, data: Path, output: Path, batch: int, **settings) -> list[str]:
    """A run on the four images of `uneven_data`."""
    settings |= {"data": data, "cache_dir": output / "cache", "auxiliary_images": 0, "save_steps": 0}
    return demo_arguments(tiny_demo, output, batch, **settings)


def stranger_arguments(tiny_demo, output: Path, batch: int, **settings) -> list[str]:
    """A few steps towards strangers, with a search of its own."""
    settings |= {"forget_target": "stranger", "stranger.steps": 4, "stranger.views": 2, "stranger.rank": 4}
    settings |= {"cache_dir": output / "cache", "auxiliary_images": 0, "max_steps": 4, "save_steps": 0}
    return demo_arguments(tiny_demo, output, batch, **settings)


def weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = find_latest(run)
    assert checkpoint is not None
    return load_weights(checkpoint)


def relative_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm, of all weights as one vector."""
    assert found.keys() == expected.keys()
    a, b = (torch.cat([w[name].double().flatten() for name in expected]) for w in (found, expected))
    return float((a - b).norm() / b.norm())


def assert_same_weights(run: Path, other: Path) -> None:
    """Each by itself. Softmax does not see a constant added to every key: the gradient of a key's bias is nothing but
    rounding, so it may go anywhere and is left out."""
    found, expected = weights(run), weights(other)
    assert found.keys() == expected.keys()
    for name in expected:
        if not name.endswith("k_proj.bias"):
            assert relative_difference({name: found[name]}, {name: expected[name]}) < 1e-5, name


@pytest.fixture(scope="module")
def tiny_demo(tiny_demo, tmp_path_factory):
    """With a folder of its own, since every run writes into the teacher cache."""
    out = tmp_path_factory.mktemp("demo") / "out"
    return replace(tiny_demo, out=shutil.copytree(tiny_demo.out, out))


@pytest.fixture(scope="module")
def local(tiny_demo, tmp_path_factory) -> Path:
    """One process, all 24 images of a step."""
    out = tmp_path_factory.mktemp("local")
    assert main(["train", *demo_arguments(tiny_demo, out, 24)]) == 0
    return out


@pytest.fixture(scope="module")
def uneven_data(tmp_path_factory) -> Path:
    """One forget image, three retained."""
    data = tmp_path_factory.mktemp("uneven")
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
    return data


@pytest.fixture(scope="module")
def launched(tiny_demo, uneven_data, tmp_path_factory) -> dict[str, Path]:
    """The folders of several runs of two ranks: 12 images a rank under every preset, and `uneven_data` under ZeRO-3.

    Runs share a launch. Those that search for maps have one of their own: after a run of ZeRO-3 later models of the
    same process compute a little differently.
    """
    out = tmp_path_factory.mktemp("launched")
    plain = [demo_arguments(tiny_demo, out / preset, 12, **on_ranks(preset)) for preset in PRESETS]
    plain.append(uneven_arguments(tiny_demo, uneven_data, out / "uneven", 3, **on_ranks("zero3")))
    # Rank 0 searches with the whole model, whose weights ZeRO-3 would have split.
    searching = [
        stranger_arguments(tiny_demo, out / f"stranger-{preset}", 12, **on_ranks(preset)) for preset in PRESETS[1:]
    ]
    for runs in (plain, searching):
        (out / "runs.json").write_text(json.dumps(runs))
        launch(SEVERAL_RUNS, str(out / "runs.json"), log=out / "log")
    return {name: out / name for name in (*PRESETS, "uneven", *(f"stranger-{preset}" for preset in PRESETS[1:]))}


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_two_ranks_end_with_the_weights_of_one_process(local, launched, preset) -> None:
    assert_same_weights(launched[preset], local)
    figures = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (launched[preset], local)
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
@pytest.mark.parametrize("preset", [pytest.param("zero2", marks=pytest.mark.proof), "zero3"])
def test_killed_ranks_resume_where_they_were(tiny_demo, launched, tmp_path, preset) -> None:
    arguments = demo_arguments(tiny_demo, tmp_path, 12, **on_ranks(preset))
    launcher = start(TRAIN, *arguments, log=tmp_path / "log")
    saved = kill_at_random_step(launcher, tmp_path, random.Random(preset))
    output = launch(TRAIN, *arguments, "resume_from_checkpoint=auto", log=tmp_path / "log")
    assert f"resumed from {tmp_path}/checkpoint-{saved} at step {saved}" in output
    assert "moments start from zero" not in output
    assert relative_difference(weights(tmp_path), weights(launched[preset])) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("optim", [pytest.param("adamw_torch", marks=pytest.mark.proof), "adamw_8bit"])
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
    source = launched["zero2"] / f"checkpoint-{STEPS - 2}"
    arguments = demo_arguments(tiny_demo, tmp_path, 24, resume_from_checkpoint=source)
    assert main(["train", *arguments]) == 0
    assert "written by 2 rank(s)" in caplog.text
    assert "moments start from zero" in caplog.text
    assert 0 < relative_difference(weights(tmp_path), load_weights(source)) < 0.05  # two more steps, not a new run


@pytest.mark.slow
def test_fewer_images_than_ranks_cannot_stall_zero3(tiny_demo, uneven_data, launched, tmp_path) -> None:
    """Two ranks with three images a step each share one forget image and three retained ones unevenly."""
    assert main(["train", *uneven_arguments(tiny_demo, uneven_data, tmp_path, 6)]) == 0
    assert_same_weights(launched["uneven"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS[1:])
def test_two_ranks_find_strangers_as_one_process_does(tiny_demo, launched, tmp_path, preset) -> None:
    """Rank 0 searches alone with the whole model, also where ZeRO-3 splits what is trained."""
    assert main(["train", *stranger_arguments(tiny_demo, tmp_path, 24)]) == 0
    (mine,), (theirs,) = (
        list((run / "cache").glob("stranger-*.safetensors")) for run in (tmp_path, launched[f"stranger-{preset}"])
    )
    assert mine.name == theirs.name
    assert relative_difference(load_file(theirs), load_file(mine)) < 1e-4
    assert_same_weights(launched[f"stranger-{preset}"], tmp_path)


@pytest.mark.slow
def test_ranks_find_the_rate_and_the_end_of_one_process_and_resume_to_the_same_bits(world, tmp_path) -> None:
    """Under ZeRO-2 and ZeRO-3 trials are undone, all ranks end together, and a later start goes on from any step."""
    config = tmp_path / "self_driven.yaml"
    config.write_text(
        "{learning_rate: auto, ends: auto, watch_steps: 3, max_steps: 30, warmup_steps: 3, max_drift: 1.0e6,"
        " augment: true, auxiliary_images: 8, auxiliary_share: 0.5, save_steps: 1, save_total_limit: 0, device: cpu}"
    )

    def arguments(name: str, batch: int, **settings) -> list[str]:
        keys = ("model_name_or_path", "data", "forget_split", "retain_split")
        values = {key: getattr(world.settings(tmp_path), key) for key in keys}
        values |= {"output_dir": tmp_path / name, "per_device_train_batch_size": batch, **settings}
        return ["--config", str(config), *(f"{key}={value}" for key, value in values.items())]

    def course(name: str) -> dict:
        found = find_latest(tmp_path / name)
        assert found is not None
        return read_manifest(found)["watch"]

    assert main(["train", *arguments("local", 8)]) == 0
    here, runs = course("local"), []
    for preset in ("zero2", "zero3"):
        runs.append(arguments(preset, 4, **on_ranks(preset)))
        for step in (4, here["falls_from"] + 1):  # before the end is known, and when it is
            checkpoint = tmp_path / preset / f"checkpoint-{step}"
            runs.append(arguments(f"{preset}-{step}", 4, **on_ranks(preset, resume_from_checkpoint=checkpoint)))
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    launch(SEVERAL_RUNS, str(tmp_path / "runs.json"), log=tmp_path / "log")
    for preset in ("zero2", "zero3"):
        there = course(preset)
        for key in ("learning_rate", "falls_from", "end"):
            assert there[key] == here[key]
        for key, value in here["seen"].items():
            assert there["seen"][key] == pytest.approx(value, rel=1e-3)
        assert relative_difference(weights(tmp_path / preset), weights(tmp_path / "local")) < 1e-4
        for step in (4, here["falls_from"] + 1):
            assert course(f"{preset}-{step}") == there
            assert relative_difference(weights(tmp_path / f"{preset}-{step}"), weights(tmp_path / preset)) == 0


@pytest.fixture(scope="module")
def figures_of(tiny_demo, tmp_path_factory):
    """Accuracy on forgotten people's known and unseen photos and on retained people's, of a run's exported model."""

    def measure(run: Path) -> dict[str, float]:
        merged = tmp_path_factory.mktemp("merged") / "model"
        export(run, merged, model_card="")
        figures = evaluate(
            EvalOptions(
                model=str(merged),
                data=str(tiny_demo.data),
                forget_split=tiny_demo.forget_split,
                retain_split=tiny_demo.retain_split,
                max_samples=400,
                device="cpu",
                out=merged.parent / "eval",
            )
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
@pytest.mark.parametrize("preset", [*(pytest.param(name, marks=pytest.mark.proof) for name in PRESETS[:2]), "zero3"])
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
