"""Do the figures tell who knows from who does not? Models of known exposure, and how well each figure tells them apart.

Of every seed there are three models that were shown the people to be forgotten (the vanilla one, the same half-trained,
and gold taught their photos afterwards) and three that were not (gold, the same half-trained, and gold taught as many
photos of retained people). A figure's AUC is the probability that it is higher in a model of the first kind than in one
of the second, over all seeds; ties count half. After Open-MMUnlearning (arXiv 2610.10358), which asks the same of KS,
JS, probability and the like on larger models. A figure that does not separate these is no evidence of forgetting.
"""

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from world import World

from fastvkd.attacks.membership import auc
from fastvkd.attacks.relearning import Attacker
from fastvkd.attacks.suite import Attack
from fastvkd.data.sources import reference_strangers
from fastvkd.demo.data import vocabulary
from fastvkd.demo.pretraining import train_vanilla
from fastvkd.demo.sight import teach_sight
from fastvkd.evaluation.divergence import answer_distance, option_divergence, scored_choices
from fastvkd.records import Profile
from fastvkd.unlearning.answers import answer_log_probabilities
from study import Row, Study

EXPOSED = ("vanilla", "vanilla, half-trained", "gold, taught the forgotten")
NOT_EXPOSED = ("gold", "gold, half-trained", "gold, taught others")
TAUGHT, RATE = 20, 1e-3  # updates of all weights, and their rate, of a gold model that is taught more
KINDS = ("paraphrase", "reverse", "relearn", "membership", "probe")
HEADLINE = 0.9  # a figure that separates less surely is none
REFERENCE = 1000  # added to the seed of the gold model that distances are measured from


def measure(world: World, variant: str) -> Row:
    """The figures of every model of one seed."""
    models = pool(world)
    vanilla = world.out / "pool-vanilla"
    models["vanilla"].save_pretrained(vanilla)
    world.processor.save_pretrained(vanilla)
    world.__dict__["vanilla"] = vanilla  # which says who is alike
    asked: list[dict[str, Any]] = []
    world.examine(models["reference"], world.spec.max_samples, asked)
    return {"models": {name: figures_of(world, models[name], asked) for name in (*EXPOSED, *NOT_EXPOSED)}}


def pool(world: World) -> dict[str, Any]:
    """Models by name, all with the same sight; `reference` is another gold model, in the order of its training."""
    processor = world.blueprint.processor(vocabulary(world.data), world.spec.shape)
    world.__dict__["processor"] = processor
    start = world.blueprint.model(processor, world.spec.shape, world.seed)
    teach_sight(world.blueprint.visual_input(start, processor), world.data, world.spec.sight, world.seed, _silent)
    vanilla, half_vanilla = trained(world, start, world.seed, gold=False)
    gold, half_gold = trained(world, start, world.seed, gold=True)
    return {
        "vanilla": vanilla,
        "vanilla, half-trained": half_vanilla,
        "gold, taught the forgotten": taught(world, gold, world.cells["forget"]),
        "gold": gold,
        "gold, half-trained": half_gold,
        "gold, taught others": taught(world, gold, world.cells["retain"]),
        "reference": trained(world, start, world.seed + REFERENCE, gold=True)[0],
    }


def _silent(step: int, steps: int, loss: float) -> None:
    pass


def trained(world: World, start: Any, seed: int, *, gold: bool) -> tuple[Any, Any]:
    """A copy of `start` that learnt the people, and as it was halfway."""
    model = copy.deepcopy(start)
    half: list[Any] = []

    def keep(step: int, steps: int, loss: float) -> None:
        if step == (steps + 1) // 2:
            half.append(copy.deepcopy(model))

    visual = world.blueprint.visual_input(model, world.processor)
    train_vanilla(visual, world.data, world.spec.schedule, seed, keep, gold=gold)
    return model.eval(), half[0].eval()


def taught(world: World, model: Any, profiles: list[Profile]) -> Any:
    """A copy that `TAUGHT` updates of all weights have taught these people's photos, as a relearning attacker does."""
    model = copy.deepcopy(model).train()
    attacker = Attacker(world.processor, profiles, seed=world.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    for step in range(1, TAUGHT + 1):
        log_p, tokens = answer_log_probabilities(model, attacker.batch(step))
        (-log_p.sum() / tokens.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def figures_of(world: World, model: Any, reference: list[dict[str, Any]]) -> dict[str, float]:
    """Every figure by name, all of them higher where more is known or farther from a model that knows nobody."""
    samples: list[dict[str, Any]] = []
    cells, people = world.examine(model, world.spec.max_samples, samples)
    found: dict[str, float | None] = {}
    for cell in ("forget", "test"):
        figures = cells[cell]["vqa"]
        found |= {f"{cell}: {name}": figures[name] for name in ("accuracy", "answer_prob", "rouge_l", "bleu")}
    mine, theirs = scored_choices(samples), scored_choices(reference)
    divergence, distance = option_divergence(mine, theirs, world.seed), answer_distance(mine, theirs)
    for cell in ("forget", "test"):
        found[f"{cell}: JS of choices"] = divergence[cell]["js_vqa"]
        found[f"{cell}: KS of answers"] = distance[cell]["answer_ks_vqa"]
        found[f"{cell}: JS of answers"] = distance[cell]["answer_js_vqa"]
    found["named right"] = people["who"]["forget"]["right"]
    found["told from strangers"] = people.get("telltale_auc")  # few data allow it
    found |= attacked(world, model)
    return {name: float(value) for name, value in found.items() if value is not None}


def attacked(world: World, model: Any) -> dict[str, float | None]:
    """What the attacks find, each by its own figure."""
    attack = Attack(
        {"unlearned": lambda: model},
        world.processor,
        world.cells,
        world.prepared,
        dataclasses.replace(world.spec.attacks, relearning_seeds=(0,), relearning_variants=()),
        world.seed,
        reference=reference_strangers(str(world.folder)),
    )
    result = attack.run(KINDS)
    found: dict[str, float | None] = {}
    for row in result["questions"]:
        name = f"attack: {row['kind']}"
        accuracy = row["figures"]["unlearned"]["accuracy"]
        found[name] = max(found.get(name) or 0.0, accuracy)
    for row in result["relearning"]:
        name = f"relearning: {row['weights']}"
        found[name] = max(found.get(name) or 0.0, row["auc"]["unlearned"])
    for name, scores in result["membership"]["unlearned"].items():
        for score, area in scores.items():
            found[f"membership, {name}: {score}"] = area["auc"]
            found[f"membership, {name}: {score}, TPR at 1 % FPR"] = area["tpr_at_1_fpr"]
    sites = result["probe"]["models"]["unlearned"]
    found["linear probe, worst site"] = max(site["forget"]["accuracy"] for site in sites.values())
    return found


def separation(rows: list[Row]) -> Iterator[Row]:
    """A line for every figure, the surest first."""
    models = [model for row in rows for model in row["models"].items()]
    names = dict.fromkeys(name for _, figures in models for name in figures)
    lines = []
    for name in names:
        sides = [[f[name] for kind, f in models if kind in side and name in f] for side in (EXPOSED, NOT_EXPOSED)]
        if all(sides):
            lines.append(
                {
                    "figure": name,
                    **auc(*sides, seed=0),
                    "means": {kind: _mean(rows, kind, name) for kind in (*EXPOSED, *NOT_EXPOSED)},
                }
            )
    return iter(sorted(lines, key=lambda line: -line["auc"]))


def _mean(rows: list[Row], kind: str, name: str) -> float | None:
    values = [row["models"][kind][name] for row in rows if name in row["models"].get(kind, {})]
    return sum(values) / len(values) if values else None


def _text(mean: float | None) -> str:
    return "" if mean is None else f"{mean:.2f}"


def caption(report: dict[str, Any]) -> list[str]:
    rows = report["rows"]
    sizes = ", ".join(dict.fromkeys(row["size"] for row in rows))
    return [
        f"Demo of size {sizes}, {len(rows)} seed(s), {3 * len(rows)} models that were shown the forgotten people and "
        f"{3 * len(rows)} that were not: few and small. Intervals take models as independent, though those of a seed "
        f"share data and sight; an AUC rests on {(3 * len(rows)) ** 2} pairs, so 1.00 [1.00, 1.00] says that all of "
        "these were in order, not that others would be. The exposed models know much; that a figure tells these from "
        "gold does not say that it "
        f"tells a model with faint traces. A figure below {HEADLINE:.2f} is no headline.",
    ]


STUDY = Study(
    about="Which figures tell exposed models from others",
    note=caption,
    variants={"pool": (EXPOSED, NOT_EXPOSED)},
    row=measure,
    lines=separation,
    columns={
        "figure": lambda line: line["figure"],
        "AUC [95 %]": lambda line: f"{line['auc']:.2f} [{line['ci95'][0]:.2f}, {line['ci95'][1]:.2f}]",
        "headline": lambda line: "yes" if line["auc"] >= HEADLINE else "no",
        **{
            kind: (lambda line, kind=kind: _text(line["means"].get(kind)))  # type: ignore[misc]
            for kind in (*EXPOSED, *NOT_EXPOSED)
        },
    },
    left=1,
    protocol=lambda: {"taught": TAUGHT, "rate": RATE, "kinds": KINDS, "reference": REFERENCE},
    threads=1,
    size="tiny",
    uses_recipe=lambda variant: False,
)
