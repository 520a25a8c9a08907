"""A 197-million-parameter LLaVA with random weights trains within its planned memory, measured by the system."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import gc, sys, threading, time
import bitsandbytes, psutil, torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
sys.path.insert(0, sys.argv[1])
from test_planning import truncated, visual_step
from fastvkd.engines.local import LocalEngine
from fastvkd.planning.architecture import architecture_of
from fastvkd.planning.cost import Cost, Recipe

vision = CLIPVisionConfig(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224, patch_size=16
)
text = LlamaConfig(
    hidden_size=1024, intermediate_size=2816, num_hidden_layers=6, num_attention_heads=8, vocab_size=32000
)
config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=3)
resident = psutil.Process().memory_info
before, peak, batch = resident().rss, 0, 2

def watch():
    global peak
    while running:
        peak = max(peak, resident().rss)
        time.sleep(0.002)

model = truncated(config, 6)
trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
gc.collect()
running = True
watcher = threading.Thread(target=watch)
watcher.start()
engine = LocalEngine(
    trained, module=model, optim="adamw_8bit", learning_rate=1e-4, weight_decay=0.0, max_grad_norm=1.0,
    gradient_accumulation_steps=1, warmup_steps=0, max_steps=9, lr_scheduler_type="constant",
    device=torch.device("cpu"),
)
for _ in range(2):
    engine.backward(visual_step(model, config, 6, batch, "vision+projector", 5))
    engine.step()
running = False
watcher.join()
recipe = Recipe(sites=("llm:6",), optim="adamw_8bit", bf16=False)
print(peak - before, Cost(architecture_of(config.to_dict()), recipe, prefix_tokens=5).memory(batch)["total"])
"""


@pytest.mark.slow
@pytest.mark.proof
def test_the_resident_set_peaks_where_the_plan_says():
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parent)]
    # glibc would keep freed blocks below its growing threshold resident; so they go back to the system at once.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    child = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    measured, planned = map(int, child.stdout.split()[-2:])
    assert measured == pytest.approx(planned, rel=0.10)
