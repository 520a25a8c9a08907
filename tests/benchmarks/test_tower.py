"""The benchmark of Qwen's tower: one row for each way, whose outputs agree."""

import torch
import tower
from transformers import Qwen2_5_VLConfig

VISION = {
    "hidden_size": 32, "intermediate_size": 64, "depth": 4, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "window_size": 56, "fullatt_block_indexes": [3], "out_hidden_size": 64,
}  # fmt: skip
TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def test_both_ways_are_timed_and_agree() -> None:
    config = Qwen2_5_VLConfig(vision_config=VISION, text_config=TEXT)
    rows = tower.measure(config, 112, torch.device("cpu"), count=1)
    assert [row["way"] for row in rows] == ["transformers", "pieces of one length at once"]
    assert all(row["ms"] > 0 and row["peak_bytes"] > 0 for row in rows)
    assert rows[1]["error"] < 1e-5
