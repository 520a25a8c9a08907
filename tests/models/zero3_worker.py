"""Run by test_zero3 in a process of its own: three steps of the visual path under ZeRO-3, one rank, losses as JSON.

Arguments: model folder, then one site. Compares nothing itself.
"""

import json
import sys

import deepspeed
import tiny
from transformers.integrations import HfDeepSpeedConfig

from fastvkd.models.families import family_of, train_only, visual_parameters
from fastvkd.models.loading import load_model, load_processor
from fastvkd.models.visual_path import VisualPath, collate_images

LEARNING_RATE = 1e-3


def main(folder: str, site: str) -> None:
    deepspeed.init_distributed("gloo", verbose=False)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,  # DeepSpeed clips at 1.0 unless told otherwise
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE, "weight_decay": 0.0, "torch_adam": True}},
    }
    partitioning = HfDeepSpeedConfig(config)  # models loaded while this lives are partitioned from the start
    model = load_model(folder, llm_layers=2)
    assert partitioning.is_zero3() and all(hasattr(p, "ds_id") for p in model.parameters())
    train_only(model, [p for _, p in visual_parameters(model, family_of(model), "vision+projector", [site])])
    path = VisualPath(model, ["projector", site])
    trainable = [p for p in path.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=path, model_parameters=trainable, config=config)
    batch = collate_images(load_processor(folder), model.config, tiny.photos((24, 20), (40, 20)))
    losses = []
    for _ in range(3):
        loss = engine(batch)[site].gathered().square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    print("losses", json.dumps(losses))


if __name__ == "__main__":
    main(*sys.argv[1:])
