"""The feature-level method, VKD: the images of a run, what the frozen original sees of them, and the task over both."""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvkd.data.dead_leaves import dead_leaves
from fastvkd.data.strangers import read_strangers
from fastvkd.errors import DataError
from fastvkd.methods import Side
from fastvkd.models.folder import BaseModel, identify_base, local_folder
from fastvkd.models.loading import load_model
from fastvkd.models.prompts import visual_prefix
from fastvkd.models.visual_path import VisualBatch, VisualPath
from fastvkd.photos import decode_image
from fastvkd.records import Photo, Profile
from fastvkd.settings import TARGETLESS, Settings
from fastvkd.unlearning.ingredients import Forward, Sources, Trained
from fastvkd.unlearning.sampling import BatchPlan, world_size_of
from fastvkd.unlearning.vkd.images import ImageSet, NoiseImage, Views, distinct
from fastvkd.unlearning.vkd.objective import DistillBatch, VisualDistillation
from fastvkd.unlearning.vkd.saturation import ProjectorUnits
from fastvkd.unlearning.vkd.scenes import Scenes, draw_scenes
from fastvkd.unlearning.vkd.scrub import Kept, Scrubber, scrub_room
from fastvkd.unlearning.vkd.stranger import Maps, Population, StrangerMap, loading_of, original, stranger_maps
from fastvkd.unlearning.vkd.targets import SiteLoss, TargetTable, mean_features, redirect, variance
from fastvkd.unlearning.vkd.teacher import FeatureCache, fill_caches
from fastvkd.unlearning.watch import Watch

VARIANCE_IMAGES = 32  # retained images, at least, of which the teacher's variance is taken
_START_IMAGES = 512  # retained images whose features shape the start of `saturate`


@dataclass(frozen=True)
class FeatureTask:
    """Images to forget and to retain, and what their features shall become.

    `online` is the copy of the original that runs beside, if one does: retained images then aim at what it sees of the
    very view that is trained on. `lenders` are the images, neither forgotten nor synthetic, that lend surroundings.
    """

    settings: Settings
    device: torch.device
    images: ImageSet
    plan: BatchPlan
    tables: dict[str, TargetTable]  # by site
    objective: VisualDistillation
    online: VisualPath | None
    lenders: range
    watch: Watch | None = None

    def load(self, step: int, rank: int, world_size: int) -> DistillBatch:
        """The images of one step on one rank, forget first, with cached targets; on the host, pinned for a GPU."""
        forget, retain = self.plan.indices(step, rank, world_size)
        indices = forget + retain
        views, scenes = None, None
        if self.settings.augment:
            seed, positions = (self.settings.seed, 14, step, 0), self.plan.positions(rank, world_size)
            views = Views(seed, positions, world_size * len(indices))
            scenes = self._scenes(views, indices)
        keys = [self.images.keys[i] for i in indices]
        images = self.images.batch(indices, views, scenes)
        taught: VisualBatch | None = None
        targets = {}
        if self.online is None:
            targets = {site: table.gather(keys) for site, table in self.tables.items()}
        else:
            # What an online teacher sees is known on the device only. Forget images stand first and aim elsewhere,
            # unless they are only repelled from the teacher, or aim at what a map makes of its features.
            taught = images.tail(0 if self.settings.forget_target in ("repel", "stranger") else len(forget))
        is_forget = torch.arange(len(indices)) < len(forget)
        batch = DistillBatch(images, is_forget, targets, keys=keys, taught=taught, scenes=scenes)
        return batch.pin_memory() if self.device.type == "cuda" else batch

    def _scenes(self, views: Views, indices: Sequence[int]) -> Scenes | None:
        elsewhere = self.settings.elsewhere
        # Which tokens show which half of a photo is known of one grid only.
        beside = self.settings.beside if self.images.fixed_resolution else 0.0
        if not elsewhere + beside:
            return None
        movable = [i < self.lenders.stop for i in indices]
        return draw_scenes(views.seed, views.positions, views.total, movable, self.lenders, elsewhere, beside)

    def place(self, loaded: DistillBatch) -> DistillBatch:
        """The same batch on the device, with the targets that the online teacher gives."""
        batch = loaded.to(self.device)
        if batch.taught is None:
            return batch
        seen = self._see_online(batch.taught, batch.keys[-batch.taught.n_images :])
        for site, table in self.tables.items():
            aims = [None] * (len(batch.keys) - len(seen[site]))
            batch.targets[site] = table.gather(batch.keys, [*aims, *seen[site]], batch.scenes).moved(
                lambda t: t.to(self.device, non_blocking=True)
            )
        return batch

    @torch.no_grad()
    def _see_online(self, images: VisualBatch, keys: Sequence[str]) -> dict[str, list[Tensor]]:
        assert self.online is not None
        features = self.online(images)
        # A view has as many tokens as its image, so nothing need be counted on the device.
        return {site: list(features[site].gathered().split(t.counts(keys))) for site, t in self.tables.items()}

    def loss(self, batch: DistillBatch, only: Side | None = None) -> dict[str, Tensor]:
        """The terms of `VisualDistillation`; with `only` the other side's images have no weight."""
        if only is not None:
            batch = replace(batch, weight=(batch.is_forget == (only == "forget")).float())
        return self.objective(batch)


class Distillation:
    """VKD before its model is run: images, the order of their batches, and what a reference model sees of them.

    Images are those to forget, to retain, and auxiliary ones (strangers, then synthetic images), in this order. It is
    made before the model is loaded, so that neither a reference model nor the whole one need lie beside that.
    """

    def __init__(self, settings: Settings, sources: Sources, device: torch.device):
        self.settings, self.sources, self.device = settings, sources, device
        self._dtype = torch.bfloat16 if settings.bf16 else torch.float32
        forget, retain = ([p for profile in side for p in profile.photos] for side in (sources.forget, sources.retain))
        strangers = [] if settings.strangers is None else read_strangers(settings.strangers)
        _refuse_known(strangers, forget, retain)
        unnamed = distinct([photo for photos in strangers for photo in photos])
        auxiliary = unnamed + _auxiliary_photos(settings, retain[0])
        self.images = ImageSet(
            forget + retain + auxiliary, sources.processor, sources.config, dtype=self._dtype, pin=device.type == "cuda"
        )
        count, end = len(distinct(forget)), len(self.images) - len(auxiliary)
        self.plan = BatchPlan(
            range(count),
            range(count, end),
            batch_size=settings.per_device_train_batch_size,
            forget_share=settings.forget_share,
            seed=settings.seed,
            auxiliary=range(end, len(self.images)),
            auxiliary_share=settings.auxiliary_share,
        )
        self._lenders = range(count, end + len(unnamed))
        self._needed = self._find_needed()
        self.images.prepare(self._needed)
        self.reference: dict[str, FeatureCache] = {}
        if settings.reference_model is not None and settings.forget_target == "reference":
            self.reference = self._see_reference(settings.reference_model)
        self._maps: dict[str, dict[str, StrangerMap]] = {}
        if settings.forget_target == "stranger":
            self._population = self._people(strangers)
            self._found = stranger_maps(settings, sources, self.images, self._population, self._cache_root, device)
            self._maps = self._by_photo(self._found)

    def _find_needed(self) -> list[int]:
        """The images whose features are asked for.

        A run too short to visit all asks for those of its batches, and for enough retained ones for a variance.
        """
        settings = self.settings
        if settings.mask is not None or settings.num_train_epochs or settings.forget_target in ("mean", "redirect"):
            return list(range(len(self.images)))
        visited = self.plan.visited(settings.max_steps * settings.gradient_accumulation_steps, world_size_of(settings))
        others = [i for i in self.plan.retain if i not in visited]
        lacking = max(0, VARIANCE_IMAGES - (len(self.plan.retain) - len(others)))
        return sorted(visited.union(others[:lacking]))

    def _retained(self, count: int, batch_size: int = 32) -> Iterator[VisualBatch]:
        """Up to `count` retained and auxiliary images, spread evenly over both, in batches on the device."""
        kept = [*self.plan.retain, *self.plan.auxiliary]
        chosen = kept[:: max(1, len(kept) // count)][:count]
        for start in range(0, len(chosen), batch_size):
            yield self.images.batch(chosen[start : start + batch_size]).to(self.device)

    def task(
        self, trained: Trained, forward: Forward, progress: Callable[[int, int], None], partitioned: bool
    ) -> FeatureTask:
        """Write down what the model, still the original, sees; then move its weights to where the target starts."""
        settings, sites = self.settings, list(self.settings.sites)
        path = VisualPath(trained.model, sites)

        def see(images: VisualBatch) -> Any:
            # torch compiles a pass with a graph and one without to different arithmetic, and training has one with.
            with torch.set_grad_enabled(settings.compile or torch.is_grad_enabled()):
                return forward(path, images)

        tables = self._targets(see, progress, partitioned)
        units: ProjectorUnits | None = None
        if settings.forget_target == "saturate":
            units = ProjectorUnits(trained.model)
            units.start(path, self._retained(_START_IMAGES))
        elif settings.forget_target == "repel":
            _random_start(trained.parameters, settings)
        objective = VisualDistillation(
            path,
            distance=settings.distance,
            lambda_forget=settings.lambda_forget,
            lambda_retain=settings.lambda_retain,
            repel=settings.forget_target == "repel",
            margin=settings.repel_margin,
            units=units,
            saturation_margin=settings.saturation_margin,
        )
        watch = self._watch(tables, objective, see) if settings.watch_steps else None
        online = None if trained.teacher is None else VisualPath(trained.teacher, sites)
        return FeatureTask(
            settings, self.device, self.images, self.plan, tables, objective, online, self._lenders, watch
        )

    def _watch(
        self, tables: dict[str, TargetTable], objective: VisualDistillation, see: Callable[[VisualBatch], Any]
    ) -> Watch | None:
        """Held-out views, of images whose features are asked for anyway, so that watching changes nothing.

        None for a target that has no features to aim at.
        """
        settings, plan, needed = self.settings, self.plan, set(self._needed)
        if settings.forget_target in TARGETLESS:
            return None
        kept = plan.retain_per_rank + plan.auxiliary_per_rank
        shares = {
            "forget": (plan.forget, 1.0),
            "retain": (plan.retain, plan.retain_per_rank / kept),
            "auxiliary": (plan.auxiliary, plan.auxiliary_per_rank / kept),
        }
        kinds = {kind: ([i for i in pool if i in needed], share) for kind, (pool, share) in shares.items()}
        kinds = {kind: (pool, share) for kind, (pool, share) in kinds.items() if pool}
        return Watch(settings, self.images, kinds, tables, objective, see, self.device)

    def _see_reference(self, folder: str) -> dict[str, FeatureCache]:
        """What the reference model sees of the forget images, by site."""
        model = load_model(folder, dtype=self._dtype, llm_layers=self.sources.llm_layers, device=self.device)
        caches = self._open_caches(identify_base(local_folder(folder)), as_trained=False)
        forget = {self.images.keys[i]: i for i in self.plan.forget}
        fill_caches(caches, VisualPath(model, list(self.settings.sites)), forget, self.images.collate, self.device)
        return caches

    def _people(self, strangers: Sequence[Sequence[Photo]]) -> Population:
        """Whose photos are forgotten, and who is not: strangers, or for want of them those who are retained."""

        def by_person(profiles: Sequence[Profile]) -> list[list[Profile]]:
            people: dict[str, list[Profile]] = {}
            for profile in profiles:
                people.setdefault(profile.entity, []).append(profile)
            return [mine for mine in people.values() if any(profile.photos for profile in mine)]

        def photos(profiles: Sequence[Profile]) -> list[Photo]:
            return [photo for profile in profiles for photo in profile.photos]

        at = {key: i for i, key in enumerate(self.images.keys)}

        def positions(shown: Sequence[Photo]) -> list[int]:
            return list(dict.fromkeys(at[photo.key] for photo in shown))

        forgotten = by_person(self.sources.forget)
        others = strangers or [photos(mine) for mine in by_person(self.sources.retain)]
        return Population(
            forgotten,
            [positions(photos(mine)) for mine in forgotten],
            list(map(positions, others)),
            known=not strangers,
        )

    def _by_photo(self, maps: Maps) -> dict[str, dict[str, StrangerMap]]:
        """By site and forget photo, what makes its person a stranger."""
        keys = [[self.images.keys[i] for i in shown] for shown in self._population.people]
        return {
            site: {key: map_ for mine, map_ in zip(keys, found, strict=True) for key in mine}
            for site, found in maps.items()
        }

    def scrub(self, unlearned: nn.Module, progress: Callable[[int, int, dict[str, float]], None]) -> dict[str, Tensor]:
        """Adapters of the LLM, by name, with which it reads what it knew of forgotten people as a stranger's.

        unlearned: a model with the trained weights. The whole original is loaded beside it, as for the guided search.
        """
        population, at = self._population, {key: i for i, key in enumerate(self.images.keys)}
        room = scrub_room(self.settings, self.images, unlearned)
        model = original(self.settings, loading_of(self.settings, self.device, room))
        kept = Kept.of(
            self.sources.retain,
            self.sources.forget,
            at,
            strangers=[] if population.known else [i for photos in population.others for i in photos],
            synthetic=range(self._lenders.stop, len(self.images)),
            lenders=self._lenders,
        )
        scrubber = Scrubber(
            model, unlearned, self.sources.processor, self.images, population, self._found, kept, self.settings
        )
        return scrubber.run(progress)

    def _targets(
        self, path: Callable[[VisualBatch], Any], progress: Callable[[int, int], None], all_ranks_run: bool
    ) -> dict[str, TargetTable]:
        """What the images aim at, by site, once the original has seen what that takes; `path` runs it."""
        settings, images = self.settings, self.images
        forget, retain = ({images.keys[i]: i for i in side} for side in (self.plan.forget, self.plan.retain))
        noise: dict[str, NoiseImage] = {}
        if settings.forget_target == "noise":
            each = settings.noise_images == "per_image"
            noise = {key: images.noise_like(i, settings.seed, i if each else 0) for key, i in forget.items()}
        source = {key: image.key for key, image in noise.items()}
        if settings.forget_target == "mean":
            source = dict.fromkeys(forget, "mean")
        elif settings.forget_target == "redirect":
            source = redirect(list(forget), list(retain), settings.seed)
        # Images whose target is noise or a reference need no teacher pass.
        elsewhere = forget if settings.forget_target in ("noise", "reference") else {}
        needed = {images.keys[i]: i for i in self._needed if images.keys[i] not in elsewhere}
        caches = self._open_caches(self.sources.base)
        seen: dict[str, int | NoiseImage] = {**needed, **{image.key: image for image in noise.values()}}
        # a compiled pass keeps activations, so it takes no more images than a training step
        batch_size = min(16, settings.per_device_train_batch_size) if settings.compile else 16
        fill_caches(
            caches,
            path,
            seen,
            images.collate,
            self.device,
            batch_size=batch_size,
            progress=progress,
            all_ranks_run=all_ranks_run,
        )
        keys = [key for key in needed if key in retain]
        total = sum(settings.sites.values())
        tables = {}
        for site, cache in caches.items():
            weight = settings.sites[site] / total
            loss = SiteLoss.of(weight, variance(cache, keys), settings.distance, settings.huber_beta)
            mean = mean_features(cache, keys) if settings.forget_target == "mean" else None
            # They act where the teacher's features are: beside an online teacher, or on the host with the cache.
            where = self.device if settings.online_teacher else torch.device("cpu")
            maps = {key: map_.to(where) for key, map_ in self._maps.get(site, {}).items()}
            tables[site] = TargetTable(cache, source, loss, mean, self.reference.get(site), maps)
        return tables

    @property
    def _cache_root(self) -> Path:
        settings = self.settings
        return Path(settings.cache_dir) if settings.cache_dir else Path(settings.output_dir) / "teacher_cache"

    def _open_caches(self, model: BaseModel, *, as_trained: bool = True) -> dict[str, FeatureCache]:
        """`as_trained`: seen with the compiled or fused layers that training has, where it has some."""
        settings, processor = self.settings, self.sources.processor
        rank = int(os.environ.get("RANK", "0")) if settings.engine == "deepspeed" else 0
        ingredients = {
            "weights": model.fingerprint,
            "prefix": visual_prefix(processor),
            "preprocessing": processor.image_processor.to_json_string(),
            "image_processor": type(processor.image_processor).__name__,  # of PIL's or torchvision's resizing
            "compute_dtype": str(self._dtype),
            "attn_implementation": settings.attn_implementation if as_trained else "sdpa",
            "compile": settings.compile and as_trained,
            "fused_frozen_ops": settings.fused_frozen_ops and as_trained,
            "quantize_llm": settings.quantize_llm,
        }
        return {
            site: FeatureCache(
                self._cache_root, site=site, dtype=settings.cache_dtype, ingredients=ingredients, rank=rank
            )
            for site in settings.sites
        }


def _refuse_known(strangers: Sequence[Sequence[Photo]], forget: Sequence[Photo], retain: Sequence[Photo]) -> None:
    known = {photo.key: photo.source for photo in (*forget, *retain)}
    for photo in (photo for photos in strangers for photo in photos):
        if photo.key in known:
            raise DataError(f"{photo.source}: the same image as {known[photo.key]}, so no stranger; remove it")


def _auxiliary_photos(settings: Settings, like: Photo) -> list[Photo]:
    """Synthetic images of the size of photo `like`."""
    size = decode_image(like.data, like.source).size
    photos = []
    for i in range(settings.auxiliary_images):
        buffer = io.BytesIO()
        dead_leaves(size, (settings.seed, 18, i)).save(buffer, format="PNG", compress_level=1)
        photos.append(Photo(buffer.getvalue(), f"auxiliary image {i}"))
    return photos


@torch.no_grad()
def _random_start(parameters: Sequence[tuple[str, nn.Parameter]], settings: Settings) -> None:
    """Move each matrix by `repel_start` of its norm: at the teacher itself the gradient of repel is zero."""
    generator = torch.Generator().manual_seed(settings.seed)
    for _, parameter in parameters:
        if parameter.dim() >= 2:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device, parameter.dtype)
            parameter.add_(noise * (settings.repel_start * parameter.norm() / noise.norm()))
