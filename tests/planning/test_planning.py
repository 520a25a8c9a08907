"""The plan's formulas against real models: parameters exactly, FLOPs to 1 %, memory to 10 %, design figures to 2 %."""

import dataclasses
import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from fastvkd.devices import GIB, usable_bytes
from fastvkd.engines.local import LocalEngine
from fastvkd.errors import ModelError, SettingsError
from fastvkd.planning import cards
from fastvkd.planning.architecture import ARCHITECTURES, architecture_of, find_architecture
from fastvkd.planning.cost import ASSUMED, Cost, Recipe
from fastvkd.planning.plan import plan
from fastvkd.settings import Settings

aten = torch.ops.aten
CPU_SDPA = {  # the counter knows the CUDA kernels of fused attention only
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


def tiny_config(**text):
    vision = CLIPVisionConfig(
        hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, image_size=56, patch_size=7
    )
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**(sizes | {"vocab_size": 64} | text)), image_token_index=3
    )


def visual_step(model, config, layers, batch, trainable, prefix):
    """Forward and backward of the truncated path on one batch; returns the loss."""
    pixels = torch.randn(batch, 3, config.vision_config.image_size, config.vision_config.image_size, dtype=model.dtype)
    features = model.model.get_image_features(pixel_values=pixels).pooler_output
    hidden = torch.stack(list(features)) if not torch.is_tensor(features) else features
    llm = model.model.language_model
    embedded = llm.embed_tokens(torch.ones(batch, prefix, dtype=torch.long))
    if layers:
        hidden = llm(inputs_embeds=torch.cat([embedded, hidden], 1), use_cache=False).last_hidden_state
    return hidden.float().square().mean()


def truncated(config, layers, dtype=torch.float32, attention="sdpa", trainable="vision+projector"):
    config = LlavaConfig(**config.to_dict())
    config.text_config.num_hidden_layers = layers
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attention).to(dtype)
    model.lm_head = torch.nn.Identity()
    model.model.language_model.norm = torch.nn.Identity()
    model.requires_grad_(False)
    blocks = config.vision_config.num_hidden_layers
    for name, parameter in model.named_parameters():
        tower = "vision_tower" in name and f"layers.{blocks - 1}." not in name and "post_layernorm" not in name
        if (tower and "vision" in trainable) or ("projector" in name and "projector" in trainable):
            parameter.requires_grad_(True)
    return model


@pytest.mark.parametrize("file", sorted(ARCHITECTURES.glob("*.json")), ids=lambda p: p.stem)
def test_parameter_counts_equal_those_of_the_real_model(file):
    facts = json.loads(file.read_text())
    config = AutoConfig.for_model(**{k: v for k, v in facts.items() if k != "name_or_path"})
    config.text_config.num_hidden_layers = 8
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    language = sum(p.numel() for p in model.model.language_model.parameters())
    language -= model.model.language_model.norm.weight.numel()
    everything = sum(p.numel() for p in model.model.parameters()) - model.model.language_model.norm.weight.numel()
    cost = Cost(architecture_of(facts), Recipe(sites=("llm:8",)))
    assert cost.trainable + cost.frozen == everything
    assert cost.visual == everything - language


@pytest.mark.parametrize(
    ("name", "layers", "cached", "online"),
    [("llava-1.5-7b", 8, 4.94, 26.7), ("llava-1.5-13b", 8, 7.10, 50.7), ("llava-v1.6-34b", 8, 11.6, 130.8)],
)
def test_flops_are_the_figures_of_the_design(name, layers, cached, online):
    architecture = architecture_of(json.loads((ARCHITECTURES / f"{name}.json").read_text()), large_images=False)
    architecture = dataclasses.replace(architecture, visual_tokens=576)
    recipe = Recipe(sites=(f"llm:{layers}",))
    # The design's round figures take attention's backward pass at one forward; the counter and this plan at two.
    scores = layers * architecture.llm.attention_flops(576)
    scores += sum(architecture.tower.attention_flops(block) for block in range(architecture.tower.used_blocks))
    total = Cost(architecture, recipe, prefix_tokens=0).flops()["total"]
    assert (total - scores) / 1e12 == pytest.approx(cached, rel=0.02)
    assert total / 1e12 == pytest.approx(cached, rel=0.022)
    full = Recipe(sites=(f"llm:{architecture.llm.layers}",), online_teacher=True)
    assert Cost(architecture, full, prefix_tokens=60).flops()["total"] / 1e12 == pytest.approx(online, rel=0.02)


def test_a_llama_layer_and_the_clip_tower_cost_what_the_design_says():
    for name, layer in (("llava-1.5-7b", 0.239), ("llava-1.5-13b", 0.372)):
        architecture = find_architecture(name)
        flops = architecture.llm.linear_flops(576) + architecture.llm.attention_flops(576)
        assert flops / 1e12 == pytest.approx(layer, rel=0.003)
        tower = architecture.tower
        forward = tower.embedding_flops() + tower.blocks * (tower.linear_flops() + tower.attention_flops(0))
        assert forward / 1e12 == pytest.approx(0.382, rel=0.003)


@pytest.mark.parametrize("trainable", ["vision+projector", "projector", "vision"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("layers", [0, 2])
def test_flops_agree_with_the_flop_counter(layers, attention, trainable):
    config, prefix, batch = tiny_config(), 5, 2
    model = truncated(config, layers, attention=attention, trainable=trainable)
    site = f"llm:{layers}" if layers else "projector"
    recipe = Recipe(sites=(site,), trainable=trainable, eager_attention=attention == "eager")
    flops = Cost(architecture_of(config.to_dict()), recipe, prefix_tokens=prefix).flops()
    with FlopCounterMode(display=False, custom_mapping=CPU_SDPA) as forward:
        loss = visual_step(model, config, layers, batch, trainable, prefix)
    with FlopCounterMode(display=False, custom_mapping=CPU_SDPA) as backward:
        loss.backward()
    planned_forward = batch * (flops["tower_forward"] + flops["llm_forward"])
    planned_backward = batch * (flops["tower_backward"] + flops["llm_backward"])
    assert forward.get_total_flops() == pytest.approx(planned_forward, rel=0.01)
    recomputed = 0
    if attention == "sdpa":  # the fused kernel computes the scores once more, one product of forward's two
        architecture = architecture_of(config.to_dict())
        trained = 3 if "vision" in trainable else 0
        recomputed = layers * architecture.llm.attention_flops(prefix + 64)
        recomputed += trained * architecture.tower.attention_flops(0)
    assert backward.get_total_flops() == pytest.approx(planned_backward + batch * recomputed // 2, rel=0.01)


def measured_peak(step):
    """Peak bytes allocated on the CPU while `step` runs, above what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    level = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


@pytest.mark.parametrize(
    ("dtype", "attention", "layers", "batch", "accumulation"),
    [
        (torch.float32, "sdpa", 3, 8, 1),
        (torch.bfloat16, "sdpa", 3, 8, 1),
        (torch.bfloat16, "sdpa", 3, 4, 2),
        (torch.bfloat16, "eager", 3, 4, 1),
        (torch.float32, "sdpa", 0, 8, 1),
    ],
)
def test_planned_memory_is_the_measured_peak(dtype, attention, layers, batch, accumulation):
    config = tiny_config(hidden_size=256, intermediate_size=688, num_attention_heads=8)
    config.vision_config.hidden_size, config.vision_config.intermediate_size = 192, 768
    config.vision_config.image_size = 84  # 144 visual tokens
    prefix = 5
    site = f"llm:{layers}" if layers else "projector"
    recipe = Recipe(
        sites=(site,),
        optim="adamw_torch",
        bf16=dtype == torch.bfloat16,
        eager_attention=attention == "eager",
        gradient_accumulation_steps=accumulation,
    )
    planned = Cost(architecture_of(config.to_dict()), recipe, prefix_tokens=prefix).memory(batch)

    def run():
        model = truncated(config, layers, dtype, attention)
        engine = LocalEngine(
            [(n, p) for n, p in model.named_parameters() if p.requires_grad],
            module=model,
            optim="adamw_torch",
            learning_rate=1e-4,
            weight_decay=0.0,
            max_grad_norm=1.0,
            gradient_accumulation_steps=accumulation,
            warmup_steps=0,
            max_steps=9,
            lr_scheduler_type="constant",
            device=torch.device("cpu"),
        )
        for _ in range(2 * accumulation):
            engine.backward(visual_step(model, config, layers, batch, "vision+projector", prefix))
            engine.step()

    run()  # lazy initialisation outside the measurement
    assert measured_peak(run) == pytest.approx(planned["total"], rel=0.10)


def settings_for(model, **changes):
    values = {"model_name_or_path": model, "data": "data", "sites": {"llm:8": 1.0}, "bf16": True, "optim": "adamw_8bit"}
    return Settings(**(values | changes))


def test_the_13b_model_at_layer_8_is_recommended_within_24_gib():
    result = plan(settings_for("llava-hf/llava-1.5-13b-hf", per_device_train_batch_size=8), gpu="RTX 4090")
    assert result.llm_layers_loaded == 8
    fixed = sum(result.memory_bytes[key] for key in ("weights", "masters", "moments", "gradients"))
    assert fixed == pytest.approx(9.3e9, rel=0.01)
    assert result.recommendation["deepspeed"] is None and result.recommendation["quantize_llm"] == "none"
    assert result.recommendation["micro_batch"] >= 2
    assert "local engine" in result.recommendation["reason"]
    needed = dataclasses.replace(result.recipe, micro_batch=result.recommendation["micro_batch"])
    total = Cost(find_architecture("llava-1.5-13b"), needed).memory(needed.micro_batch)["total"]
    assert total <= usable_bytes(cards.GPU_MEMORY_GIB["RTX 4090"] * GIB)


def test_json_has_the_documented_keys():
    result = json.loads(json.dumps(plan(settings_for("llava-1.5-13b"), memory="24GiB").to_dict()))
    assert set(result) == {
        "llm_layers_loaded",
        "parameters",
        "flops_per_image",
        "memory_bytes",
        "micro_batch",
        "cache_bytes_per_image",
        "fits",
        "recommendation",
        "step_seconds",
        "search",
        "scrub",
        "jobs",
        "notes",
    }
    assert [job["name"] for job in result["jobs"]] == ["export", "eval", "attack"] and result["notes"] == []
    assert set(result["parameters"]) == {"trainable", "frozen"}
    assert set(result["flops_per_image"]) == {"tower_forward", "tower_backward", "llm_forward", "llm_backward", "total"}
    memory = {"weights", "masters", "moments", "gradients", "activations", "total"}
    assert set(result["memory_bytes"]) == memory
    assert result["cache_bytes_per_image"] == 576 * 5120 * 4


def test_micro_batch_and_fits_tell_the_same_story():
    for micro_batch in (1, 4, 9, 40):
        result = plan(settings_for("llava-1.5-13b", per_device_train_batch_size=micro_batch), memory="24GiB")
        assert result.fits == (micro_batch <= result.micro_batch)


def test_cheaper_means_are_tried_before_dearer_ones():
    def recommended(model, memory, world_size=1, **changes):
        return plan(settings_for(model, **changes), memory=memory, world_size=world_size).recommendation

    assert recommended("llava-1.5-7b", "80GiB")["deepspeed"] is None
    assert recommended("llava-1.5-7b", "80GiB", world_size=4)["deepspeed"] == "zero2"
    assert recommended("llava-v1.6-34b", "24GiB", sites={"llm:20": 1.0})["quantize_llm"] == "nf4"
    assert recommended("llava-v1.6-34b", "24GiB", 8, sites={"llm:60": 1.0})["zero_stage"] == 3
    assert recommended("llava-v1.6-34b", "24GiB", sites={"llm:60": 1.0})["deepspeed"] == "zero3_offload"
    assert "shallower site" in recommended("llava-v1.6-34b", "4GiB", sites={"llm:60": 1.0})["reason"]
    assert plan(settings_for("llava-1.5-7b")).fits is None


def test_savings_are_in_the_plan():
    base = Recipe(sites=("llm:8",), optim="adamw_torch")
    architecture = find_architecture("llava-1.5-13b")

    def part(key, **changes):
        return Cost(architecture, dataclasses.replace(base, **changes)).memory(4)[key]

    assert part("moments", optim="adamw_8bit") < 0.27 * part("moments")
    assert part("weights", quantize_llm="nf4") < 0.45 * part("weights")
    assert part("masters", zero_stage=2, world_size=4) == pytest.approx(part("masters") / 4, rel=1e-3)
    assert part("masters", zero_stage=2, offload_optimizer=True) == 0
    assert part("activations", gradient_checkpointing=True) < 0.3 * part("activations")
    assert part("weights", zero_stage=3, world_size=8) < 0.6 * part("weights")


def test_a_time_estimate_adds_up_and_moves_the_right_way():
    def seconds(model="llava-1.5-13b", gpu="H100", world_size=1, **changes):
        return plan(settings_for(model, **changes), gpu=gpu, world_size=world_size).step_seconds

    one = seconds(per_device_train_batch_size=8)
    flops = plan(settings_for("llava-1.5-13b")).flops_per_image["total"]
    assert one["compute"] == pytest.approx(8 * flops / (989e12 * ASSUMED["mfu"]))
    assert one["gather"] == one["pcie"] == 0 and one["overlapped"] == one["serial"] == one["compute"]
    assert seconds(per_device_train_batch_size=16)["compute"] == pytest.approx(2 * one["compute"])

    def on(ranks, preset, **changes):
        return seconds(world_size=ranks, engine="deepspeed", deepspeed=preset, per_device_train_batch_size=8, **changes)

    two = on(2, "zero2")
    trained = plan(settings_for("llava-1.5-13b")).parameters["trainable"]
    link = 450e9 * ASSUMED["link_efficiency"]
    assert two["gather"] == pytest.approx(2 * trained * 2 / 2 / link)  # two collectives of bf16, half of it sent
    assert two["compute"] == one["compute"] and two["pcie"] == 0
    assert on(64, "zero2")["gather"] > 10 * on(8, "zero2")["gather"]  # between nodes
    assert on(8, "zero3")["gather"] > 5 * on(8, "zero2")["gather"]  # the frozen layers too
    accumulated = on(8, "zero3", gradient_accumulation_steps=4)
    assert accumulated["gather"] == pytest.approx(4 * on(8, "zero3")["gather"])
    offloaded = on(8, "zero3_offload", optim="adamw_torch")
    assert offloaded["pcie"] > 0 and offloaded["serial"] == pytest.approx(
        sum(offloaded[term] for term in ("compute", "gather", "pcie"))
    )
    assert plan(settings_for("llava-1.5-13b"), memory="80GiB").step_seconds is None
    assert "estimate of an update" in plan(settings_for("llava-1.5-13b"), gpu="RTX 4090").table()


def test_every_card_has_all_its_figures():
    assert set(cards.GPU_MEMORY_GIB) == set(cards.GPU_PEAK_TFLOPS) == set(cards.GPU_LINK_GB_PER_S)
    for driver, tflops in (("NVIDIA H100 80GB HBM3", 989), ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA L40S", 362)):
        assert cards.peak_flops(driver) == tflops * 1e12
    assert cards.peak_flops("NVIDIA GeForce RTX 3090") == 71e12
    real = {"L4": 22.5, "L40S": 45.0, "A40": 45.0, "A10": 22.5, "T4": 14.8}  # not the 24, 48 and 16 of their names
    for name, gib in real.items():
        assert cards.gpu_memory(gpu=name, memory=None) == int(gib * GIB)
    assert cards.peak_flops("Something else") is None


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"gpu": "RTX 4091"}, SettingsError, "did you mean 'RTX 4090'"),
        ({"memory": "lots"}, SettingsError, "like 24GiB"),
        ({"world_size": 0}, SettingsError, "at least 1"),
    ],
)
def test_what_cannot_be_planned_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        plan(settings_for("llava-1.5-7b"), **call)


def test_unknown_models_and_sites_are_refused():
    with pytest.raises(ModelError, match=r"did you mean 'llava-1\.5-7b'"):
        plan(settings_for("llava-1.5-7"))
    with pytest.raises(ModelError, match="only 32 layers"):
        plan(settings_for("llava-1.5-7b", sites={"llm:33": 1.0}))
    with pytest.raises(ModelError, match="no plan for model_type 'mllama'"):
        architecture_of({"model_type": "mllama"})
    with pytest.raises(ModelError, match="has no 'vision_config'"):
        architecture_of({"model_type": "llava"})


def test_a_local_folder_is_planned_from_its_config(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    result = plan(settings_for(str(tmp_path), sites={"llm:2": 1.0}))
    assert result.llm_layers == 3 and result.llm_layers_loaded == 2
    assert "LLM layers loaded       2 of 3" in result.table()
