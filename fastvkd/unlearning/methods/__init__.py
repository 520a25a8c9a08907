"""Output-level unlearning methods, one a file: what the answers of a model shall become.

A method maps `Answers` (what the model makes of a batch at its answer positions) to loss terms `forget` and `retain`.
What one needs of the frozen original it remembers beforehand, question by question (`remembers`, `remember`), so that
no second model is held.
"""

from typing import Any

from fastvkd.settings import Settings
from fastvkd.unlearning.methods.finetune import finetune
from fastvkd.unlearning.methods.ga import gradient_ascent
from fastvkd.unlearning.methods.gd import gradient_difference
from fastvkd.unlearning.methods.idk import refusal
from fastvkd.unlearning.methods.kl import KlMinimisation
from fastvkd.unlearning.methods.npo import NegativePreference
from fastvkd.unlearning.methods.rmu import RepresentationMisdirection

REMEMBERING = ("npo", "kl", "rmu")  # methods that note what the original answers before training


def answer_method(name: str, settings: Settings) -> Any:
    """The method called `name` in the settings; MMUnlearner is gradient difference under a saliency mask."""
    if name == "npo":
        return NegativePreference(settings.npo_beta)
    if name == "kl":
        return KlMinimisation(settings.kl_top_k)
    if name == "rmu":
        return RepresentationMisdirection(settings.rmu_scale, settings.seed)
    return {
        "ga": gradient_ascent,
        "gd": gradient_difference,
        "idk": refusal,
        "mmunlearner": gradient_difference,
        "finetune": finetune,
    }[name]
