"""The step benchmark: every variant computes what the reference computes, with the FLOPs, memory and time it claims."""

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import rig
import step
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_tiny_preset_is_several_times_faster_with_equal_gradients_and_half_the_memory(tmp_path):
    file = tmp_path / "step.json"
    command = [sys.executable, "benchmarks/step.py", "--preset", "tiny", "--device", "cpu", "--variants", "abcde"]
    done = subprocess.run(
        [*command, "--repetitions", "3", "--batch", "4", "--json", str(file)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(file.read_text())
    assert report["device"] and report["versions"]["torch"] == torch.__version__
    rows = {row["variant"]: row for row in report["rows"]}
    assert list(rows) == list("abcde") and report["left_out"] == {}
    for row in rows.values():
        assert row["max_loss_error"] <= 1e-5 and row["max_grad_error"] <= 1e-3
        assert row["flops_per_image"] == pytest.approx(row["counted_flops_per_image"], rel=0.02)
        assert row["images_per_s"] == pytest.approx(1e3 / row["ms_per_image"])
    a, e = rows["a"], rows["e"]
    # Arithmetic is exact; time has slack for a busy machine (on a quiet one it is above 5).
    assert a["flops_per_image"] >= 5.9 * e["flops_per_image"]
    assert e["speedup"] >= 3
    assert e["peak_bytes"] <= a["peak_bytes"] / 2


def shrunk(name: str) -> object:
    """A real preset with few, narrow layers, so that its shapes run on a CPU."""
    preset = step.PRESETS[name]()
    facts = copy.deepcopy(preset.facts)
    qwen = facts["model_type"] == "qwen2_5_vl"
    facts["text_config"] |= {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 4}
    facts["text_config"] |= {"num_attention_heads": 1, "num_key_value_heads": 1}
    narrow = {"hidden_size": 64, "intermediate_size": 96}
    narrow |= {"depth": 4, "out_hidden_size": 128, "num_heads": 4} if qwen else {"num_hidden_layers": 4}
    facts["vision_config"] |= narrow
    if qwen:
        facts["vision_config"]["fullatt_block_indexes"] = [3]
    return dataclasses.replace(preset, facts=facts, site="llm:2", batch=2)


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-1.5-13b", "qwen2.5-vl-7b"])
def test_the_real_presets_run(name):
    # In float32, where rounding hides nothing (and a CPU is many times faster).
    preset = dataclasses.replace(shrunk(name), bf16=False)
    report = step.measure(preset, torch.device("cpu"), letters="ae", repetitions=1, say=lambda _: None)
    assert [row["variant"] for row in report["rows"]] == ["a", "e"], report["left_out"]
    assert all(row["compared_batch"] == row["batch"] == 2 for row in report["rows"])
    assert report["dtype"] == "float32" and shrunk(name).bf16
    # 576 (or 256) visual tokens, as in the real model
    assert report["tokens"]["visual"] == (256 if "qwen" in name else 576)


def small(batch: int, **overrides) -> object:
    preset = step.PRESETS["tiny"]()
    facts = copy.deepcopy(preset.facts)
    facts["text_config"] |= {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 256}
    return dataclasses.replace(preset, facts=facts, batch=batch, **overrides)


def test_all_variants_run_in_bf16(monkeypatch):
    """(a) to (d) train the same weights, whose gradients an engine takes away."""
    monkeypatch.setattr(step, "matmul_ceiling", lambda *_: 1e12)  # half a minute on a CPU without bf16 instructions
    report = step.measure(small(4, bf16=True), torch.device("cpu"), letters="abcde", repetitions=1, say=lambda _: None)
    assert [row["variant"] for row in report["rows"]] == list("abcde"), report["left_out"]
    assert report["dtype"] == "bfloat16" and all(row["compared_batch"] == row["batch"] == 4 for row in report["rows"])


def test_variants_that_train_the_same_weights_share_an_engine(tmp_path):
    rigs, resources = step.build_rigs("abcdefg", small(2, bf16=True), torch.device("cpu"), tmp_path)
    with resources:
        engines = [id(rig.engine) for rig in rigs.values()]
        weights = [tuple(id(p) for _, p in rig.parameters) for rig in rigs.values()]
    assert len(set(engines)) == 3 and engines[:4] == engines[:1] * 4 and engines[4] == engines[5]
    assert [weights.index(w) for w in weights] == [engines.index(e) for e in engines]


def test_a_reference_that_needs_too_much_memory_is_compared_with_fewer_images(monkeypatch):
    whole = step.gradients

    def scarce(own):
        if (own.variant.letter == "a" and own.images.forget > 1) or own.variant.letter == "d":
            raise torch.OutOfMemoryError("no room")
        return whole(own)

    monkeypatch.setattr(step, "gradients", scarce)
    monkeypatch.setattr(step, "run_alone", lambda *_: None)
    report = step.measure(small(4), torch.device("cpu"), letters="ade", repetitions=1, say=lambda _: None)
    found = {row["variant"]: (row["compared_batch"], row["batch"]) for row in report["rows"]}
    assert found == {"a": (2, 4), "e": (2, 4)} and list(report["left_out"]) == ["d"]


def test_at_the_projector_no_llm_layer_runs_and_a_plain_step_there_is_the_reference(monkeypatch):
    """Eager here: what is compiled takes a minute and changes nothing of this."""
    monkeypatch.setattr(rig, "VARIANTS", tuple(dataclasses.replace(v, compiled=False) for v in rig.VARIANTS))
    tiny = step.PRESETS["tiny"]()
    report = step.measure(tiny, torch.device("cpu"), letters="eh", repetitions=1, say=lambda _: None)
    assert report["left_out"] == {} and report["speedup_over"] == "e"
    e, h = report["rows"]
    assert (e["site"], h["site"]) == ("llm:2", "projector")
    assert h["max_loss_error"] + h["max_grad_error"] > 0 and h["max_loss_error"] <= 1e-5 and h["max_grad_error"] <= 1e-3
    assert h["flops_per_image"] == pytest.approx(h["counted_flops_per_image"], rel=0.02)
    # the reference's are 6 times those of (e)
    assert 8 * h["flops_per_image"] <= e["flops_per_image"]
    assert h["peak_bytes"] < e["peak_bytes"] / 2


def test_another_objective_at_the_projector_is_told_from_ours(monkeypatch):
    monkeypatch.setattr(rig, "VARIANTS", tuple(dataclasses.replace(v, compiled=False) for v in rig.VARIANTS))
    monkeypatch.setattr(rig, "run_alone", lambda *_: None)
    plain = step.make_reference
    monkeypatch.setattr(step, "make_reference", lambda own, images: dataclasses.replace(plain(own, images), scale=0.5))
    report = step.measure(small(2), torch.device("cpu"), letters="h", repetitions=1, say=lambda _: None)
    assert not report["rows"] and "differs from the reference" in report["left_out"]["h"]


def test_a_larger_batch_than_the_reference_has_room_for_is_measured_without_it():
    report = step.measure(small(2), torch.device("cpu"), letters="de", repetitions=1, batch=6, say=lambda _: None)
    assert [(row["variant"], row["batch"]) for row in report["rows"]] == [("d", 6), ("e", 6)]
    assert report["speedup_over"] == "d" and all(row["speedup"] for row in report["rows"])


@pytest.mark.slow
def test_compiled_variants_come_last_and_are_compared_at_the_same_weights():
    kept = []
    report = step.measure(
        small(4), torch.device("cpu"), letters="aefg", repetitions=2, say=lambda _: None,
        keep=lambda report: kept.append("".join(row["variant"] for row in report["rows"])),
    )  # fmt: skip
    assert [row["variant"] for row in report["rows"]] == list("aefg"), report["left_out"]
    assert list(dict.fromkeys(kept)) == ["", "ae", "aefg"]
    assert all(row["speedup"] > 0 and row["counted_flops_per_image"] > 0 for row in report["rows"])


def test_what_was_measured_is_kept_when_the_run_is_stopped(monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(step, "run_alone", stopped)
    kept = []
    with pytest.raises(KeyboardInterrupt):
        step.measure(
            small(2), torch.device("cpu"), letters="ad", repetitions=2, say=lambda _: None,
            keep=lambda report: kept.append(copy.deepcopy(report)),
        )  # fmt: skip
    assert kept[0]["rows"] == [] and kept[0]["copy_bytes_per_s"] > 0
    for report in kept[1:]:
        assert [row["variant"] for row in report["rows"]] == ["a", "d"]
        assert all(row["ms_per_image"] > 0 and row["peak_bytes"] is None for row in report["rows"])
        assert [step.line(row) for row in report["rows"]]
    counted = [report["rows"][0]["counted_flops_per_image"] for report in (kept[1], kept[-1])]
    assert counted[0] is None and counted[1] > 0


def test_memory_that_runs_short_in_the_timing_costs_images_and_no_row(monkeypatch):
    taken = []
    whole_step = step.Rig.step

    def scarce(rig):
        taken.append(rig.variant.letter)
        late = len(taken) > 6  # both have warmed up and been timed once
        if rig.variant.letter == "a" and late and rig.images.forget > 1:
            raise torch.OutOfMemoryError("no room")
        if rig.variant.letter == "c":
            raise torch.OutOfMemoryError("no room for (c) at all")
        whole_step(rig)

    monkeypatch.setattr(step.Rig, "step", scarce)
    monkeypatch.setattr(step, "run_alone", lambda *_: None)
    report = step.measure(small(4), torch.device("cpu"), letters="acd", repetitions=2, say=lambda _: None)
    assert {row["variant"]: row["batch"] for row in report["rows"]} == {"a": 2, "d": 4}
    assert all(row["speedup"] is not None for row in report["rows"])
    assert report["left_out"] == {"c": "out of memory with one image of each set"}


def test_a_variant_whose_gradients_differ_gets_no_row(monkeypatch):
    class Wrong(rig.VisualDistillation):
        def forward(self, batch):
            return {key: 1.01 * value for key, value in super().forward(batch).items()}

    monkeypatch.setattr(rig, "VisualDistillation", Wrong)
    report = step.measure(small(2), torch.device("cpu"), letters="ade", repetitions=1, say=lambda _: None)
    assert [row["variant"] for row in report["rows"]] == ["a", "d"]
    assert "differs from the reference" in report["left_out"]["e"]


@pytest.mark.parametrize(
    ("name", "step_tflop", "all_layers_tflop", "ratio"),
    [("llava-1.5-7b", 4.94, 26.7, 4.13), ("llava-1.5-13b", 7.10, 50.7, 5.27)],
)
def test_the_flops_of_the_real_presets(name, step_tflop, all_layers_tflop, ratio):
    preset = step.PRESETS[name]()
    architecture = step.architecture_of(step.configuration(preset).to_dict(), name=name)
    a, e = (step.analytic_flops(v, preset, architecture) for v in (rig.A, rig.E))
    # 5 tokens stand before the image, and the patch embedding counts: up to 3 % above the figures for 576 tokens alone.
    assert e / 1e12 == pytest.approx(step_tflop, rel=0.03)
    # The backward pass of (a) starts at the site, as RMU's does. From the last layer, as in output-level methods, it
    # has the layers above to go through as well.
    llm, tokens = architecture.llm, preset.prefix + architecture.visual_tokens + preset.suffix
    above = (llm.layers - 8) * (llm.linear_flops(tokens) + 2 * llm.attention_flops(tokens))
    assert (a + above) / 1e12 == pytest.approx(all_layers_tflop, rel=0.03)
    assert a / e == pytest.approx(ratio, rel=0.005)


def test_a_small_parameters_gradient_is_judged_by_itself_in_float32_and_in_the_whole_in_bf16():
    expected = [torch.full((100,), 1.0), torch.full((4,), 0.1)]
    wrong = [expected[0], torch.zeros(4)]
    assert step.gradient_error(wrong, expected, torch.float32) == pytest.approx(1.0)
    assert step.gradient_error(wrong, expected, torch.bfloat16) == pytest.approx(0.2 / (100 + 0.04) ** 0.5)
    assert step.gradient_error(expected, expected, torch.bfloat16) == 0.0
