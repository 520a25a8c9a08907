"""Whether there is room for a run, in memory and on disk, by the plan: asked before anything is loaded."""

import os
import shutil
from pathlib import Path

import psutil
import torch

from fastvkd.devices import GIB
from fastvkd.errors import SettingsError
from fastvkd.methods import METHODS
from fastvkd.planning.plan import Plan, plan
from fastvkd.settings import Settings


def room_for(settings: Settings, device: torch.device, images: int) -> list[str]:
    """What a run on `images` photos takes of memory and disk and what is there, a line each.

    Raises SettingsError where the plan does not fit the card, or checkpoints and teacher cache not the disk. Plans know
    feature methods only; of others, and of host memory, nothing is refused.
    """
    if not METHODS[settings.method].features or settings.answer_loss != "none":
        return ["memory and disk: not planned, since they depend on the lengths of questions"]
    world_size = int(os.environ.get("WORLD_SIZE", "1")) if settings.engine == "deepspeed" else 1
    card = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    memory = None if card is None else f"{card / GIB:.3f}GiB"
    planned = plan(settings, memory=memory, world_size=world_size)
    there = psutil.virtual_memory().available if card is None else card
    where = "host memory" if card is None else torch.cuda.get_device_name(device)
    if planned.fits is False:
        raise SettingsError(
            f"memory: the run is planned at {planned.peak_bytes / GIB:.1f} GiB, and {where} has {there / GIB:.1f} GiB; "
            f"{planned.recommendation['command'] or planned.recommendation['reason']}"
        )
    lines = [f"memory: {planned.peak_bytes / GIB:.2f} GiB planned, {there / GIB:.1f} GiB of {where}"]
    wanted = _on_disk(settings, planned, images)
    by_disk: dict[int, tuple[Path, int]] = {}
    for folder, count in wanted.items():
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        known = by_disk.get(place.stat().st_dev, (place, 0))[1]
        by_disk[place.stat().st_dev] = (place, known + count)
    for place, count in by_disk.values():
        free = shutil.disk_usage(place).free
        if count > free:
            raise SettingsError(
                f"disk: checkpoints and teacher cache are planned at {count / GIB:.1f} GiB, and {place} has "
                f"{free / GIB:.1f} GiB free; free some, lower save_total_limit, or set another output_dir or cache_dir"
            )
        lines.append(f"disk: {count / GIB:.2f} GiB planned, {free / GIB:.1f} GiB free at {place}")
    return lines


def _on_disk(settings: Settings, planned: Plan, images: int) -> dict[Path, int]:
    """Bytes by folder: one checkpoint more than is kept, for one is written before another goes; and the cache."""
    output = Path(settings.output_dir)
    weights = planned.parameters["trainable"] * (2 if settings.bf16 else 4)
    checkpoint = weights + planned.memory_bytes["masters"] + planned.memory_bytes["moments"]
    kept = 1 if not settings.save_steps else settings.save_total_limit or settings.max_steps // settings.save_steps
    wanted = {output: checkpoint * (kept + 1)}
    if not settings.online_teacher:
        cache = Path(settings.cache_dir) if settings.cache_dir else output / "teacher_cache"
        wanted[cache] = wanted.get(cache, 0) + planned.cache_bytes_per_image * images
    return wanted
