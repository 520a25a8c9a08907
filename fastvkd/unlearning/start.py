"""All that can be refused of a run before its model is loaded, and what becomes of an earlier run in its folder."""

import importlib.util
import json
import logging
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fastvkd.engines.checkpoints import RUN, find_latest, set_aside, verify_checkpoint
from fastvkd.engines.ds_config import read_ds_config
from fastvkd.engines.requests import Asked, Request, asked_before, note_of, refuse_kept, requests_of
from fastvkd.engines.schedule import Schedule
from fastvkd.errors import ModelError, SettingsError
from fastvkd.files import delete_unfinished, write_atomically
from fastvkd.methods import METHODS
from fastvkd.models.answers import collate_answers
from fastvkd.models.families import image_token_id
from fastvkd.models.folder import identify_base, local_folder
from fastvkd.photos import decode_image
from fastvkd.records import Photo
from fastvkd.settings import Settings
from fastvkd.unlearning.identity import difference, identify_run
from fastvkd.unlearning.ingredients import Sources
from fastvkd.unlearning.tasks import Gathered, gather, refuse_with_zero3

log = logging.getLogger("fastvkd")


@dataclass(frozen=True)
class Start:
    """A run that nothing speaks against so far. `resume_from`: the checkpoint that it goes on from, with `updates`.

    requests: those that the base model has met before. asked: who of the forget set was in them. forgotten: what
    checkpoints note of whom this run is about; None where it is to forget nobody.
    """

    gathered: Gathered
    identity: dict[str, str]
    requests: list[Request]
    asked: Asked | None
    forgotten: dict[str, Any] | None
    resume_from: Path | None = None
    updates: int = 0

    @property
    def settings(self) -> Settings:
        return self.gathered.settings

    @property
    def photos(self) -> int:
        """How many different ones the run sees of its data."""
        sides = (self.gathered.sources.forget, self.gathered.sources.retain)
        return len({photo.key for side in sides for profile in side for photo in profile.photos})

    def describe(self) -> list[str]:
        """What would be done, a line each: on which data, with which model, where to. A photo of each side goes through
        the processor. Raises FastVKDError where that fails."""
        settings, sources = self.settings, self.gathered.sources
        sides = {"forget": sources.forget, "keep": sources.retain}
        lines = []
        for side, profiles in sides.items():
            photos = {photo.key: photo for profile in profiles for photo in profile.photos}
            if not photos:
                continue
            people = len({profile.entity for profile in profiles})
            tokens = _visual_tokens(sources, next(iter(photos.values())))
            lines.append(
                f"to {side}: {people:,} entities, {len(photos):,} photos, {tokens:,} visual tokens in the first"
            )
        lines.append(f"model: {sources.base.path}, fingerprint {sources.base.fingerprint[:12]}, its files whole")
        lines += [f"earlier {request.line()}" for request in self.requests]
        if self.asked is not None:
            lines.append(self.asked.line())
        output = Path(settings.output_dir)
        if self.resume_from is not None:
            lines.append(f"run: goes on from {self.resume_from}, {self.updates} of {settings.max_steps} updates done")
        else:
            lines.append(f"run: {settings.max_steps} updates by method={settings.method}, to {output}")
            if find_latest(output) is not None:
                fate = "deleted" if settings.overwrite_output_dir else "put aside in it"
                lines.append(f"earlier run: there is one in {output}, which will be {fate}")
        return lines

    def take_over(self) -> None:
        """Put what an earlier run left in the output folder aside, or delete it where settings say so, and note which
        run the folder is of from now on. For one rank only."""
        output = Path(self.settings.output_dir)
        for folder in (output, output / "best", output / "trials"):
            delete_unfinished(folder)  # of a run that was killed
        if self.resume_from is not None and self.resume_from.resolve().parent == output.resolve():
            aside = set_aside(output, after=self.updates)
        else:
            aside = set_aside(output, delete=self.settings.overwrite_output_dir)
        if aside is not None:
            log.warning("%s: what an earlier run left there is kept in %s", output, aside)
        base = asdict(self.gathered.sources.base)
        note = {"run": self.identity, "settings": self.settings.to_dict(), "base_model": base}
        write_atomically(output / RUN, (json.dumps(note, indent=1) + "\n").encode())


def begin(settings: Settings) -> Start:
    """Check settings, data, processor, the base model's earlier requests and the checkpoint to resume from. Nothing is
    written and no weight is loaded.

    Raises FastVKDError as `gather` does; also for somebody who is to be kept and was forgotten by an earlier request,
    and for a checkpoint that is damaged, has more updates than are asked for, or is of another run (see
    `identify_run`). AlreadyForgotten where earlier requests were about the whole forget set.
    """
    settings.check()
    for package in settings.report_to:
        if sys.modules.get(package) is None and importlib.util.find_spec(package) is None:
            raise SettingsError(f"report_to={package}: {package} is not installed; pip install fastvkd[{package}]")
    if settings.engine == "deepspeed":
        zero = read_ds_config(settings.deepspeed or "zero2").get("zero_optimization", {})
        if zero.get("stage") == 3:
            refuse_with_zero3(settings)
    gathered = gather(settings, identify_base(local_folder(settings.model_name_or_path)))
    settings = gathered.settings
    if METHODS[settings.method].trains:
        Schedule(settings.lr_scheduler_type, settings.warmup_steps, settings.max_steps)  # refuses what it cannot do
    start = _after_earlier_requests(gathered, identify_run(settings, gathered.sources))
    identity = start.identity
    wanted = settings.resume_from_checkpoint
    checkpoint = find_latest(Path(settings.output_dir)) if wanted == "auto" else Path(wanted) if wanted else None
    if checkpoint is None:
        return start
    manifest = verify_checkpoint(checkpoint)
    other = difference(manifest, identity, settings)
    if other is not None and wanted == "auto" and settings.overwrite_output_dir:
        return start
    _refuse_to_resume(checkpoint, manifest, other, settings)
    return replace(start, resume_from=checkpoint, updates=manifest["updates"])


def _after_earlier_requests(gathered: Gathered, identity: dict[str, str]) -> Start:
    """The start of a run that agrees with what its base model was made to forget before."""
    sources, settings = gathered.sources, gathered.settings
    requests = requests_of(Path(sources.base.path))
    if any(request.entities is None for request in requests):
        log.warning(
            "%s: an earlier request was noted without hashes, so whom it was about cannot be compared with this data",
            sources.base.path,
        )
    refuse_kept(requests, sources.retain, settings.data)
    forgets = METHODS[settings.method].split_key is None
    return Start(
        gathered,
        identity,
        requests,
        asked=asked_before(requests, sources.forget),
        forgotten=note_of(sources.forget, identity) if forgets else None,
    )


def _visual_tokens(sources: Sources, photo: Photo) -> int:
    """How many tokens the LLM reads of a photo."""
    image = decode_image(photo.data, photo.source)
    batch = collate_answers(sources.processor, [(image, "Who is this?", "Nobody.")], [0], [True])
    tokens = int((batch.inputs["input_ids"] == image_token_id(sources.config)).sum())
    if not tokens:
        raise ModelError(
            f"{sources.base.path}: its processor makes no token {image_token_id(sources.config)} of a photo, the "
            "placeholder that config.json names; take both from the same release"
        )
    return tokens


def _refuse_to_resume(checkpoint: Path, manifest: dict[str, Any], other: str | None, settings: Settings) -> None:
    if other is not None:
        raise SettingsError(
            f"{checkpoint}: is of a run with {other}, which this one cannot go on with; set another output_dir, leave "
            "resume_from_checkpoint out (then that run is put aside), or set overwrite_output_dir=true (then it is "
            "deleted)"
        )
    if manifest["updates"] > settings.max_steps:
        raise SettingsError(
            f"{checkpoint}: has {manifest['updates']} updates, more than max_steps={settings.max_steps}; raise "
            "max_steps, or leave resume_from_checkpoint out to start anew"
        )
    if settings.learning_rate == "auto" and manifest["watch"].get("learning_rate") is None:
        raise SettingsError(f"{checkpoint}: has no rate for learning_rate=auto to go on with: set one")
