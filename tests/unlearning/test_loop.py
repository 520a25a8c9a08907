"""A whole run on a small random model: what moves, what must not, and that it can be repeated and resumed exactly."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from fastvkd_kernels import SaliencyMask

from fastvkd.data import mllmu
from fastvkd.data.sources import read_forget_retain
from fastvkd.engines.checkpoints import find_latest, load_weights
from fastvkd.engines.local import LocalEngine
from fastvkd.errors import DataError, FastVKDError, ModelError, SettingsError, TrainingError
from fastvkd.models.families import family_of, visual_parameters
from fastvkd.models.folder import identify_base
from fastvkd.models.loading import load_model
from fastvkd.unlearning import loop, saliency
from fastvkd.unlearning.loop import unlearn
from fastvkd.unlearning.tasks import prepare
from fastvkd.unlearning.vkd import task as vkd_task


def figures(metrics: Path) -> list[dict]:
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def base_weights(world) -> dict[str, torch.Tensor]:
    return load_model(world.model).state_dict()


@pytest.mark.parametrize(
    "sites", [{"projector": 1}, {"llm:2": 1}, {"vision:1": 1}, {"vision:2": 1, "projector": 2, "llm:1": 1}]
)
@pytest.mark.parametrize("target", ["noise", "mean", "redirect", "repel"])
def test_every_site_and_target_trains_only_the_visual_part(world, tmp_path: Path, sites, target) -> None:
    result = unlearn(
        world.settings(tmp_path, sites=sites, forget_target=target, max_steps=12, lr_scheduler_type="constant")
    )
    lines = figures(result.metrics)
    assert [line["step"] for line in lines] == list(range(1, 13))
    if target != "repel":  # the retain loss starts at zero and the forget loss must fall
        assert lines[0]["loss_retain"] == pytest.approx(0, abs=1e-6)
    assert lines[-1]["loss_forget"] < lines[0]["loss_forget"]
    before, after = base_weights(world), load_weights(result.checkpoint)
    assert after
    assert all("vision_tower" in name or "multi_modal_projector" in name for name in after)
    moved = [name for name, value in after.items() if not torch.equal(value, before[name])]
    assert len(moved) >= 0.9 * len(after)


@pytest.mark.parametrize("distance", ["mse", "cosine", "smooth_l1"])
def test_every_distance_trains(world, tmp_path: Path, distance: str) -> None:
    result = unlearn(world.settings(tmp_path, distance=distance, max_steps=12, lr_scheduler_type="constant"))
    lines = figures(result.metrics)
    assert lines[-1]["loss_forget"] < lines[0]["loss_forget"]


def test_reference_target_comes_from_the_named_model(world, tmp_path: Path) -> None:
    # With the original itself as the reference there is nothing to learn: the loss is zero from the start.
    result = unlearn(world.settings(tmp_path, forget_target="reference", reference_model=str(world.model), max_steps=2))
    assert figures(result.metrics)[0]["loss"] == pytest.approx(0, abs=1e-6)
    other = load_model(world.model)
    with torch.no_grad():
        for _, parameter in visual_parameters(other, family_of(other), "projector"):
            parameter.mul_(1.1)
    other.save_pretrained(tmp_path / "reference")
    for file in world.model.glob("*.json"):
        if not (tmp_path / "reference" / file.name).exists():
            shutil.copy(file, tmp_path / "reference")
    found = unlearn(
        world.settings(
            tmp_path / "other", forget_target="reference", reference_model=str(tmp_path / "reference"), max_steps=60
        )
    )
    lines = figures(found.metrics)
    assert lines[0]["loss_retain"] == pytest.approx(0, abs=1e-6)
    assert lines[-1]["loss_forget"] < 0.7 * lines[0]["loss_forget"] and lines[0]["loss_forget"] > 1e-3


def test_the_same_seed_gives_the_same_weights_and_another_does_not(world, tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> dict[str, torch.Tensor]:
        return load_weights(unlearn(world.settings(tmp_path / name, seed=seed, augment=True)).checkpoint)

    one, again, other = weights("one", 0), weights("again", 0), weights("other", 1)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_cached_and_online_teacher_agree(world, tmp_path: Path) -> None:
    cached = unlearn(world.settings(tmp_path / "cached", teacher="cached"))
    online = unlearn(world.settings(tmp_path / "online", teacher="online"))
    for a, b in zip(figures(cached.metrics), figures(online.metrics), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-6)


def test_a_second_run_reads_the_teacher_cache(world, tmp_path: Path) -> None:
    seen: list[int] = []

    def progress(phase: str, done: int, total: int, _: dict) -> None:
        if phase == "teacher":
            seen.append(done)

    settings = {"cache_dir": str(tmp_path / "cache")}
    unlearn(world.settings(tmp_path / "one", **settings), progress=progress)
    first = len(seen)
    unlearn(world.settings(tmp_path / "two", **settings, seed=0, learning_rate=2e-3), progress=progress)
    assert first > 0
    assert len(seen) == first


def test_a_short_run_asks_the_teacher_only_about_the_images_it_visits(world, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(vkd_task, "VARIANCE_IMAGES", 2)
    asked: dict[str, int] = {}

    def run(name: str, **settings) -> Path:
        def progress(phase: str, done: int, total: int, _: dict) -> None:
            if phase == "teacher":
                asked[name] = total

        return unlearn(world.settings(tmp_path / name, **settings), progress=progress).metrics

    short = figures(run("short", per_device_train_batch_size=4, max_steps=1, forget_target="repel"))
    run("long", per_device_train_batch_size=4, max_steps=40, forget_target="repel")
    assert asked["short"] == 4  # the batch; the two retained images in it do for the variance
    assert asked["long"] > 20
    noise = figures(run("noise", per_device_train_batch_size=4, max_steps=1))
    assert asked["noise"] == 2 + 1  # retained images and the noise: what the teacher sees of forget images is no target
    assert noise[0]["loss_forget"] > 0 and noise[0]["loss_retain"] == pytest.approx(0, abs=1e-6)
    assert short[0]["loss_retain"] > 0  # repel starts off the teacher: the targets were there and were used


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
@pytest.mark.parametrize(("granularity", "target"), [("weight", "noise"), ("neuron", "noise"), ("weight", "repel")])
def test_masked_out_weights_end_bit_identical(
    world, tmp_path: Path, monkeypatch, optim: str, granularity: str, target: str
) -> None:
    masks: dict[str, SaliencyMask] = {}
    original = saliency.mask_gradients
    monkeypatch.setattr(saliency, "mask_gradients", lambda p, m: (masks.update(m), original(p, m)))
    result = unlearn(
        world.settings(
            tmp_path,
            optim=optim,
            forget_target=target,
            max_steps=8,
            **{"saliency.granularity": granularity, "saliency.fraction": 0.3, "saliency.batches": 2},
        )
    )
    before, after = base_weights(world), load_weights(result.checkpoint)
    assert set(masks) == set(after)  # every trainable parameter has its mask
    assert 0.2 < result.trained_share < 0.4
    moved = 0
    for name, mask in masks.items():
        may_move = mask.to_bool().expand(mask.shape)
        assert torch.equal(after[name][~may_move], before[name][~may_move]), name
        moved += int((after[name] != before[name]).sum())
    assert moved > 0


def test_bf16_run_keeps_float32_masters(world, tmp_path: Path) -> None:
    # At this rate a bfloat16 weight alone would not move: one update is far below half a unit in its last place.
    result = unlearn(
        world.settings(tmp_path, bf16=True, learning_rate=2e-5, max_steps=12, lr_scheduler_type="constant")
    )
    weights = load_weights(result.checkpoint)
    assert all(value.dtype == torch.bfloat16 for value in weights.values())
    assert (result.checkpoint / "masters.safetensors").exists()
    name = next(n for n in weights if n.endswith("linear_1.weight"))
    assert not torch.equal(weights[name], base_weights(world)[name].bfloat16())


@pytest.mark.parametrize("answer_loss", ["gd", "kl", "npo", "idk"])
def test_answer_terms_join_the_feature_loss(world, tmp_path: Path, answer_loss: str) -> None:
    settings = world.settings(tmp_path, answer_loss=answer_loss, max_steps=3, lambda_forget=2.0, lambda_retain=3.0)
    result = unlearn(settings)
    lines = figures(result.metrics)
    assert all("language_model" not in name for name in load_weights(result.checkpoint))
    for line in lines:  # lambda_answer alone weighs the answers, whatever the features' lambdas are
        features = settings.lambda_forget * line["loss_forget"] + settings.lambda_retain * line["loss_retain"]
        answers = settings.lambda_answer * (line["loss_answer_forget"] + line["loss_answer_retain"])
        assert line["loss"] == pytest.approx(features + answers, rel=1e-4)


def test_gradient_ascent_alone_raises_the_loss_on_forget_answers(world, tmp_path: Path) -> None:
    result = unlearn(
        world.settings(tmp_path, method="ga", max_steps=15, lr_scheduler_type="constant", lambda_retain=0.1)
    )
    lines = figures(result.metrics)
    assert lines[-1]["loss_answer_forget"] < lines[0]["loss_answer_forget"]  # it is minus the cross-entropy


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_resumed_run_is_bit_identical(world, tmp_path: Path, optim: str) -> None:
    whole = unlearn(world.settings(tmp_path / "whole", max_steps=6, optim=optim, augment=True))
    settings = world.settings(
        tmp_path / "cut", max_steps=6, optim=optim, augment=True, save_steps=3, save_total_limit=5
    )
    cut = unlearn(settings)
    for folder in Path(settings.output_dir).glob("checkpoint-6"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    resumed = unlearn(dataclasses.replace(settings, resume_from_checkpoint="auto"))
    assert resumed.steps == 6
    expected, found = load_weights(whole.checkpoint), load_weights(resumed.checkpoint)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert [line["step"] for line in figures(cut.metrics)] == [1, 2, 3, 4, 5, 6]


def test_accumulated_micro_batches_equal_one_batch(world, tmp_path: Path) -> None:
    whole = unlearn(world.settings(tmp_path / "one", per_device_train_batch_size=12, max_steps=2))
    parts = unlearn(
        world.settings(tmp_path / "two", per_device_train_batch_size=6, gradient_accumulation_steps=2, max_steps=2)
    )
    expected, found = load_weights(whole.checkpoint), load_weights(parts.checkpoint)
    for name in expected:
        # A key bias shifts all scores of a softmax alike: its true gradient is zero, and Adam, which divides by the
        # gradient's size, moves it by rounding errors, which depend on the processor.
        is_key_bias = name.endswith("k_proj.bias")
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4 if is_key_bias else 1e-6)


@pytest.mark.parametrize("site", ["projector", "llm:2", "vision:1"])
def test_gradient_checkpointing_changes_nothing_but_memory(world, tmp_path: Path, site: str) -> None:
    plain = unlearn(world.settings(tmp_path / "plain", sites=site))
    saved = unlearn(world.settings(tmp_path / "saved", sites=site, gradient_checkpointing=True))
    expected, found = load_weights(plain.checkpoint), load_weights(saved.checkpoint)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)


def test_fused_frozen_operations_change_nothing_but_memory(world, tmp_path: Path) -> None:
    plain = unlearn(world.settings(tmp_path / "plain", sites="llm:2"))
    fused = unlearn(world.settings(tmp_path / "fused", sites="llm:2", fused_frozen_ops=True))
    expected, found = load_weights(plain.checkpoint), load_weights(fused.checkpoint)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)  # Adam moves by 1e-3
    with pytest.raises(SettingsError, match="fused_frozen_ops=false"):  # no decoder layer is loaded
        unlearn(world.settings(tmp_path / "none", sites="projector", fused_frozen_ops=True))


def test_auxiliary_images_are_retained(world, tmp_path: Path) -> None:
    settings = world.settings(
        tmp_path, auxiliary_images=5, auxiliary_share=0.5, forget_share=0.25, per_device_train_batch_size=8
    )
    task = prepare(settings, torch.device("cpu"), identify_base(world.model)).task
    assert task is not None
    batch = task.place(task.load(0, 0, 1))
    forget, retain = read_forget_retain(settings.data, settings.forget_split, settings.retain_split)
    own = [{photo.key for profile in side for photo in profile.photos} for side in (forget, retain)]
    assert [sum(key in side for key in batch.keys) for side in own] == [2, 3]  # and three more that no set holds
    assert batch.is_forget.tolist() == [True] * 2 + [False] * 6
    assert task.loss(batch)["loss_retain"] == pytest.approx(0, abs=1e-6)


def refused(world, tmp_path: Path, **overrides) -> str:
    with pytest.raises(FastVKDError) as caught:
        unlearn(world.settings(tmp_path / "out", **overrides))
    assert "\n" not in str(caught.value)
    assert find_latest(tmp_path / "out") is None
    return str(caught.value)


def test_a_site_deeper_than_the_model_is_refused(world, tmp_path: Path) -> None:
    message = refused(world, tmp_path, sites={"llm:9": 1})
    assert "llm:9" in message
    assert "llm:3" in message  # what is allowed


def test_a_loss_that_is_not_finite_stops_the_run(world, tmp_path: Path) -> None:
    assert "learning_rate" in refused(world, tmp_path, learning_rate=1e30, max_grad_norm=0.0, max_steps=20)


def test_an_entity_on_both_sides_is_refused(world, tmp_path: Path) -> None:
    assert "both" in refused(world, tmp_path, retain_split="Full_Set")


def test_an_empty_forget_set_is_refused(world, tmp_path: Path) -> None:
    for split in mllmu.splits(world.data):
        mllmu.write_split(
            tmp_path / "data", split, [] if split == world.forget_split else mllmu.read_split(world.data, split)
        )
    with pytest.raises(DataError, match=world.forget_split):
        unlearn(world.settings(tmp_path / "out", data=str(tmp_path / "data")))


def test_an_unreadable_image_names_its_row(world, tmp_path: Path) -> None:
    for split in mllmu.splits(world.data):
        profiles = mllmu.read_split(world.data, split)
        if split == world.forget_split:
            profiles[1] = dataclasses.replace(
                profiles[1], photos=(dataclasses.replace(profiles[1].photos[0], data=b""),)
            )
        mllmu.write_split(tmp_path / "data", split, profiles)
    with pytest.raises(DataError, match=rf"{world.forget_split}.*1"):
        unlearn(world.settings(tmp_path / "out", data=str(tmp_path / "data")))


def test_a_missing_model_folder_is_refused(world, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        unlearn(world.settings(tmp_path / "out", model_name_or_path=str(tmp_path / "nowhere")))


def test_a_full_disk_is_one_line_and_leaves_no_checkpoint(world, tmp_path: Path, monkeypatch) -> None:
    import errno

    from fastvkd.unlearning.vkd import teacher

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(teacher.os, "fsync", full)
    with pytest.raises(TrainingError, match="no space left"):
        unlearn(world.settings(tmp_path / "out"))
    assert find_latest(tmp_path / "out") is None


@pytest.mark.parametrize(
    "arithmetic",
    [
        {"fused_frozen_ops": True},
        {"attn_implementation": "eager"},
        pytest.param({"compile": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_original_is_asked_with_the_arithmetic_of_training(world, tmp_path: Path, arithmetic) -> None:
    """Before any weight has moved, retained features are their targets to the bit, also in bfloat16."""
    told = {"bf16": True, "sites": {"llm:3": 1.0}, "max_steps": 1, "cache_dir": str(tmp_path / "cache")}
    unlearn(world.settings(tmp_path / "plain", **told))
    result = unlearn(world.settings(tmp_path / "run", **told, **arithmetic))
    assert figures(result.metrics)[0]["loss_retain"] == 0.0
    noted = [json.loads(file.read_text()) for file in (tmp_path / "cache").glob("*/ingredients.json")]
    assert len(noted) == 2  # neither run took the other's features
    keys = ("attn_implementation", "compile", "fused_frozen_ops")
    plain = {"attn_implementation": "sdpa", "compile": False, "fused_frozen_ops": False}
    assert sorted(({key: one[key] for key in keys} for one in noted), key=str) == sorted(
        (plain, plain | arithmetic), key=str
    )
    assert all(one["image_processor"].endswith("Pil") for one in noted)


def test_a_method_that_trains_nothing_has_no_masters(world, tmp_path: Path, monkeypatch) -> None:
    engines: list[LocalEngine] = []
    build = loop.build_engine
    monkeypatch.setattr(loop, "build_engine", lambda *args: engines.append(build(*args)) or engines[-1])
    told = {"bf16": True, "method": "manu", "manu_batches": 1, "manu_fraction": 0.1}
    result = unlearn(world.settings(tmp_path, **told))
    assert all(master.dtype == torch.bfloat16 for master in engines[0].state_dict()["masters"].values())
    assert not (result.checkpoint / "masters.safetensors").exists() and load_weights(result.checkpoint)


def test_checkpoints_written_behind_are_those_of_their_steps(world, tmp_path: Path, monkeypatch) -> None:
    """As on a GPU: training goes on meanwhile, and every checkpoint is the one that a run which waits would write."""

    def run(folder: Path) -> list[Path]:
        unlearn(world.settings(folder, save_steps=1, save_total_limit=9, cache_dir=str(tmp_path / "cache")))
        return sorted(folder.glob("checkpoint-*"))

    waiting = run(tmp_path / "waiting")
    monkeypatch.setattr(loop, "writes_behind", lambda engine: True)
    behind = run(tmp_path / "behind")
    assert [folder.name for folder in behind] == [f"checkpoint-{step}" for step in range(1, 5)]
    for one, other in zip(waiting, behind, strict=True):
        assert (one / "visual.safetensors").read_bytes() == (other / "visual.safetensors").read_bytes()
        moments = [torch.load(folder / "rank-0.pt", weights_only=True) for folder in (one, other)]
        assert str(moments[0]) == str(moments[1])
