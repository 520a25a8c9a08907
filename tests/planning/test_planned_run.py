"""A LLaVA of 200 million random weights goes from training to an exported folder through the command line, and the
resident set of the process peaks where `fastvkd plan` says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import gc, json, sys, threading, time
from pathlib import Path
import psutil, torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from fastvkd.cli import main
from fastvkd.engines.checkpoints import bytes_per_trainable_parameter, find_latest
from fastvkd.models.loading import load_processor
from fastvkd.planning.plan import plan
from fastvkd.settings import load_settings

small, root = (Path(path) for path in sys.argv[1:])
resident = psutil.Process().memory_info

def peak_of(work):
    gc.collect()
    before, peak, running = resident().rss, 0, True
    def watch():
        nonlocal peak
        while running:
            peak = max(peak, resident().rss)
            time.sleep(0.002)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        running = False
        watcher.join()
    return peak - before

def command(*arguments):
    assert main(list(arguments)) == 0

(root / "data").mkdir()
for side, colours in (("forget", ("red", "green")), ("retain", ("blue", "white"))):
    with (root / "data" / f"{side}.jsonl").open("w") as file:
        for colour in colours:
            Image.new("RGB", (48, 48), colour).save(root / "data" / f"{colour}.png")
            row = {"image": f"{colour}.png", "entity": colour, "question": "Who?", "answer": colour}
            print(json.dumps(row), file=file)

processor = load_processor(small)
vision = CLIPVisionConfig(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224, patch_size=16
)
text = LlamaConfig(
    hidden_size=1024, intermediate_size=2816, num_hidden_layers=7, num_attention_heads=8, vocab_size=10000
)
image_token = json.loads((small / "config.json").read_text())["image_token_index"]
config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token, image_seq_length=196)
torch.manual_seed(0)
model = LlavaForConditionalGeneration(config)
parameters = sum(p.numel() for p in model.parameters())
model.save_pretrained(root / "model", max_shard_size="200MB")
del model
processor.image_processor.size = {"height": 224, "width": 224}
processor.image_processor.crop_size = {"height": 224, "width": 224}
processor.patch_size = 16
processor.save_pretrained(root / "model")

def settings(model, output, site):
    return [
        f"model_name_or_path={model}", f"data={root / 'data'}", f"output_dir={output}",
        f"sites={site}", "optim=adamw_8bit", "per_device_train_batch_size=2", "device=cpu",
        "learning_rate=1e-4", "max_steps=4",
    ]

# Libraries and their first allocations are no part of the plan.
command("train", *settings(small, root / "first", "llm:2"))
large = settings(root / "model", root / "run", "llm:6")
planned = plan(load_settings(None, large)).to_dict()["memory_bytes"]["total"]
# The same four steps in two parts: a schedule for four, ended after two, would need a signal.
train = peak_of(lambda: command("train", *large, "save_steps=2", "max_steps=2"))
resume = peak_of(lambda: command("train", *large, "resume_from_checkpoint=auto"))
merge = peak_of(lambda: command("export", "--run", str(root / "run"), "--to", str(root / "merged")))
shard = max(file.stat().st_size for file in (root / "model").glob("*.safetensors"))
latest = find_latest(root / "run")
print("figures", json.dumps({
    "parameters": parameters, "planned": planned, "train": train, "resume": resume, "export": merge, "shard": shard,
    "updates": latest.name, "bytes_per_trainable": bytes_per_trainable_parameter(latest),
    "metrics": len((root / "run" / "metrics.jsonl").read_text().splitlines()),
}))
"""


@pytest.mark.slow
def test_train_checkpoint_resume_export_stay_within_the_plan(world, tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(world.model), str(tmp_path)]
    # glibc would keep freed blocks below its growing threshold resident; so they go back to the system at once.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    child = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert child.returncode == 0, child.stderr[-4000:]
    line = next(line for line in child.stdout.splitlines() if line.startswith("figures"))
    found = json.loads(line.removeprefix("figures"))
    assert found["parameters"] == pytest.approx(200e6, rel=0.06), found
    assert found["updates"] == "checkpoint-4" and found["metrics"] == 4, found
    assert found["train"] == pytest.approx(found["planned"], rel=0.10), found
    assert found["resume"] <= 1.10 * found["planned"], found
    assert found["export"] <= found["shard"] + 300e6, found
    # The visual part only: float32 weights and 8-bit moments (2.03 bytes), 32-bit ones for norms and biases.
    assert found["bytes_per_trainable"] == pytest.approx(4 + 2.03, rel=0.02), found
