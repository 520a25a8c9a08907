"""The script of the real-size run does its whole job on a tiny model, and its folder is laid out as published."""

import json
from typing import Any

import pytest
import real_size
from transformers import CLIPVisionConfig, LlamaConfig

from fastvkd.demo.model import Shape
from fastvkd.engines.checkpoints import find_latest
from fastvkd.models.loading import load_model
from fastvkd.models.shards import read_safetensors_header, shards_of

SHAPE = Shape(image_size=28, patch_size=14)


def tiny_facts() -> dict[str, Any]:
    """The configuration of a LLaVA with few weights."""
    facts = real_size.architecture()
    facts["vision_config"] |= CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    ).to_diff_dict()
    facts["text_config"] |= LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=2048,
    ).to_diff_dict()
    return facts


@pytest.fixture
def job(tmp_path) -> real_size.Job:
    return real_size.Job(tmp_path / "work", tiny_facts(), SHAPE, steps=3)


def test_the_folder_has_the_published_names_and_loads(job) -> None:
    _, _, checked = job.build()
    assert checked.endswith("in 3 shards, float16")
    keys = {key for shard in shards_of(job.model) for key in read_safetensors_header(shard)[0]}
    assert {
        "language_model.lm_head.weight",
        "language_model.model.layers.2.mlp.down_proj.weight",
        "multi_modal_projector.linear_1.bias",
        "vision_tower.vision_model.embeddings.class_embedding",
    } <= keys
    model = load_model(job.model)
    assert model.lm_head.weight.std() > 0.01


@pytest.mark.proof
def test_every_phase_has_its_row(job, tmp_path) -> None:
    result = tmp_path / "rows.json"
    real_size.measure(job, result, ["build", "plan", "train, `projector`"], {"device": "x"})
    real_size.measure(job, result, list(real_size.PHASES), {"device": "x"})
    rows = json.loads(result.read_text())["tables"]["phases"]["rows"]
    assert [row[0] for row in rows] == list(real_size.PHASES)
    checked = {row[0]: row[3] for row in rows}
    assert checked["and resumed"] == "weights equal the uninterrupted run's"
    assert checked["export"] == "same bytes outside the trained weights"
    assert checked["the same, killed"].startswith("SIGKILL left checkpoint-")
    assert all(float(row[1]) >= 0 and float(row[2]) > 0 for row in rows)
    assert find_latest(job.killed).name == "checkpoint-3"
