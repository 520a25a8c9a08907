"""What a user can mend is one line that names the place and the mend, exit code 2, and nothing half-written.

Through the command line, for `train`, and where it matters also for `eval`, `export` and `plan`.
"""

import contextlib
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from fastvkd.cli import main
from fastvkd.data import mllmu
from fastvkd.engines.checkpoints import find_latest
from fastvkd.records import Photo, Profile
from fastvkd.settings import load_settings
from fastvkd.unlearning.vkd.teacher import FeatureCache

pytestmark = pytest.mark.fault("bad input")


def refused(capsys, *arguments: str) -> str:
    """The one-line error of a command that must exit with 2."""
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("fastvkd: error: ")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0]


def training(world, output: Path, **overrides) -> list[str]:
    settings = world.settings(output)
    keys = ("model_name_or_path", "data", "forget_split", "retain_split", "output_dir", "max_steps", "learning_rate")
    keys += ("per_device_train_batch_size", "device")
    values = {key: getattr(settings, key) for key in keys} | overrides
    return ["train", *(f"{key}={value}" for key, value in values.items())]


def refuses_to_train(world, tmp_path: Path, capsys, **overrides) -> str:
    """The error of a training run that must not leave a trace."""
    message = refused(capsys, *training(world, tmp_path / "out", **overrides))
    assert not (tmp_path / "out").exists()
    return message


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def bomb() -> bytes:
    """A hundred megapixels in some kilobytes."""
    return encoded(Image.new("1", (10_000, 10_000)))


WHOLE = encoded(Image.effect_noise((40, 40), 50), "JPEG")
BAD_IMAGES: dict[str, tuple[Callable[[], bytes], str]] = {
    "zero bytes": (lambda: b"", "the image is empty (0 bytes); replace it or drop the row"),
    "not an image": (lambda: b"<html>not found</html>", "allowed: PNG, JPEG"),
    "cut off": (lambda: WHOLE[: len(WHOLE) // 2], "replace it or drop the row"),
    "100 megapixels": (bomb, "10000 x 10000, that is 100 megapixels; at most 50 are decoded; resize it"),
}


def changed(world, folder: Path, split: str, change: Callable[[list[Profile]], list[Profile]]) -> Path:
    """A copy of the world's data in which one split is what `change` makes of it."""
    shutil.copytree(world.data, folder)
    profiles = change(mllmu.read_split(world.data, split))
    shutil.rmtree(folder / split)
    mllmu.write_split(folder, split, profiles)
    return folder


def with_photo(profiles: list[Profile], row: int, data: bytes) -> list[Profile]:
    spoilt = replace(profiles[row], photos=(Photo(data, profiles[row].photos[0].source),))
    return [*profiles[:row], spoilt, *profiles[row + 1 :]]


class TestImages:
    @pytest.mark.parametrize("kind", BAD_IMAGES)
    def test_in_a_parquet_row(self, world, tmp_path: Path, capsys, kind: str) -> None:
        make, mend = BAD_IMAGES[kind]
        data = changed(world, tmp_path / "data", world.retain_split, lambda p: with_photo(p, 3, make()))
        message = refuses_to_train(world, tmp_path, capsys, data=data)
        assert f"{world.retain_split}/train-00000-of-00001.parquet:3:" in message
        assert mend in message

    @pytest.mark.parametrize("kind", BAD_IMAGES)
    def test_in_a_file_of_ones_own(self, world, tmp_path: Path, capsys, kind: str) -> None:
        make, mend = BAD_IMAGES[kind]
        data = tmp_path / "data"
        data.mkdir()
        (data / "a.png").write_bytes(encoded(Image.new("RGB", (24, 24))))
        (data / "b.png").write_bytes(make())
        rows = [{"image": f"{name}.png", "entity": name, "question": "Who?", "answer": name} for name in "ab"]
        (data / "retain.jsonl").write_text(json.dumps(rows[0]) + "\n")
        (data / "forget.jsonl").write_text("\n" + json.dumps(rows[1]) + "\n")
        message = refuses_to_train(world, tmp_path, capsys, data=data)
        assert "forget.jsonl:2 (b.png):" in message
        assert mend in message

    def test_in_what_is_evaluated(self, world, tmp_path: Path, capsys) -> None:
        make, mend = BAD_IMAGES["zero bytes"]
        data = changed(world, tmp_path / "data", world.forget_split, lambda p: with_photo(p, 1, make()))
        arguments = ["--forget-split", world.forget_split, "--retain-split", world.retain_split]
        command = ["eval", "--model", str(world.model), "--data", str(data), "--out", str(tmp_path / "out"), *arguments]
        message = refused(capsys, *command)
        assert f"{world.forget_split}/train-00000-of-00001.parquet:1:" in message and mend in message
        assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize("option", ["--max-samples", "--batch-size"])
@pytest.mark.parametrize("number", ["0", "-1"])
def test_an_evaluation_of_nothing(world, tmp_path: Path, capsys, option: str, number: str) -> None:
    out = tmp_path / "out"
    command = ["eval", "--model", str(world.model), "--data", str(world.data), "--out", str(out), option, number]
    assert f"{option.strip('-').replace('-', '_')}={number}: at least 1" in refused(capsys, *command)
    assert not out.exists()


class TestData:
    @pytest.mark.parametrize("column", ["image", "ID", "Classification_Task"])
    def test_a_missing_column(self, world, tmp_path: Path, capsys, column: str) -> None:
        data = tmp_path / "data"
        shutil.copytree(world.data, data)
        file = next((data / world.forget_split).glob("*.parquet"))
        pq.write_table(pq.read_table(file).drop_columns([column]), file)
        message = refuses_to_train(world, tmp_path, capsys, data=data)
        assert column in message and str(file) in message

    def test_an_entity_on_both_sides(self, world, tmp_path: Path, capsys) -> None:
        message = refuses_to_train(world, tmp_path, capsys, retain_split="Full_Set")
        shared = mllmu.read_split(world.data, world.forget_split)[0].entity
        assert f"entity {shared!r} is in both {world.forget_split} and Full_Set" in message
        assert "remove it from one of them" in message

    def test_an_empty_forget_set(self, world, tmp_path: Path, capsys) -> None:
        data = changed(world, tmp_path / "data", world.forget_split, lambda profiles: [])
        message = refuses_to_train(world, tmp_path, capsys, data=data)
        assert f"{world.forget_split}: holds no image; name another split with forget_split/retain_split" in message

    def test_an_empty_file_of_ones_own(self, world, tmp_path: Path, capsys) -> None:
        for name in ("forget", "retain"):
            (tmp_path / f"{name}.jsonl").touch()
        assert "forget: holds no image" in refuses_to_train(world, tmp_path, capsys, data=tmp_path)

    def test_a_split_that_is_not_there(self, world, tmp_path: Path, capsys) -> None:
        message = refuses_to_train(world, tmp_path, capsys, forget_split="forget_99")
        assert "forget_99" in message and world.forget_split in message

    def test_a_folder_that_is_not_there(self, world, tmp_path: Path, capsys) -> None:
        assert "nowhere: no such folder" in refuses_to_train(world, tmp_path, capsys, data=tmp_path / "nowhere")


class TestModel:
    def test_a_site_deeper_than_the_model(self, world, tmp_path: Path, capsys) -> None:
        for site, allowed in (("llm:40", "llm:3"), ("vision:9", "vision:2")):
            message = refuses_to_train(world, tmp_path, capsys, sites=site)
            assert site in message and allowed in message

    @pytest.mark.parametrize("command", ["train", "plan", "eval"])
    def test_an_unknown_family(self, world, tmp_path: Path, capsys, command: str) -> None:
        model = tmp_path / "model"
        shutil.copytree(world.model, model)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "model_type": "llavva"}))
        out = tmp_path / "out"
        arguments = {
            "train": training(world, out, model_name_or_path=model),
            "plan": ["plan", f"model_name_or_path={model}", "data=x"],
            "eval": [
                *["eval", "--model", str(model), "--data", str(world.data), "--out", str(out)],
                *["--forget-split", world.forget_split, "--retain-split", world.retain_split],
            ],
        }
        message = refused(capsys, *arguments[command])
        assert "llavva" in message and "llava" in message.replace("llavva", "")
        assert not out.exists()

    def test_a_folder_that_is_not_there(self, world, tmp_path: Path, capsys) -> None:
        message = refuses_to_train(world, tmp_path, capsys, model_name_or_path=tmp_path / "nowhere")
        assert "nowhere" in message


class TestSettings:
    def test_an_unknown_yaml_key(self, world, tmp_path: Path, capsys) -> None:
        config = tmp_path / "config.yaml"
        config.write_text("learnin_rate: 1.0e-3\n")
        out = tmp_path / "out"
        message = refused(capsys, *training(world, out), "--config", str(config))
        assert "learnin_rate: no such setting; did you mean learning_rate?" in message
        assert not out.exists()

    def test_an_unknown_key_of_a_section(self, world, tmp_path: Path, capsys) -> None:
        message = refuses_to_train(world, tmp_path, capsys, **{"saliency.fractoin": 0.1})
        assert "did you mean saliency.fraction?" in message

    def test_a_file_that_is_no_yaml(self, world, tmp_path: Path, capsys) -> None:
        config = tmp_path / "config.yaml"
        config.write_text("sites: [projector\n")
        assert "not valid YAML" in refused(capsys, *training(world, tmp_path / "out"), "--config", str(config))

    def test_deepspeed_without_its_launcher(self, world, tmp_path: Path, capsys, monkeypatch) -> None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        assert "deepspeed fastvkd/train.py" in refuses_to_train(world, tmp_path, capsys, engine="deepspeed")

    def test_an_unknown_demo_size(self, tmp_path: Path, capsys) -> None:
        out = tmp_path / "out"
        assert "default, tiny" in refused(capsys, "demo", "--size", "huge", "--out", str(out))
        assert not out.exists()

    def test_no_run_to_export(self, tmp_path: Path, capsys) -> None:
        message = refused(capsys, "export", "--run", str(tmp_path), "--to", str(tmp_path / "merged"))
        assert "no checkpoint-<step> folder" in message
        assert not list(tmp_path.iterdir())

    def test_an_output_folder_that_is_a_file(self, world, tmp_path: Path, capsys) -> None:
        (tmp_path / "out").write_text("mine")
        message = refused(capsys, *training(world, tmp_path / "out"))
        assert str(tmp_path / "out") in message
        assert (tmp_path / "out").read_text() == "mine"


class TestNotFinite:
    @pytest.mark.parametrize("save_steps", [0, 1])
    def test_a_loss_that_is_nan_ends_the_run(self, world, tmp_path: Path, capsys, save_steps: int) -> None:
        out = tmp_path / "out"
        message = refused(
            capsys, *training(world, out, learning_rate=1e30, max_grad_norm=0.0, max_steps=20, save_steps=save_steps)
        )
        assert "not both finite; lower learning_rate, or set bf16=false" in message
        step = int(message.split("step ")[1].split(":")[0])
        left = {"metrics.jsonl", "run.json", "teacher_cache", f"checkpoint-{step - 1}"}
        assert {path.name for path in out.iterdir()} <= left
        written = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert all(line["step"] < step for line in written)
        if save_steps:  # what was good is kept, and nothing after it
            assert all(int(path.name[11:]) < step for path in out.glob("checkpoint-*"))


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses to write more than `size` bytes to a file, in the middle of a write."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class TestNoSpace:
    def test_for_the_teacher_cache(self, world, tmp_path: Path, capsys) -> None:
        with files_of_at_most(5_000):
            message = refused(capsys, *training(world, tmp_path / "out"))
        assert "no space left on disk for the teacher cache; free some or set cache_dir elsewhere" in message
        assert find_latest(tmp_path / "out") is None
        assert main(training(world, tmp_path / "out")) == 0  # what it left does no harm

    @pytest.mark.parametrize(("size", "optim"), [(20_000, "adamw_torch"), (100_000, "adamw_8bit")])
    def test_for_a_checkpoint(self, world, tmp_path: Path, capsys, size: int, optim: str) -> None:
        out, cache = tmp_path / "out", tmp_path / "cache"
        assert main(training(world, tmp_path / "first", cache_dir=cache)) == 0
        with files_of_at_most(size):
            message = refused(capsys, *training(world, out, cache_dir=cache, optim=optim))
        assert "checkpoint-4: cannot be written: no space left on the device; free some" in message
        assert sorted(path.name for path in out.iterdir()) == ["metrics.jsonl", "run.json"]

    def test_for_an_export(self, world, tmp_path: Path, capsys) -> None:
        assert main(training(world, tmp_path / "run", max_steps=1)) == 0
        with files_of_at_most(100_000):
            message = refused(capsys, "export", "--run", str(tmp_path / "run"), "--to", str(tmp_path / "merged"))
        assert "merged: no space left on the device; the base has" in message
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]

    def test_on_a_disk_that_is_really_full(self, world, tmp_path: Path) -> None:
        """A file system of 400 kB, where the system lets an ordinary user mount one."""
        disk = tmp_path / "disk"
        disk.mkdir()
        mounted = f"mount -t tmpfs -o size=400k none {disk} && "
        if subprocess.run(["unshare", "-rm", "sh", "-c", mounted + "true"], capture_output=True).returncode:
            pytest.skip("this system lets nobody mount a small disk")
        command = " ".join([sys.executable, "-m", "fastvkd.cli", *training(world, disk / "out")])
        listed = f"; code=$?; find {disk}/out -name 'checkpoint*' -o -name '.unfinished*'; exit $code"
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", mounted + command + listed], capture_output=True, text=True
        )
        assert done.returncode == 2, done.stderr
        assert "no space left" in done.stderr and "Traceback" not in done.stderr
        assert done.stdout == ""


class TestSettingsSaidTwice:
    def test_a_key_of_the_yaml(self, world, tmp_path: Path, capsys) -> None:
        config = tmp_path / "config.yaml"
        for text, where in (
            ("max_steps: 2\nseed: 1\nmax_steps: 4\n", "'max_steps' is set twice; keep one of them .* line 3"),
            ("saliency:\n  fraction: 0.1\n  fraction: 0.2\n", "'fraction' is set twice"),
        ):
            config.write_text(text)
            message = refused(capsys, *training(world, tmp_path / "out"), "--config", str(config))
            assert re.search(f"config.yaml: not valid YAML .*{where}", message), message

    def test_a_yaml_with_a_byte_order_mark_is_read(self, tmp_path: Path) -> None:
        config = tmp_path / "config.yaml"
        config.write_text("max_steps: 7\n", encoding="utf-8-sig")
        assert load_settings(config, {"model_name_or_path": "m", "data": "d"}).max_steps == 7

    @pytest.mark.parametrize("seed", [-1, 2**32, 10**20])
    def test_a_seed_that_no_generator_takes(self, world, tmp_path: Path, capsys, seed: int) -> None:
        message = refuses_to_train(world, tmp_path, capsys, seed=seed)
        assert f"seed={seed}: must lie between 0 and 4294967295" in message


def test_sigterm_in_the_teacher_pass_is_said(world, tmp_path: Path, capsys, monkeypatch) -> None:
    """What the teacher saw is kept: the same command goes on, and only the rest is seen."""
    add = FeatureCache.add

    def ended(cache: FeatureCache, rows: dict) -> None:
        add(cache, rows)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(FeatureCache, "add", ended)
        before = signal.getsignal(signal.SIGTERM)
        assert main(training(world, tmp_path / "out")) == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is before
    assert "fastvkd: ended by SIGTERM; what was finished is kept" in capsys.readouterr().err
    assert list((tmp_path / "out" / "teacher_cache").rglob("index-*.json"))
    assert main(training(world, tmp_path / "out")) == 0


def test_an_export_says_what_it_left_out(world, tmp_path: Path, capsys) -> None:
    model = tmp_path / "model"
    shutil.copytree(world.model, model)
    (model / "model.gguf").write_bytes(b"the knowledge that was removed")
    (model / "certificate.json").write_text("{}")
    assert main(training(world, tmp_path / "run", max_steps=1, model_name_or_path=model)) == 0
    assert main(["export", "--run", str(tmp_path / "run"), "--to", str(tmp_path / "merged")]) == 0
    said = capsys.readouterr().out
    assert "Left out, since they hold the weights from before: model.gguf\n" in said
    assert "Left out, since they speak of the base model: certificate.json\n" in said


class TestWhatAModelCannotTake:
    """Through every command: photos and texts that a check without a model lets pass."""

    @pytest.mark.parametrize("key", ["question", "answer"])
    @pytest.mark.parametrize("command", ["check", "gd", "eval"])
    def test_a_special_token_in_a_text(self, leaves_world, tmp_path: Path, capsys, key: str, command: str) -> None:
        data = tmp_path / "data"
        shutil.copytree(leaves_world.data, data, ignore=shutil.ignore_patterns("model"))
        lines = [json.loads(line) for line in (data / "forget.jsonl").read_text().splitlines()]
        lines[1][key] += " </s>"
        (data / "forget.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        model, out = str(leaves_world.model), tmp_path / "out"
        if command == "check":
            assert main(["data", "check", str(data), "--model", model]) == 2
            message = capsys.readouterr().out
            assert main(["data", "check", str(data)]) == 0  # no model, no tokens of its own
        elif command == "gd":
            message = refused(capsys, *training(leaves_world, out, data=data, method="gd"))
        else:
            message = refused(capsys, "eval", "--model", model, "--data", str(data), "--out", str(out))
        assert f"forget.jsonl:2: the {key}" in message and "'</s>'" in message
        assert not out.exists()
