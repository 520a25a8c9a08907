"""A linear probe for identity on the features of every site, before and after unlearning: is knowledge gone or hidden?

Knowledge is hidden where the probe still finds it although the model no longer says it. A trained probe also finds what
any tower sees (hair, colours). So compare with the gold model, which never learnt these people.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastvkd.models import families
from fastvkd.models.visual_path import VisualPath, collate_images
from fastvkd.photos import decode_image
from fastvkd.records import Photo, Profile

_SAME = 1e-6  # cosine similarities so close are one
RIDGES = tuple(10.0**k for k in range(-3, 4))


def every_site(model: nn.Module) -> list[str]:
    """`vision:1` ..., `projector`, `llm:1` ... up to the last LLM layer, in the order in which they run."""
    config: Any = families.base_model(model).config
    return [
        *(f"vision:{k}" for k in range(1, families.tower_depth(config) + 1)),
        "projector",
        *(f"llm:{k}" for k in range(1, families.llm_depth(config) + 1)),
    ]


@torch.inference_mode()
def photo_features(
    model: nn.Module, processor: Any, photos: Sequence[Photo], sites: Sequence[str], *, batch_size: int = 32
) -> dict[str, Tensor]:
    """By site, (photos, H) float64 on the CPU: the mean over the visual tokens of each photo."""
    path = VisualPath(model, sites)
    parts: dict[str, list[Tensor]] = {site: [] for site in sites}
    config: Any = families.base_model(model).config
    device = next(model.parameters()).device
    for start in range(0, len(photos), batch_size):
        images = [decode_image(photo.data, photo.source) for photo in photos[start : start + batch_size]]
        for site, features in path(collate_images(processor, config, images).to(device)).items():
            tokens_NH, image_N = features.gathered().double().cpu(), features.image_of_row.cpu()
            sums = torch.zeros(len(images), tokens_NH.shape[1], dtype=torch.float64).index_add_(0, image_N, tokens_NH)
            parts[site].append(sums / image_N.bincount(minlength=len(images))[:, None])
    return {site: torch.cat(part) for site, part in parts.items()}


def ridge_probe(train_NH: Tensor, labels_N: Tensor, held_MH: Tensor) -> Tensor:
    """Predicted labels (M,) int64 of held-out features: ridge regression onto one-hot labels in closed form.

    Features are standardised by the training part. The penalty is that of `RIDGES` with the smallest leave-one-out
    error (exact, from the hat matrix).
    """
    mean, scale = train_NH.mean(0), train_NH.std(0, correction=0).clamp_min(1e-9)
    x, held = (train_NH - mean) / scale, (held_MH - mean) / scale
    targets_NC = torch.nn.functional.one_hot(labels_N).double()
    offset = targets_NC.mean(0)
    y = targets_NC - offset
    values, vectors = torch.linalg.eigh(x @ x.T)  # the dual form: as many unknowns as photos
    rotated = vectors.T @ y
    best_error, best = float("inf"), torch.empty(0)
    for ridge in RIDGES:
        shrunk = 1 / (values.clamp_min(0) + ridge * x.shape[1])
        dual = vectors @ (shrunk[:, None] * rotated)
        # leave-one-out residual of kernel ridge: dual coefficient over the diagonal of the inverse
        residual = dual / (vectors.square() @ shrunk)[:, None]
        error = float(residual.square().mean())
        if error < best_error:
            best_error, best = error, dual
    return (held @ (x.T @ best) + offset).argmax(1)


def effective_rank(features_NH: Tensor) -> float:
    """How many directions the photos really use: exp of the entropy of the normalised singular values of the centred
    features (Roy and Vetterli, 2007)."""
    singular = torch.linalg.svdvals(features_NH - features_NH.mean(0))
    p = singular / singular.sum().clamp_min(1e-300)
    return float(torch.exp(-(p * p.clamp_min(1e-300).log()).sum()))


def prior_rank(train_NH: Tensor, labels_N: Tensor, held_MH: Tensor, truth_M: Tensor) -> float:
    """Mean reciprocal rank of the right entity among all; 1 where it is always the nearest.

    Entities are ranked by the cosine similarity of a held-out photo to the centroid of their other photos. Entities as
    near as the right one share their ranks, so features that tell nobody apart have the rank of chance.

    In the spirit of Rank_e (arXiv 2503.18034), which measures the prior knowledge of a vision encoder by the rank of
    an entity. The paper ranks against text; a tower without a text encoder is ranked against its own photos here.
    """
    centre = train_NH.mean(0)
    centroids = torch.stack([train_NH[labels_N == c].mean(0) for c in range(int(labels_N.max()) + 1)]) - centre
    similarity = torch.nn.functional.cosine_similarity((held_MH - centre)[:, None], centroids[None], dim=-1)
    own = similarity.gather(1, truth_M[:, None])
    nearer = (similarity > own + _SAME).sum(1)
    tied = ((similarity - own).abs() <= _SAME).sum(1)  # the right one is among them
    reciprocal = torch.cat([torch.zeros(1), 1 / torch.arange(1, len(centroids) + 1)]).double().cumsum(0)
    return float(((reciprocal[nearer + tied] - reciprocal[nearer]) / tied).mean())


class ProbeData:
    """Photos of forgotten and of as many retained people: those a probe is fitted to, and those it is judged on.

    Forgotten people are judged on `unseen`, photos that unlearning never saw. Where there are none, and for retained
    people always, every third of their own photos serves. A probe is fitted to `shots` photos of each entity, in
    `draws` seeded draws. With many photos any tower's features separate a few faces; with two only features that know
    them do. At most `entities` people and `per_entity` photos of each are used.
    """

    def __init__(
        self,
        forget: Sequence[Profile],
        unseen: Sequence[Profile],
        retain: Sequence[Profile],
        *,
        seed: int,
        entities: int = 32,
        per_entity: int = 24,
        shots: int = 2,
        draws: int = 8,
    ):
        self.shots, self.draws, self.seed = shots, draws, seed
        rng = np.random.default_rng([seed, 37])
        own, extra, other = (_photos(profiles) for profiles in (forget, unseen, retain))
        chosen = self._draw([e for e in own if len(own[e]) >= 2 or e in extra], entities, rng)
        able = [e for e in other if len(other[e]) >= 3]
        self.groups: dict[str, tuple[list[Photo], list[int], list[Photo], list[int]]] = {}
        for name, source, names in (
            ("forget", own, chosen),
            ("retain", other, self._draw(able, max(2, len(chosen)), rng)),
        ):
            train: list[Photo] = []
            held: list[Photo] = []
            train_labels: list[int] = []
            held_labels: list[int] = []
            for label, entity in enumerate(names):
                photos = source[entity]
                judged = extra.get(entity, []) if name == "forget" else []
                fitted = photos if judged else [p for i, p in enumerate(photos) if i % 3 != 1]
                judged = judged or photos[1::3]
                train += fitted[:per_entity]
                held += judged[:per_entity]
                train_labels += [label] * len(fitted[:per_entity])
                held_labels += [label] * len(judged[:per_entity])
            if len(names) >= 2:
                self.groups[name] = (train, train_labels, held, held_labels)

    def fitted(self, labels: Sequence[int]) -> list[list[int]]:
        """The positions of the fitted photos, for each draw."""
        rng = np.random.default_rng([self.seed, 38])
        found = []
        for _ in range(self.draws):
            order = rng.permutation(len(labels)).tolist()
            found.append(
                [i for label in sorted(set(labels)) for i in [j for j in order if labels[j] == label][: self.shots]]
            )
        return found

    @staticmethod
    def _draw(entities: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
        names = sorted(entities)
        return sorted(rng.choice(names, min(count, len(names)), replace=False).tolist()) if names else []


def _photos(profiles: Sequence[Profile]) -> dict[str, list[Photo]]:
    found: dict[str, list[Photo]] = {}
    for profile in profiles:
        found.setdefault(profile.entity, []).extend(profile.photos)
    return found


def probe(model: nn.Module, processor: Any, data: ProbeData, sites: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Per site: {group: {"accuracy", "n", "chance", "effective_rank", "prior_rank"}} for the groups of `data`.

    Accuracy and `prior_rank` are on held-out photos, means over the draws. The effective rank is that of all photos'
    features.
    """
    found: dict[str, dict[str, Any]] = {site: {} for site in sites}
    for group, (train, train_labels, held, held_labels) in data.groups.items():
        features = photo_features(model, processor, [*train, *held], sites)
        labels_N, truth_M = torch.tensor(train_labels), torch.tensor(held_labels)
        draws = data.fitted(train_labels)
        for site, all_PH in features.items():
            train_NH, held_MH = all_PH[: len(train)], all_PH[len(train) :]
            right, ranks = [], []
            for rows in draws:
                right.append(float((ridge_probe(train_NH[rows], labels_N[rows], held_MH) == truth_M).double().mean()))
                ranks.append(prior_rank(train_NH[rows], labels_N[rows], held_MH, truth_M))
            found[site][group] = {
                "accuracy": float(np.mean(right)),
                "n": len(held),
                "chance": 1 / (int(labels_N.max()) + 1),
                "effective_rank": effective_rank(all_PH),
                "prior_rank": float(np.mean(ranks)),
            }
    return found


def probe_gap(by_model: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> float | None:
    """Probe accuracy on forgotten people, unlearned minus gold, at the worst site. None without a gold model."""
    if "gold" not in by_model or "unlearned" not in by_model:
        return None
    gold, unlearned = by_model["gold"], by_model["unlearned"]
    gaps = [
        unlearned[site]["forget"]["accuracy"] - gold[site]["forget"]["accuracy"]
        for site in unlearned
        if site in gold and "forget" in unlearned[site] and "forget" in gold[site]
    ]
    return max(gaps) if gaps else None
