"""While a model is loaded, a process holds at most one shard more than what it keeps, alone and as one of two ranks."""

import json
import subprocess
import sys
from pathlib import Path

import loading_memory
import pytest
from launching import launch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

SCRIPT = Path(loading_memory.__file__)


def write_model(folder: Path, width: int, layers: int, shard: str) -> Path:
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        vocab_size=2000,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=3)
    LlavaForConditionalGeneration(config).half().save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("shards")
    return write_model(root / "small", 64, 2, "1MB"), write_model(root / "large", 1024, 8, "34MB")


def figures(output: str) -> list[dict[str, int]]:
    return [json.loads(line.split("figures")[1]) for line in output.splitlines() if "figures" in line]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_one_shard_at_a_time(folders, tmp_path, monkeypatch, ranks) -> None:
    small, large = folders
    shard = max(file.stat().st_size for file in large.glob("*.safetensors"))
    # glibc would keep freed blocks below its growing threshold; so they go back to the system at once.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    if ranks == 1:
        command = [sys.executable, str(SCRIPT), str(small), str(large)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    else:
        output = launch(SCRIPT, str(small), str(large), log=tmp_path / "log")
    found = figures(output)
    assert len(found) == ranks
    for rank in found:
        assert rank["held"] > 3 * shard * (2 / ranks)  # several shards' worth, or the bound would say nothing
        assert rank["held"] < rank["peak"] + (1 << 20)
        assert rank["peak"] <= rank["held"] + shard, (rank, shard)
