"""Under ZeRO-3 the visual path trains as without: its hooks and those of the partitioning do not disturb each other."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from fastvkd.models.families import family_of, train_only, visual_parameters
from fastvkd.models.loading import load_model
from fastvkd.models.visual_path import VisualPath, collate_images

WORKER = Path(__file__).with_name("zero3_worker.py")
LEARNING_RATE = 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("name", "site"), [("llava", "projector"), ("qwen3_vl", "llm:2")])
def test_three_steps_have_the_losses_of_plain_training(name, site, tmp_path):
    config, processor = tiny.BUILDERS[name]()
    tiny.randomised(config).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = (
        os.environ
        | world
        | {
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # ninja, for the first build
        }
    )
    done = subprocess.run(
        [sys.executable, WORKER, tmp_path, site], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("losses"))[len("losses ") :])

    model = load_model(tmp_path, llm_layers=2)
    chosen = [p for _, p in visual_parameters(model, family_of(model), "vision+projector", [site])]
    train_only(model, chosen)
    optimizer = torch.optim.AdamW(chosen, lr=LEARNING_RATE, weight_decay=0.0)
    path, batch = (
        VisualPath(model, ["projector", site]),
        collate_images(processor, config, tiny.photos((24, 20), (40, 20))),
    )
    for loss_there in found:
        loss = path(batch)[site].gathered().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(loss_there, rel=1e-4)
    assert found[0] > found[1] > found[2]
