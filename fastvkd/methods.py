"""The ways to unlearn that `method:` names, and what each asks of settings, data and model.

Others ask the object; nobody compares names. A new method is a file in `unlearning/methods/` and an entry here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from fastvkd.settings import Settings

Side = Literal["forget", "retain"]
SIDES: tuple[Side, Side] = ("forget", "retain")


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to unlearn; `code` says where it is, as 'module:attribute', and is imported when a run is prepared.

    The attribute is a loss, `Answers` -> scalar terms by side (see `unlearning/methods/`); with `features` a class with
    the interface of `vkd.task.Distillation`; without `trains` a function that changes weights, like
    `manu.NeuronPruning`. With `keys` it is a class that makes such a one from the values of these settings.
    """

    name: str
    code: str
    keys: tuple[str, ...] = ()
    title: str = ""  # in sentences, if not by its name
    sides: tuple[Side, ...] = SIDES  # whose questions or images it sees
    features: bool = False  # it sees features at sites instead of answers
    remembers: Side | None = None  # the side of whose answers it notes what the frozen original makes of them
    refusals: str | None = None  # where the texts are that replace forget answers
    anchors: str | None = None  # what makes its retained questions, of the forget photos and no retain set
    asks_texts: bool = False  # it asks questions without an image too
    split_key: str | None = None  # the setting that names its one split; else there is one for each side
    layer_key: str | None = None  # the setting that names the LLM layer it reads; None there: a quarter of the depth
    joins_features: bool = False  # it may be an `answer_loss`
    trains: bool = True  # by the loop; else the code changes the weights by itself, before
    trains_llm: bool = True  # the LLM may be trained too
    only_llm: bool = False  # it changes nothing but the LLM
    mask_threshold: float | None = None  # of a saliency mask that is on where no setting asks for one
    retains_exactly: bool = False  # its retain term and that term's gradient are zero at the original

    @property
    def maskable(self) -> bool:
        """Whether a saliency mask makes sense: it weighs the gradients of two sides."""
        return self.trains and len(self.sides) == len(SIDES)

    def make(self, settings: "Settings") -> Any:
        """What `code` names, made from the settings in `keys` where it has some."""
        found = resolve_name(self.code)
        return found(*(getattr(settings, key) for key in self.keys)) if self.keys else found

    def on_answers(self, settings: "Settings") -> "Method | None":
        """The method whose loss is on answers: itself, the `answer_loss` beside features, or none."""
        if not self.features:
            return self
        return None if settings.answer_loss == "none" else METHODS[settings.answer_loss]

    def sites(self, settings: "Settings") -> list[str] | None:
        """The sites where its loss ends; None where answers are read, behind all layers."""
        return list(settings.sites) if self.features and settings.answer_loss == "none" else None

    def llm_sites(self, settings: "Settings", depth: int) -> list[str] | None:
        """The sites up to which an LLM of `depth` layers is needed; None for all of it, with its head."""
        if self.layer_key:
            return [f"llm:{getattr(settings, self.layer_key) or max(1, depth // 4)}"]
        return self.sites(settings)


_HERE = "fastvkd.unlearning.methods"
_ALL = (
    Method(
        name="vkd",
        code="fastvkd.unlearning.vkd.task:Distillation",
        title="Visual Knowledge Distillation",
        features=True,
        trains_llm=False,
        retains_exactly=True,
    ),
    Method(name="ga", code=f"{_HERE}.ga:gradient_ascent", sides=("forget",), joins_features=True),
    Method(name="gd", code=f"{_HERE}.gd:gradient_difference", joins_features=True),
    Method(name="kl", code=f"{_HERE}.kl:KlMinimisation", keys=("kl_top_k",), remembers="retain", joins_features=True),
    Method(
        name="npo", code=f"{_HERE}.npo:NegativePreference", keys=("npo_beta",), remembers="forget", joins_features=True
    ),
    Method(
        name="undial",
        code=f"{_HERE}.undial:AdjustedSelfDistillation",
        keys=("undial_strength", "kl_top_k"),
        remembers="forget",
        joins_features=True,
    ),
    Method(
        name="pava",
        code=f"{_HERE}.npo:NegativePreference",
        keys=("npo_beta",),
        remembers="forget",
        anchors=f"{_HERE}.pava:own_answers",
    ),
    Method(name="idk", code=f"{_HERE}.idk:refusal", refusals=f"{_HERE}.idk:REFUSALS", joins_features=True),
    Method(
        name="rmu",
        code=f"{_HERE}.rmu:RepresentationMisdirection",
        keys=("rmu_scale", "seed"),
        layer_key="rmu_layer",
        remembers="retain",
        retains_exactly=True,
    ),
    # gradient difference on the weights with F_forget / F_retain >= 1
    Method(name="mmunlearner", code=f"{_HERE}.gd:gradient_difference", mask_threshold=1.0),
    Method(name="manu", code=f"{_HERE}.manu:NeuronPruning", keys=("manu_fraction", "manu_batches"), trains=False),
    Method(
        name="kvw",
        code=f"{_HERE}.kvw:KnowledgeVectorWeakening",
        keys=("kvw_gamma", "kvw_batches"),
        trains=False,
        only_llm=True,
    ),
    Method(
        name="smfa",
        code=f"{_HERE}.smfa:SculptedForgetting",
        keys=(
            *("smfa_k", "optim", "learning_rate", "weight_decay", "max_steps", "warmup_steps", "lr_scheduler_type"),
            *("gradient_accumulation_steps", "max_grad_norm"),
        ),
        refusals=f"{_HERE}.idk:REFUSALS",
        trains=False,
    ),
    Method(
        name="finetune",
        code=f"{_HERE}.finetune:finetune",
        sides=("retain",),
        asks_texts=True,
        split_key="finetune_split",
    ),
)
METHODS: dict[str, Method] = {method.name: method for method in _ALL}


def method_of(settings: Mapping[str, Any]) -> Method:
    """The method that a file's settings name, bare of properties if it is not among `METHODS`."""
    name = settings.get("method", "vkd")
    return METHODS.get(name, Method(name=name, code=""))


def answer_losses() -> list[str]:
    """What `answer_loss` may be."""
    return ["none", *(name for name, method in METHODS.items() if method.joins_features)]


def feature_methods() -> str:
    """The names of the methods that see features, as a message lists them."""
    return " or ".join(name for name, method in METHODS.items() if method.features)
