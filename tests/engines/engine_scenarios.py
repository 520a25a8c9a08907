"""A tiny trained-frozen-trained model and its training loop, shared by the DeepSpeed ranks and the tests beside them.

Run by the DeepSpeed launcher: trains under every preset, saves, resumes, and leaves the results as files.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from fastvkd.engines.checkpoints import load_checkpoint, save_checkpoint
from fastvkd.models.folder import BaseModel

# working dtype, optimiser
KINDS = {
    "float32-adamw_torch": (torch.float32, "adamw_torch"),
    "bfloat16-adamw_8bit": (torch.bfloat16, "adamw_8bit"),
    "bfloat16-adamw_torch": (torch.bfloat16, "adamw_torch"),
    "bfloat16-paged_adamw_8bit": (torch.bfloat16, "paged_adamw_8bit"),
    "bfloat16-lion_8bit": (torch.bfloat16, "lion_8bit"),
    "bfloat16-ademamix_8bit": (torch.bfloat16, "ademamix_8bit"),
}
CASES = [(preset, kind) for preset in ("zero0", "zero2", "zero3") for kind in list(KINDS)[:2]]
CASES += [(preset, "bfloat16-adamw_torch") for preset in ("zero2_offload_optimizer", "zero3_offload")]
CASES += [(preset, kind) for preset in ("zero2", "zero3") for kind in list(KINDS)[3:]]
UPDATES, SAVED_AT, ACCUMULATION, GLOBAL_BATCH = 8, 4, 2, 8
BASE = BaseModel("base", "f" * 64)
SETTINGS = {
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "warmup_steps": 2,
    "max_steps": 12,
    "lr_scheduler_type": "cosine",
}


class Tiny(nn.Module):
    """A trained tower and projector, then a frozen LLM; forward(batch) returns the loss terms."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tower = nn.Sequential(nn.Linear(48, 96), nn.LayerNorm(96), nn.GELU(), nn.Linear(96, 80))
        self.projector = nn.Linear(80, 64)
        self.llm = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64)).requires_grad_(False)
        self.to(dtype)
        self.masks = {n: torch.rand(p.shape) < 0.6 for n, p in self.trained()}
        for name, parameter in self.trained():
            parameter.register_hook(lambda grad, mask=self.masks[name]: grad * mask.view_as(grad))

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self.named_parameters() if not n.startswith("llm")]

    def forward(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.llm(self.projector(self.tower(batch.to(self.llm[0].weight.dtype))))
        return {"forget": hidden.float().square().mean(), "retain": (hidden.float() - 1).square().mean()}


def train_to(engine, updates):
    """Every rank takes its share of each micro-batch of the global batch."""
    norms, share = [], GLOBAL_BATCH // engine.world_size
    while engine.updates < updates:
        for micro in range(ACCUMULATION):
            generator = torch.Generator().manual_seed(10 * engine.updates + micro)
            batch = torch.randn(GLOBAL_BATCH, 48, generator=generator)
            terms = engine.forward_module(batch[engine.rank * share : (engine.rank + 1) * share])
            engine.backward(terms["forget"] + terms["retain"])
            norm = engine.step()
        norms.append(float(norm))
    return norms


def save(engine, folder):
    return save_checkpoint(folder, engine, sampler={}, settings={}, base_model=BASE, keep=5)


def deepspeed_engine(preset, dtype, optim):
    from fastvkd.engines.deepspeed_engine import DeepSpeedEngine, start_deepspeed
    from fastvkd.engines.ds_config import complete_ds_config, read_ds_config

    config = complete_ds_config(
        read_ds_config(preset),
        micro_batch=GLOBAL_BATCH // 2,
        gradient_accumulation_steps=ACCUMULATION,
        max_grad_norm=0.5,
        bf16=dtype == torch.bfloat16,
        optim=optim,
        quantize_llm="none",
        world_size=2,
        on_gpu=False,
    )
    keep_alive = start_deepspeed(config)
    module = Tiny(dtype)
    del keep_alive
    return DeepSpeedEngine(module, module.trained(), config, optim=optim, **SETTINGS)


def main(out: Path) -> None:
    for preset, kind in CASES:
        dtype, optim = KINDS[kind]
        folder = out / preset / kind
        engine = deepspeed_engine(preset, dtype, optim)
        norms = train_to(engine, SAVED_AT)
        checkpoint = save(engine, folder)
        norms += train_to(engine, UPDATES)
        final, masters = engine.weights(), engine.state_dict()["masters"]
        mean = engine.mean_over_ranks(torch.tensor([float(engine.rank)]))
        agreed = engine.any_rank(engine.rank == 1)
        resumed = deepspeed_engine(preset, dtype, optim)
        notice = load_checkpoint(checkpoint, resumed, base_model=BASE).notice
        train_to(resumed, UPDATES)
        again = resumed.weights()
        other = deepspeed_engine(preset, dtype, optim)
        local = load_checkpoint(out / "local" / kind / f"checkpoint-{SAVED_AT}", other, base_model=BASE)
        taken_over = other.state_dict()["masters"]
        if engine.rank == 0:
            save_file(final, folder / "final.safetensors")
            save_file(masters, folder / "masters.safetensors")
            save_file(again, folder / "resumed.safetensors")
            save_file(taken_over, folder / "taken_over.safetensors")
            report = {"norms": norms, "notice": notice, "local": local.notice, "mean": mean, "agreed": agreed}
            torch.save(report | {"updates": other.updates}, folder / "report.pt")
        else:
            assert not final and not masters  # only rank 0 receives whole weights


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
