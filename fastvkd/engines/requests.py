"""The requests to forget that a model has met, and whom they were about: salted hashes, no name, no photo, no id.

A run notes whom it makes the model forget (`note_of`), its checkpoints and the exported folder carry the note on, and
later runs, evaluations and `fastvkd requests` compare their data with it. A salt keeps two records from being compared
and tables from being made beforehand. It does not keep anybody from trying ids one by one: a record says of whoever
has a list of ids who of them was forgotten.
"""

import hmac
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastvkd.data.tables import person_key
from fastvkd.engines.exporting import RECORD, history_of
from fastvkd.errors import AlreadyForgotten, DataError, ModelError, one_line
from fastvkd.methods import method_of
from fastvkd.records import Photo, Profile

_PREFIX = 12  # digits of a hash that stand for it in a line


@dataclass(frozen=True)
class Request:
    """One request, as the record of a model has it. `number`: 1 is the earliest.

    entities, photos: HMAC-SHA256 (hex) by `salt` of the ids and of the photos' own SHA-256; None in a record of an
    earlier version, which noted nobody. date: of the run, as YYYY-MM-DD. data_sha256: of its photos and questions.
    """

    number: int
    method: str
    forget_split: str
    date: str | None = None
    salt: str = ""
    entities: frozenset[str] | None = None
    photos: frozenset[str] = field(default_factory=frozenset)
    data_sha256: str | None = None
    certificate: str | None = None

    @staticmethod
    def of(number: int, record: Mapping[str, Any]) -> "Request":
        """From one of the records of `history_of`. Raises KeyError, TypeError or ValueError where it is damaged."""
        settings, note, paper = record["settings"], record.get("forgotten"), record.get("certificate") or {}
        plain = Request(
            number, method_of(settings).name, settings.get("forget_split", "?"), certificate=paper.get("verdict")
        )
        if note is None:
            return plain
        bytes.fromhex(note["salt"])
        return replace(
            plain,
            date=note["date"],
            salt=note["salt"],
            entities=frozenset(note["entities"]),
            photos=frozenset(note["photos"]),
            data_sha256=note["data_sha256"],
        )

    @property
    def named(self) -> str:
        """How a message names it."""
        count = "" if self.entities is None else f", {_many(len(self.entities), 'entity', 'entities')}"
        return f"request {self.number} ({self.date or 'date unknown'}{count})"

    def holds_entity(self, profile: Profile) -> bool:
        return self.entities is not None and _hashed(self.salt, "entity", person_key(profile.entity)) in self.entities

    def holds_photo(self, photo: Photo) -> bool:
        return bool(self.photos) and _hashed(self.salt, "photo", photo.key) in self.photos

    def told_by(self, profile: Profile) -> str | None:
        """By what `profile` is known to be about somebody of this request: "id", "photo", or None."""
        if self.holds_entity(profile):
            return "id"
        return "photo" if any(map(self.holds_photo, profile.photos)) else None

    def is_shown_by(self, profiles: Sequence[Profile]) -> bool:
        """Whether photos of everybody of this request are among `profiles`: of each id, or each photo itself."""
        shown = [profile for profile in profiles if profile.photos]
        if not self.entities:
            return False
        ids = {_hashed(self.salt, "entity", person_key(profile.entity)) for profile in shown}
        photos = {_hashed(self.salt, "photo", photo.key) for profile in shown for photo in profile.photos}
        return self.entities <= ids or self.photos <= photos

    def described(self) -> dict[str, Any]:
        """As JSON, without the hashes."""
        known = self.entities is not None
        return {
            "request": self.number,
            "date": self.date,
            "entities": len(self.entities or ()) if known else None,
            "photos": len(self.photos) if known else None,
            "forget_split": self.forget_split,
            "method": self.method,
            "data_sha256": self.data_sha256,
            "certificate": self.certificate,
        }

    def line(self) -> str:
        """As one line."""
        about = "noted without hashes by an earlier version"
        if self.entities is not None:
            photos = _many(len(self.photos), "photo", "photos")
            about = f"{_many(len(self.entities), 'entity', 'entities')}, {photos}, data {self.data_sha256:.{_PREFIX}}"
        judged = f"certificate {self.certificate}" if self.certificate else "no certificate"
        date = self.date or "date unknown"
        return f"request {self.number}  {date}  {about}, method {self.method}, {judged}"


def note_of(forget: Iterable[Profile], identity: Mapping[str, str]) -> dict[str, Any]:
    """Whom a run makes its model forget, for its checkpoints: {"date", "salt", "entities", "photos", "data_sha256"}.

    Only rows with photos count. `identity` is the run's (`unlearning.identity.identify_run`), from which the salt is
    made: a run that is resumed has the same one, the next request another.
    """
    salt = hmac.digest(b"fastvkd salt", f"{identity['base']} {identity['data']}".encode(), "sha256").hex()[:32]
    shown = [profile for profile in forget if profile.photos]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "salt": salt,
        "entities": sorted({_hashed(salt, "entity", person_key(profile.entity)) for profile in shown}),
        "photos": sorted({_hashed(salt, "photo", photo.key) for profile in shown for photo in profile.photos}),
        "data_sha256": identity["data"],
    }


def requests_of(model: Path) -> list[Request]:
    """The requests that a model folder has met, the earliest first; [] of a model that fastvkd did not make.

    Runs that forget nobody (`method: finetune`) are none. Raises ModelError for a damaged record.
    """
    try:
        runs = [record for record in history_of(model) if method_of(record["settings"]).split_key is None]
        return [Request.of(number, record) for number, record in enumerate(runs, 1)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{model / RECORD}: what it notes of a request cannot be read ({one_line(error, 80)}); export the run again"
        ) from error


def refuse_kept(requests: Sequence[Request], kept: Iterable[Profile], data: str) -> None:
    """Nobody of an earlier request may be kept by a new run: it would teach the model who that is.

    Raises DataError that names the entity and the request.
    """
    for profile, request, told in _known(requests, kept):
        by = "its id" if told == "id" else "one of its photos"
        raise DataError(
            f"{profile.source or data}: entity {profile.entity!r} is to be kept, but {request.named} had the model "
            f"forget it (told by {by}); take it out of the retain set, or give it another id if it is somebody else"
        )


@dataclass(frozen=True)
class Asked:
    """How many entities of a forget set are new, how many were forgotten before with all of these photos, and how many
    are known by their id or a photo alone; `before` are the requests that the latter two were in."""

    new: int
    same: int
    known: int
    before: tuple[Request, ...]

    def line(self) -> str:
        """What is said of a forget set that is partly contained in earlier requests."""
        parts = [f"{self.new:,} of {self.new + self.same + self.known:,} entities are new"]
        parts += [f"{self.same:,} forgotten before"] if self.same else []
        parts += [f"{self.known:,} forgotten before in other photos or under another id"] if self.known else []
        return f"asked again: {', '.join(parts)}; see {', '.join(request.named for request in self.before)}"


def asked_before(requests: Sequence[Request], forget: Sequence[Profile]) -> Asked | None:
    """Who of a forget set was in earlier requests; None where nobody was. Entities without photos do not count.

    Only id and photos together make somebody the same: an id may be another person in other data, a photo may show two
    people, and new photos of a person may still be recognised. Raises AlreadyForgotten where all are the same.
    """
    by_entity: dict[str, list[Profile]] = {}
    for profile in forget:
        if profile.photos:
            by_entity.setdefault(person_key(profile.entity), []).append(profile)
    before: dict[int, Request] = {}
    counts = Counter[str]()
    for profiles in by_entity.values():
        known = {request.number: request for _, request, _ in _known(requests, profiles)}
        mine = [request for request in known.values() if request.holds_entity(profiles[0])]
        photos = [photo for profile in profiles for photo in profile.photos]
        same = all(any(request.holds_photo(photo) for request in mine) for photo in photos)
        counts["same" if same else "known" if known else "new"] += 1
        before |= known
    if not before:
        return None
    found = Asked(counts["new"], counts["same"], counts["known"], tuple(before.values()))
    if found.new or found.known:
        return found
    said = (
        f"{request.named}, {f'certificate {request.certificate}' if request.certificate else 'no certificate'}"
        for request in found.before
    )
    raise AlreadyForgotten(
        f"nothing to do: the whole forget set, {_many(found.same, 'entity', 'entities')} with all photos, was "
        f"forgotten by {'; '.join(said)}; to forget it anew, start from the model before that"
    )


def found_in(requests: Sequence[Request], splits: Mapping[str, Iterable[Profile]]) -> list[dict[str, Any]]:
    """Who of some data is among the forgotten: {"entity", "request", "told_by", "splits"} for each entity and request;
    `told_by` is "id", or "photo" where no row is told by its id."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for split, profiles in splits.items():
        for profile, request, told in _known(requests, profiles):
            one = found.setdefault(
                (person_key(profile.entity), request.number),
                {"entity": profile.entity, "request": request.number, "told_by": told, "splits": []},
            )
            if told == "id":
                one["told_by"] = told
            if split not in one["splits"]:
                one["splits"].append(split)
    return sorted(found.values(), key=lambda one: (one["request"], one["entity"]))


def judged(requests: Sequence[Request], profiles: Sequence[Profile]) -> list[dict[str, Any]]:
    """The requests of a model, and whether an evaluation whose forget set is `profiles` speaks of each: {"request",
    "date", "entities" (how many; None if unknown), "judged"}."""
    return [
        {key: request.described()[key] for key in ("request", "date", "entities")}
        | {"judged": request.is_shown_by(profiles)}
        for request in requests
    ]


def _known(requests: Sequence[Request], profiles: Iterable[Profile]) -> Iterator[tuple[Profile, Request, str]]:
    """Every profile with every request that it is known from, and by what."""
    for profile in profiles if requests else ():
        for request in requests:
            if (told := request.told_by(profile)) is not None:
                yield profile, request, told


def _hashed(salt: str, kind: str, text: str) -> str:
    return hmac.digest(bytes.fromhex(salt), f"{kind} {text}".encode(), "sha256").hex()


def _many(count: int, one: str, more: str) -> str:
    return f"{count:,} {one if count == 1 else more}"
