"""The data of a feature-level run: its images, the teacher's features of them, targets, and batches made of these."""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvkd.data.dead_leaves import dead_leaves
from fastvkd.data.images import decode_image
from fastvkd.data.records import Photo, Profile
from fastvkd.engines.checkpoints import BaseModel
from fastvkd.models.prompts import visual_prefix
from fastvkd.models.visual_path import VisualBatch, VisualPath, collate_images
from fastvkd.settings import Settings
from fastvkd.unlearning.images import BatchPlan, ImageSet, Views, noise_image
from fastvkd.unlearning.objective import DistillBatch
from fastvkd.unlearning.targets import TargetTable, mean_features, redirect, variance
from fastvkd.unlearning.teacher import FeatureCache, fill_caches

Report = Callable[[int, int], None]
VARIANCE_IMAGES = 32  # retained images, at least, of which the teacher's variance is taken


def world_size_of(settings: Settings) -> int:
    """Number of processes that draw from the data together; DeepSpeed's launcher tells."""
    return int(os.environ.get("WORLD_SIZE", "1")) if settings.engine == "deepspeed" else 1


class DistillData:
    """Images, cached teacher features, and targets of a feature-level run; makes its batches."""

    def __init__(
        self,
        settings: Settings,
        forget: list[Profile],
        retain: list[Profile],
        processor: Any,
        config: Any,
        dtype: torch.dtype,
        device: torch.device,
        base: BaseModel,
    ):
        self.settings, self.device = settings, device
        self._processor, self._config, self._dtype, self._base = processor, config, dtype, base
        forget_photos = [photo for profile in forget for photo in profile.photos]
        retain_photos = [photo for profile in retain for photo in profile.photos]
        auxiliary = _auxiliary_photos(settings, retain_photos[0])
        self.images = ImageSet(
            forget_photos + retain_photos + auxiliary, processor, config, dtype=dtype, pin=device.type == "cuda"
        )
        count, end = len(ImageSet.distinct(forget_photos)), len(self.images) - len(auxiliary)
        self.forget_keys, self.retain_keys = self.images.hashes[:count], self.images.hashes[count:end]
        self.plan = BatchPlan(
            range(count),
            range(count, end),
            batch_size=settings.per_device_train_batch_size,
            forget_share=settings.forget_share,
            seed=settings.seed,
            auxiliary=range(end, len(self.images)),
            auxiliary_share=settings.auxiliary_share,
        )
        self.variances: dict[str, float] = {}
        self._online: VisualPath | None = None
        self._tables: dict[str, TargetTable] = {}
        self._caches: dict[str, FeatureCache] = {}
        self._reference: dict[str, FeatureCache] = {}
        self._position = {key: i for i, key in enumerate(self.images.hashes)}
        self._repels = settings.forget_target == "repel"
        self._needed = self._find_needed()
        self.images.prepare(self._needed)

    def see_reference(self, path: VisualPath, identity: BaseModel) -> None:
        """Write down what the reference model sees of the forget images; afterwards it may be freed."""
        self._reference = self._open_caches(identity)
        fill_caches(
            self._reference, path, self.forget_keys, self._batch_of(self.forget_keys), batch_size=16, device=self.device
        )

    def see_teacher(self, path: Callable[[VisualBatch], Any], report: Report, *, all_ranks_run: bool = False) -> None:
        """Write down what the original sees of the images of the run and of noise, and derive the targets from it."""
        settings = self.settings
        noise = self._noise_keys() if settings.forget_target == "noise" else {}
        # Of an image that aims at noise, or at what the reference sees, the teacher's own view is not asked for.
        elsewhere = set(self.forget_keys if settings.forget_target in ("noise", "reference") else ())
        needed = [key for i in self._needed if (key := self.images.hashes[i]) not in elsewhere]
        keys = [*needed, *dict.fromkeys(noise.values())]
        retained = set(self.retain_keys)
        retain_keys = [key for key in needed if key in retained]
        self._caches = self._open_caches(self._base)
        fill_caches(
            self._caches,
            path,
            keys,
            self._batch_of(keys),
            batch_size=16,
            device=self.device,
            progress=report,
            all_ranks_run=all_ranks_run,
        )
        source: dict[str, str] = dict(noise)
        if settings.forget_target == "mean":
            source = dict.fromkeys(self.forget_keys, "mean")
        elif settings.forget_target == "redirect":
            source = redirect(self.forget_keys, self.retain_keys, settings.seed)
        for site, cache in self._caches.items():
            self.variances[site] = variance(cache, retain_keys)
            mean = mean_features(cache, retain_keys) if settings.forget_target == "mean" else None
            self._tables[site] = TargetTable(cache, source, mean, self._reference.get(site))

    def _find_needed(self) -> list[int]:
        """The images whose features are asked for: in a run too short to visit all, those of its batches, and enough
        retained ones for a variance."""
        settings = self.settings
        if settings.mask is not None or settings.num_train_epochs or settings.forget_target in ("mean", "redirect"):
            return list(range(len(self.images)))
        visited = self.plan.visited(settings.max_steps * settings.gradient_accumulation_steps, world_size_of(settings))
        others = [i for i in self.plan.retain if i not in visited]
        lacking = max(0, VARIANCE_IMAGES - (len(self.plan.retain) - len(others)))
        return sorted(visited.union(others[:lacking]))

    def teach_online(self, teacher: VisualPath) -> None:
        """From now on retained images' targets are what `teacher` sees of the very view that is trained on."""
        self._online = teacher

    def retained(self, count: int, batch_size: int = 32) -> Iterator[VisualBatch]:
        """Up to `count` retained and auxiliary images, spread evenly over both, in batches on the device."""
        kept = [*self.plan.retain, *self.plan.auxiliary]
        chosen = kept[:: max(1, len(kept) // count)][:count]
        for start in range(0, len(chosen), batch_size):
            yield self.images.batch(chosen[start : start + batch_size]).to(self.device)

    def load(self, step: int, rank: int, world_size: int) -> DistillBatch:
        """The images of one step on one rank, forget first, with cached targets; on the host, pinned for a GPU."""
        forget, retain = self.plan.indices(step, rank, world_size)
        indices = forget + retain
        views: Views | None = None
        if self.settings.augment:
            positions = self.plan.positions(rank, world_size)
            views = Views((self.settings.seed, 14, step, 0), positions, world_size * len(indices))
        keys = [self.images.hashes[i] for i in indices]
        images = self.images.batch(indices, views)
        # What an online teacher sees is known on the device only. Images to be forgotten stand first and aim elsewhere,
        # unless they are only repelled from the teacher.
        taught = None if self._online is None else images.tail(0 if self._repels else len(forget))
        batch = DistillBatch(
            images,
            torch.arange(len(indices)) < len(forget),
            {} if taught is not None else {site: table.gather(keys) for site, table in self._tables.items()},
            keys=keys,
            taught=taught,
        )
        return batch.pin_memory() if self.device.type == "cuda" else batch

    def place(self, loaded: DistillBatch) -> DistillBatch:
        """The same batch on the device, with the targets that the online teacher gives."""
        batch = loaded.to(self.device)
        if batch.taught is None:
            return batch
        seen = self._see_online(batch.taught, batch.keys[-batch.taught.n_images :])
        for site, table in self._tables.items():
            aims = [None] * (len(batch.keys) - len(seen[site]))
            batch.targets[site] = table.gather(batch.keys, [*aims, *seen[site]]).to(self.device)
        return batch

    @torch.no_grad()
    def _see_online(self, images: VisualBatch, keys: Sequence[str]) -> dict[str, list[Tensor]]:
        assert self._online is not None
        features = self._online(images)
        # A view has as many tokens as its image, so nothing need be counted on the device.
        return {site: list(features[site].gathered().split(t.counts(keys))) for site, t in self._tables.items()}

    def _noise_keys(self) -> dict[str, str]:
        """Forget image -> the key of its noise image, which has its size: one noise image a size, or one an image."""
        each = self.settings.noise_images == "per_image"
        keys = {}
        for i, key in enumerate(self.forget_keys):
            width, height = self.images.size(i)
            keys[key] = f"noise-{self.settings.seed}-{i if each else 0}-{width}x{height}"
        return keys

    def _batch_of(self, keys: list[str]) -> Callable[[Any], VisualBatch]:
        def batch(positions: Any) -> VisualBatch:
            wanted = [keys[p] for p in positions]
            if wanted[0] in self._position and wanted[-1] in self._position:
                return self.images.batch([self._position[key] for key in wanted])
            pictures = []
            for key in wanted:
                if key in self._position:
                    pictures.append(self.images.image(self._position[key]))
                else:
                    _, seed, number, size = key.split("-")
                    width, height = map(int, size.split("x"))
                    pictures.append(noise_image((width, height), (int(seed), 15, int(number))))
            return collate_images(self._processor, self._config, pictures)

        return batch

    def _open_caches(self, model: BaseModel) -> dict[str, FeatureCache]:
        settings = self.settings
        rank = int(os.environ.get("RANK", "0")) if settings.engine == "deepspeed" else 0
        root = Path(settings.cache_dir) if settings.cache_dir else Path(settings.output_dir) / "teacher_cache"
        ingredients = {
            "weights": model.fingerprint,
            "prefix": visual_prefix(self._processor),
            "preprocessing": self._processor.image_processor.to_json_string(),
            "compute_dtype": str(self._dtype),
            "quantize_llm": settings.quantize_llm,
        }
        return {
            site: FeatureCache(root, site=site, dtype=settings.cache_dtype, ingredients=ingredients, rank=rank)
            for site in settings.sites
        }


def _auxiliary_photos(settings: Settings, like: Photo) -> list[Photo]:
    """Synthetic images of the size of photo `like`."""
    size = decode_image(like.data, like.source).size
    photos = []
    for i in range(settings.auxiliary_images):
        buffer = io.BytesIO()
        dead_leaves(size, (settings.seed, 18, i)).save(buffer, format="PNG", compress_level=1)
        photos.append(Photo(buffer.getvalue(), f"auxiliary image {i}"))
    return photos
