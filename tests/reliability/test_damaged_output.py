"""What a command has written, damaged: logs, results, checkpoints, tables, and the processor of an export."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from wholes import Wholes, run

from fastvkd.data import mllmu
from fastvkd.data.sources import read_split
from fastvkd.engines.checkpoints import find_newest
from fastvkd.errors import DataError, FastVKDError, ModelError, TrainingError
from fastvkd.evaluation.comparison import read_runs
from fastvkd.models.loading import load_processor
from fastvkd.models.prompts import visual_prefix
from fastvkd.records import Photo
from fastvkd.reporting.collect import collect
from fastvkd.reporting.report import read_log
from fastvkd.unlearning.metrics import lines_up_to

pytestmark = pytest.mark.fault("damaged output of a command")


def photos(data: Path, split: str) -> list[Photo]:
    return [photo for profile in read_split(str(data), split) for photo in profile.photos]


def test_a_flipped_bit_of_a_table_is_never_another_photo(wholes: Wholes, tmp_path: Path) -> None:
    """Without checksums every second flipped bit makes another photo, and nothing tells."""
    profiles = mllmu.read_split(wholes.at("parquet"), wholes.forget_split)
    file = mllmu.write_split(tmp_path, wholes.forget_split, profiles)
    content, whole = file.read_bytes(), photos(tmp_path, wholes.forget_split)
    rng, refused = random.Random(0), 0
    for _ in range(100):
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(flipped)
        try:
            assert photos(tmp_path, wholes.forget_split) == whole
        except DataError as error:
            assert str(file) in str(error)
            refused += 1
    assert refused > 50


LINE = '{"step": 1, "loss": 0.5}\n'
BAD_LINES = {
    "not JSON": "nonsense\n",
    "no object": "[1]\n",
    "no step": '{"loss": 0.5}\n',
    "nested without end": "[" * 100_000 + "\n",
    "a list for a number": '{"step": 2, "loss": [0.5]}\n',
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_damaged_training_log_is_named_with_its_line(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(LINE + BAD_LINES[kind] + LINE)
    with pytest.raises(DataError, match=r"metrics.jsonl:2: .*; delete the file, and the page has no curves"):
        read_log(file)
    with pytest.raises(DataError, match=r"metrics.jsonl:2: "):
        collect([tmp_path])
    if kind == "a list for a number":
        return  # a resumed run keeps the lines as they are
    with pytest.raises(TrainingError, match=r"metrics.jsonl:2: .*; delete that line"):
        lines_up_to(file, 5)


def test_a_rate_that_diverged_in_a_trial_is_no_damage(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 0, "trial_rate": 0.003, "watched_loss": Infinity}\n' + LINE)
    assert read_log(file) == [{"step": 0, "trial_rate": 0.003}, {"step": 1, "loss": 0.5}]
    assert len(lines_up_to(file, 5)) == 2


def test_what_a_kill_left_of_the_last_line_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(LINE + '{"step": 2, "lo')
    assert read_log(file) == [{"step": 1, "loss": 0.5}]
    assert lines_up_to(file, 5) == [LINE]
    assert lines_up_to(file, 0) == []


def changed(results: dict[str, Any], value: Any) -> dict[str, Any]:
    results["cells"]["forget"]["vqa"]["accuracy"] = value
    return results


@pytest.mark.parametrize("value", ["high", [0.5], 10**400, float("nan"), True])
def test_a_figure_that_is_no_number_is_not_compared(wholes: Wholes, tmp_path: Path, value: Any) -> None:
    results = json.loads((wholes.at("eval") / "results.json").read_text())
    assert read_runs([wholes.at("eval")])[0].figures["forget VQA acc"] == results["cells"]["forget"]["vqa"]["accuracy"]
    (tmp_path / "results.json").write_text(json.dumps(changed(results, value)))
    with pytest.raises(DataError, match=r"results.json: not as fastvkd writes it \(.*; run it again"):
        read_runs([tmp_path])


def test_results_nested_without_end_are_not_compared(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("[" * 100_000)
    assert "results.json: JSON nested too deeply" in run("compare", str(tmp_path)).err


def test_an_older_checkpoint_is_not_taken_for_one_that_lost_its_manifest(wholes: Wholes, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(wholes.at("run"), folder)
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-10")
    assert find_newest(folder) == folder / "checkpoint-10"
    (folder / "checkpoint-10" / "checkpoint.json").unlink()
    told = "checkpoint-10: has no checkpoint.json, so part of it was lost"
    with pytest.raises(TrainingError, match=told):
        find_newest(folder)
    resumed = wholes.train(folder, "resume_from_checkpoint=auto", "max_steps=12")
    for command in (resumed, ["export", "--run", str(folder), "--to", str(tmp_path / "merged")]):
        assert told in run(*command).err
    shutil.rmtree(folder / "checkpoint-10")
    (folder / "checkpoint-500").mkdir()
    (folder / "checkpoint-500" / "model.safetensors").touch()  # of another trainer
    assert find_newest(folder) == folder / "checkpoint-2"


def test_a_page_without_its_samples_says_so(wholes: Wholes, tmp_path: Path) -> None:
    shutil.copytree(wholes.at("eval"), tmp_path / "eval")
    assert not any("without its samples" in line for line in collect([tmp_path / "eval"]).contents)
    assert run("purge", str(tmp_path / "eval")).code == 0
    (said,) = collect([tmp_path / "eval"]).contents
    assert said.endswith(", without its samples.jsonl: the page shows no answers")


SCALES: dict[str, Callable[[dict[str, Any]], object]] = {
    "image_std": lambda told: told["image_std"].__setitem__(1, float("nan")),
    "image_mean": lambda told: told["image_mean"].__setitem__(0, 1e30),
    "rescale_factor": lambda told: told.__setitem__("rescale_factor", float("inf")),
}


@pytest.mark.parametrize("key", SCALES)
def test_a_processor_that_would_make_every_photo_nan_is_named(wholes: Wholes, tmp_path: Path, key: str) -> None:
    shutil.copytree(wholes.at("exported"), tmp_path / "model")
    file = tmp_path / "model" / "processor_config.json"
    told = json.loads(file.read_text())
    SCALES[key](told["image_processor"])
    file.write_text(json.dumps(told))
    with pytest.raises(ModelError, match=f"{tmp_path}/model: its image processor's {key} is "):
        load_processor(tmp_path / "model")


def test_a_chat_template_that_is_none_is_named_by_its_folder(wholes: Wholes, tmp_path: Path) -> None:
    shutil.copytree(wholes.at("exported"), tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("<html>not found</html>")
    with pytest.raises(FastVKDError, match=f"{tmp_path}/model: the chat template writes no "):
        visual_prefix(load_processor(tmp_path / "model"))
