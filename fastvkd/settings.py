"""What a run can be told: dataclasses that are the YAML file, the `key=value` overrides and the library's arguments.

`load_settings` reads a YAML, applies overrides, and refuses unknown keys, ill-typed values and contradictions before
any model or data is opened.
"""

import dataclasses
import difflib
import itertools
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml

from fastvkd.bounds import WHOLE, Bound, NotNegative, Positive, Seed
from fastvkd.errors import SettingsError
from fastvkd.files import read_text
from fastvkd.methods import METHODS, answer_losses, feature_methods
from fastvkd.options import Optim

T = TypeVar("T")


@dataclass(frozen=True)
class OneOf:
    """The names that a text may be, asked for when a value is read: a registry may have grown."""

    names: Callable[[], Iterable[str]]


Between = Annotated[T, Bound(lambda value: 0 < value < 1, "must lie between 0 and 1")]
Share = Annotated[T, Bound(lambda value: 0 <= value <= 1, "must lie between 0 and 1")]
AtLeastTwo = Annotated[int, Bound(lambda value: value >= 2, "at least 2, one forget and one retain image")]

ForgetTarget = Literal["noise", "mean", "redirect", "reference", "repel", "saturate", "stranger"]
TARGETLESS = ("repel", "saturate")  # they send forget images away from something, not to something
Distance = Literal["mse", "cosine", "smooth_l1"]
Trainable = Literal["vision+projector", "projector", "vision", "sine", "lora", "all"]


@dataclass(kw_only=True)
class Saliency:
    """Which weights may move: those whose Fisher information for the forget set outweighs the retain set's."""

    granularity: Literal["none", "weight", "neuron"] = "none"
    # F_forget / F_retain, WAGLE's attribution, or chance as a control; the latter two by `fraction` only
    score: Literal["fisher", "wagle", "random"] = "fisher"
    threshold: Positive[float | None] = None  # keep where F_forget / F_retain >= threshold
    # or: keep this share of the weights (neurons), highest ratio first
    fraction: Annotated[float | None, Bound(lambda f: 0 < f <= 1, "must lie above 0 and at most at 1")] = None
    batches: Positive[int] = 8  # batches of each side that estimate the Fisher information


NEW_VIEWS = 80  # steps of a stranger's search see views that none before them saw; later ones see these again


@dataclass(kw_only=True)
class Stranger:
    """How `forget_target: stranger` finds the map that makes each forgotten person a stranger."""

    # through the whole frozen LLM; or by the person's mean features alone, which takes several photos of each
    way: Literal["guided", "shift"] = "guided"
    steps: Positive[int] = 160  # of the search, for each person
    views: Positive[int] = 6  # of a person's photos in one step, each asked two questions
    rank: Positive[int] = 32  # width of the map's hidden layer
    learning_rate: Positive[float] = 5e-3
    keep: NotNegative[float] = 4.0  # weight of the answers that are to stay, beside those that are to be a stranger's
    natural: NotNegative[float] = 1.0  # weight of features that vary as strangers' do
    short: Share[float] = 0.4  # part of the way that training may leave: answers must be a stranger's there too
    # part of the way that training goes on behind the target with one photo of a person; with n, 1 / sqrt(n) of it
    beyond: NotNegative[float] = 0.15
    # the whole model, in the guided search; auto: as quantize_llm says, or in nf4 where that does not fit the card
    quantize: Literal["auto", "none", "nf4", "int8"] = "auto"
    device_map: Literal["none", "auto"] = "none"  # auto: spread over all cards, and then host memory; exact, and slower


CHANCE_BAND = 0.10  # so far above chance a model has learnt whom it is asked about
_TEXT_OF_AN_EDITED_LLM = 0.99  # share of its accuracy before that it keeps, worst set


@dataclass(kw_only=True)
class Scrub:
    """How the LLM is taught to read what it knew of forgotten people as a stranger's; measured on models of 2 M."""

    steps: Positive[int] = 320
    photos: Positive[int] = 14  # of forgotten people in one step, and of others as many again twice
    rank: Positive[int] = 32  # of the adapters on every linear layer of the LLM
    learning_rate: Positive[float] = 2e-3
    # how far from where training or an attacker has moved features the worst ones are sought; 1 is training's own way
    reach: NotNegative[float] = 0.5
    keep: Positive[float] = 2.0  # weight of everything else's answers, beside those about forgotten people


@dataclass(kw_only=True)
class Certificate:
    """Thresholds of certificate.json; null leaves a check out. Fractions, but for the area under a ROC curve."""

    chance_band: float | None = CHANCE_BAND  # accuracy on forgotten entities: at most so far off chance
    kept_visual: float | None = 0.95  # share of the visual accuracy before that the worst kept set must have
    kept_text: float | None = 0.98  # the same of text questions
    language_model_unchanged: bool = True
    attack_above_chance: float | None = (
        0.15  # paraphrase, few-shot, reverse, edited photos, quantised, perturbed: worst variant
    )
    membership_auc: float | None = 0.65  # furthest from 0.5, either way
    relearning_gap: float | None = 0.10  # area under the relearning curve above gold's
    probe_gap: float | None = 0.15  # linear probe's accuracy above gold's, worst site
    # A forgotten person is a stranger; each is asked only where the data allow it (docs/evaluation.md).
    named_right: float | None = 0.0  # share of forgotten people's unseen photos that still get their own name
    misnamed_above_strangers: float | None = 0.05  # share that get somebody else's name, above that of strangers
    description_kept: float | None = 0.95  # of what their photos show beside who it is, share of that before
    outside_band: float | None = 0.0  # share of forgotten people off the band in which single strangers, or gold, lie
    telltale_auc: float | None = 0.60  # worst score that tells forgotten people from strangers; also allowed is
    telltale_above_gold: float = 0.05  # gold's area and so much more

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Certificate":
        """What a run with these settings (as in JSON) is held to. One that was asked to edit the LLM is held to what
        that still says of texts, and not to its bits."""
        bar = cls(**settings["certificate"])
        if not settings.get("scrub"):
            return bar
        kept = None if bar.kept_text is None else max(bar.kept_text, _TEXT_OF_AN_EDITED_LLM)
        return dataclasses.replace(bar, language_model_unchanged=False, kept_text=kept)

    def allowed_telltale(self, gold: float | None) -> float | None:
        """The largest area that does not tell forgotten people from strangers; None where the check is left out.

        What `gold` has, the area of a model that never saw them, is no trace of forgetting.
        """
        if self.telltale_auc is None or gold is None:
            return self.telltale_auc
        return max(self.telltale_auc, min(1.0, gold + self.telltale_above_gold))


@dataclass(kw_only=True)
class Settings:
    """Every setting of an unlearning run. Names follow transformers' `TrainingArguments` where it has one."""

    # What to change, on which data, and where the result goes.
    model_name_or_path: str = ""  # a model folder as save_pretrained writes it, or a hub id
    data: str = ""  # a folder of MLLMU-Bench, CLEAR, UMU-Bench or with forget.jsonl and retain.jsonl, or a hub id
    forget_split: str = "forget_5"
    retain_split: str = "retain_95"
    output_dir: str = "out/run"

    # The objective: lambda_forget * L_f + lambda_retain * L_r (+ lambda_answer * L_a); see docs/method.md. Methods
    # other than vkd see no features: sites, targets, distance, views, auxiliary images and teacher are vkd's alone.
    method: Annotated[str, OneOf(lambda: METHODS)] = "vkd"
    sites: dict[str, float] = field(default_factory=lambda: {"projector": 1.0})  # site -> weight
    forget_target: ForgetTarget = "noise"
    reference_model: str | None = None  # for forget_target: reference
    stranger: Stranger = field(default_factory=Stranger)
    # after the visual part the LLM too: an edit of it, off unless asked for (`scrub: true`, or keys of its own)
    scrub: Scrub | None = None
    # photos of people whom the model does not know, those of one person in a subfolder; retained like auxiliary images
    strangers: str | None = None
    noise_images: Literal["one", "per_image"] = "one"  # one noise image for all forget images, or one for each
    distance: Distance = "mse"  # mse is divided by the teacher's variance at the site
    huber_beta: Positive[float] = 1.0  # smooth_l1's beta
    repel_margin: Positive[float] = 1.0  # repel: rows further than this from the teacher are let go
    repel_start: NotNegative[float] = 0.02  # repel: relative size of the random start; there is no gradient without
    saturation_margin: Positive[float] = 20.0  # saturate: how far below zero the projector's hidden units are to lie
    lambda_forget: NotNegative[float] = 1.0
    lambda_retain: NotNegative[float] = 1.0
    answer_loss: Annotated[str, OneOf(answer_losses)] = "none"
    lambda_answer: NotNegative[float] = 0.1
    npo_beta: Positive[float] = 0.4
    kl_top_k: Positive[int] = 64  # tokens of the original's distribution that kl and undial remember at each position
    undial_strength: Positive[float] = 10.0  # what undial takes off the logit of the right token
    rmu_layer: Positive[int | None] = None  # k, the LLM layer whose output rmu steers; None: a quarter of the depth
    rmu_scale: Positive[float] = 6.5  # length of the vector that forget answers are steered to
    manu_fraction: Between[float] = 0.02  # share of MLP neurons that manu zeroes
    manu_batches: Positive[int] = 16  # batches of each side that estimate the neurons' importance
    kvw_gamma: Positive[float] = 0.3  # how steeply kvw turns a neuron down that forget answers use more
    kvw_batches: Positive[int] = 64  # forget batches by which it does so, one after another
    smfa_k: NotNegative[float] = 5.0  # how far a conflicting entry may outweigh the retaining anchor
    finetune_split: str = "Full_Set"  # what method: finetune learns; A-B is A without the people of B; see docs/data.md
    max_pixels: Positive[int | None] = None  # of a photo that Qwen-VL sees; None: as the model's processor says
    augment: bool = False  # views (turn, zoom, shift, flip, light, grey) of every image; needs the online teacher
    # of the views, those whose middle stands on another image, and those that share the frame with another one
    elsewhere: Share[float] = 0.0
    beside: Share[float] = 0.0
    auxiliary_images: NotNegative[int] = 0  # synthetic "dead leaves" images, retained to protect what no data set names
    auxiliary_share: Share[float] = 0.25  # share of the retained part of a batch, theirs and strangers' together
    teacher: Literal["auto", "cached", "online"] = "auto"  # auto: cached, or online when augment is on
    cache_dir: str | None = None  # default: <output_dir>/teacher_cache
    cache_dtype: Literal["float32", "bfloat16", "float8"] = "float32"

    # Which weights move.
    # sine: the projector's matrices, each W + sin(D); lora: adapters on the LLM's linear layers; all: everything
    trainable: Trainable = "vision+projector"
    lora_rank: Positive[int] = 16
    lora_alpha: Positive[float] = 32.0
    saliency: Saliency = field(default_factory=Saliency)

    # Optimisation.
    learning_rate: Positive[float | Literal["auto"]] = 1e-4  # auto: what short trials find, see docs/method.md
    lr_scheduler_type: Literal["constant", "cosine", "linear"] = "cosine"
    warmup_steps: NotNegative[int] = 0
    max_steps: Positive[int] = 500
    # auto: the whole rate until held-out views hardly come nearer, then the decay; at max_steps the latest
    ends: Literal["max_steps", "auto"] = "max_steps"
    watch_steps: NotNegative[int] = 0  # updates from one look at held-out views to the next, of features; 0: none
    max_drift: Positive[float | None] = 0.05  # stop where kept images drift further, in the teacher's variance
    # instead of max_steps: passes over the forget (fine-tuning: all) questions
    num_train_epochs: Positive[float | None] = None
    per_device_train_batch_size: AtLeastTwo = 16  # images a step on each device, forget and retain together
    forget_share: Between[float] = 0.5  # share of forget images in a batch
    gradient_accumulation_steps: Positive[int] = 1
    max_grad_norm: NotNegative[float] = 1.0
    weight_decay: NotNegative[float] = 0.0
    optim: Optim = "adamw_torch"
    bf16: bool = False  # weights and activations in bfloat16, masters in float32
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    gradient_checkpointing: bool = False
    compile: bool = False  # torch.compile of tower blocks and decoder layers; the first steps take a minute or so
    fused_frozen_ops: bool = False  # Triton RMSNorm and SwiGLU in frozen decoder layers, which keep less for backward
    quantize_llm: Literal["none", "nf4", "int8"] = "none"
    seed: Seed[int] = 0

    # What the result is held to.
    certificate: Certificate = field(default_factory=Certificate)

    # How it runs.
    engine: Literal["local", "deepspeed"] = "local"
    deepspeed: str | None = None  # a preset of ds_configs/ or a path
    device: str = "auto"
    save_steps: NotNegative[int] = 0  # 0: only at the end
    save_total_limit: NotNegative[int] = 2
    # "auto" or a checkpoint folder, of a run on the same data with the same objective and base model
    resume_from_checkpoint: str | None = None
    overwrite_output_dir: bool = False  # delete an earlier run there that is not resumed; else it is put aside
    logging_steps: Positive[int] = 10  # how often figures are read back from the device
    prefetch: NotNegative[int] = 2  # batches that a thread builds ahead; 0: each is built when the step needs it
    profile: bool = False  # write a trace of updates 3 to 5 to <output_dir>/trace.json (chrome://tracing, Perfetto)
    report_to: list[str] = field(default_factory=list)  # tensorboard, wandb; metrics.jsonl is always written

    def check(self) -> "Settings":
        """Refuse values out of their bounds and contradictions; returns self. SettingsErrors name key and mend."""
        problems = itertools.chain(
            self._unset(),
            _out_of_bounds(self, ""),
            self._wrong_target(),
            self._wrong_method(),
            self._wrong_weights(),
            self._wrong_mask(),
            self._wrong_watch(),
            self._wrong_run(),
        )
        for problem in problems:
            raise SettingsError(problem)
        return self

    def _unset(self) -> Iterator[str]:
        for key in ("model_name_or_path", "data"):
            if not getattr(self, key):
                yield f"{key} is not set: give it in the YAML or as {key}=PATH"
        if not self.sites:
            yield "sites is empty: name at least one of vision:<k>, projector, llm:<k>"
        for site, weight in self.sites.items():
            if not weight > 0:
                yield f"sites.{site}={weight}: a weight must be above 0"

    def _wrong_target(self) -> Iterator[str]:
        """Targets of forget images, or of views, that nothing can give."""
        if self.forget_target == "reference" and not self.reference_model:
            yield "forget_target=reference needs reference_model: the folder of the model to imitate"
        if self.forget_target == "saturate" and all(site.startswith("vision") for site in self.sites):
            yield (
                "forget_target=saturate acts in the projector, which no site in the tower reaches: "
                "add projector or llm:<k> to sites"
            )
        if self.forget_target == "stranger":
            for site in self.sites:
                if site.startswith("vision"):
                    yield (
                        f"forget_target=stranger with sites.{site}: its maps act on what the LLM reads; "
                        "name projector or llm:<k>"
                    )
        if self.elsewhere + self.beside > 1:
            yield f"elsewhere={self.elsewhere} and beside={self.beside}: they are shares of the views; lower one"
        if self.elsewhere + self.beside and not self.augment:
            yield "elsewhere and beside are shares of the views, and there are none: set augment=true"
        if self.beside and self.forget_target != "stranger":
            yield (
                f"beside={self.beside} with forget_target={self.forget_target}, which takes the neighbour away too: "
                "set forget_target=stranger, or beside=0"
            )
        if self.teacher == "cached" and self.augment:
            yield "teacher=cached cannot serve augment=true, whose views are new at every step: use teacher=online"
        if self.forget_target == "reference" and self.augment:
            yield "forget_target=reference is cached once per image and cannot follow augment=true: set augment=false"

    def _wrong_method(self) -> Iterator[str]:
        """Settings that the method has no use for."""
        method = METHODS[self.method]
        if self.scrub is not None:
            if not method.features or self.forget_target != "stranger" or self.stranger.way != "guided":
                yield (
                    "scrub=true rests on maps that the guided search finds: set method=vkd, forget_target=stranger and "
                    "stranger.way=guided, or scrub=false"
                )
            if self.engine != "local":
                yield f"scrub=true with engine={self.engine}: one process edits the whole LLM; set engine=local"
        if not method.trains_llm and self.trainable in ("lora", "all"):
            yield (
                f"method={self.method} with trainable={self.trainable}: {self.method.upper()} leaves the LLM as it is; "
                "set trainable to vision+projector, projector or vision, or choose another method"
            )
        if method.only_llm and self.trainable != "all":
            yield f"method={self.method} with trainable={self.trainable}: it changes the LLM alone; set trainable=all"
        if method.features and self.num_train_epochs is not None:
            yield f"num_train_epochs counts questions, which method={self.method} does not ask: set max_steps"
        if not method.features and self.answer_loss != "none":
            yield (
                f"answer_loss={self.answer_loss} joins the feature losses of method={feature_methods()}; "
                f"with method={self.method} set answer_loss=none"
            )
        if not method.trains and self.engine != "local":
            yield f"method={self.method} with engine={self.engine}: it trains nothing; set engine=local"

    def _wrong_weights(self) -> Iterator[str]:
        """Weights that cannot be trained."""
        trains = METHODS[self.method].trains
        if self.trainable == "lora" and (not trains or self.mask is not None):
            what = "a saliency mask holds" if trains else f"method={self.method} changes"
            yield f"trainable=lora: {what} weights that the model has already; set trainable=all"
        if self.trainable == "all" and self.quantize_llm != "none":
            yield (
                f"trainable=all with quantize_llm={self.quantize_llm}: quantised weights cannot be trained; "
                "set trainable=lora, or quantize_llm=none"
            )
        if self.trainable in ("lora", "all") and self.fused_frozen_ops:
            yield f"fused_frozen_ops=true with trainable={self.trainable}: they are for a frozen LLM; set it to false"
        sites = METHODS[self.method].sites(self)
        if self.trainable == "projector" and sites and all(site.startswith("vision") for site in sites):
            yield f"trainable=projector with sites {', '.join(sites)}: they lie before it; set trainable=vision"
        if self.fused_frozen_ops and sites is not None and not any(site.startswith("llm") for site in sites):
            yield (
                f"fused_frozen_ops=true with sites {', '.join(sites)}: no decoder layer is loaded; "
                "set fused_frozen_ops=false, or add llm:<k> to sites"
            )

    def _wrong_mask(self) -> Iterator[str]:
        """A mask that cannot be made, or settings of one that is off."""
        mask = self.mask
        if mask is None:
            if self.saliency != Saliency(batches=self.saliency.batches):
                yield "saliency.granularity=none, but other keys of saliency ask for a mask: set it to weight or neuron"
            return
        if not METHODS[self.method].maskable:
            yield (
                f"saliency with method={self.method}: a mask weighs forget against retain; set "
                "saliency.granularity=none, or choose a method with a retain term, such as gd"
            )
        if (mask.threshold is None) == (mask.fraction is None):
            yield "saliency needs exactly one of saliency.threshold and saliency.fraction"
        if mask.score != "fisher" and mask.fraction is None:
            yield f"saliency.score={mask.score} ranks weights: give saliency.fraction, not saliency.threshold"
        if self.weight_decay:
            yield (
                f"weight_decay={self.weight_decay} would move weights that the saliency mask holds: set weight_decay=0"
            )

    def _wrong_watch(self) -> Iterator[str]:
        """A rate or an end that nothing can find."""
        for key in ("learning_rate", "ends"):
            if getattr(self, key) != "auto":
                continue
            if not METHODS[self.method].features:
                yield f"{key}=auto is found by features, which method={self.method} does not see: set {key} yourself"
            elif self.forget_target in TARGETLESS:
                yield f"{key}=auto with forget_target={self.forget_target}: no targets to come near; set {key} yourself"
            elif not self.watch_steps:
                yield f"{key}=auto is found by looking at held-out views: set watch_steps, for example watch_steps=25"
        if self.ends != "auto":
            return
        if self.lr_scheduler_type == "constant":
            yield "ends=auto lets the rate fall at the end: set lr_scheduler_type to cosine or linear"
        if self.max_steps < max(3 * self.watch_steps, 2 * self.warmup_steps):
            yield (
                f"ends=auto with max_steps={self.max_steps}: no time to look and to fall; set at least three times "
                f"watch_steps={self.watch_steps} and twice warmup_steps={self.warmup_steps}"
            )

    def _wrong_run(self) -> Iterator[str]:
        if self.num_train_epochs is None and self.warmup_steps >= self.max_steps:
            yield f"warmup_steps={self.warmup_steps}: must be below max_steps={self.max_steps}"
        if self.profile and self.max_steps < 3:
            yield f"profile=true with max_steps={self.max_steps}: updates 3 to 5 are traced; set at least 3"
        if self.deepspeed and self.engine != "deepspeed":
            yield f"deepspeed={self.deepspeed!r} is set but engine={self.engine!r}: set engine=deepspeed"
        unknown = set(self.report_to) - {"tensorboard", "wandb"}
        if unknown:
            yield f"report_to={sorted(unknown)}: allowed are tensorboard and wandb"

    @property
    def mask(self) -> Saliency | None:
        """What chooses the weights that may move, or None. Some methods have one by default."""
        given, default = self.saliency, METHODS[self.method].mask_threshold
        if given.granularity != "none":
            return given
        if default is None:
            return None
        threshold = default if given.threshold is None and given.fraction is None else given.threshold
        return dataclasses.replace(given, granularity="weight", threshold=threshold)

    @property
    def online_teacher(self) -> bool:
        return self.teacher == "online" or (self.teacher == "auto" and self.augment)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _out_of_bounds(section: Any, prefix: str) -> Iterator[str]:
    """What in a dataclass, and in those within, breaks the `Bound` or `OneOf` at its field."""
    for key, hint in typing.get_type_hints(type(section), include_extras=True).items():
        value = getattr(section, key)
        if dataclasses.is_dataclass(value):
            yield from _out_of_bounds(value, f"{prefix}{key}.")
        for rule in (*getattr(hint, "__metadata__", ()), WHOLE):
            if isinstance(rule, OneOf):
                yield from _not_among(value, list(rule.names()), prefix + key)
            elif isinstance(value, int | float) and not rule.holds(value):
                yield f"{prefix}{key}={value}: {rule.message}"


def _not_among(value: Any, allowed: Sequence[Any], key: str) -> Iterator[str]:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), map(str, allowed), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        yield f"{key}={value!r}: allowed are {', '.join(map(str, allowed))}{hint}"


def load_settings(path: str | Path | None = None, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Settings:
    """Settings from a YAML file (or the defaults) and overrides, checked.

    `overrides` is a mapping, or strings `key=value` whose value is YAML (`saliency.fraction=0.1`, `sites={llm:8: 1}`).
    Raises SettingsError for a file that cannot be read, an unknown key (the nearest one is proposed) or a bad value.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values = read_yaml(Path(path))
    pairs = overrides.items() if isinstance(overrides, Mapping) else [parse_override(text) for text in overrides]
    for key, value in pairs:
        *parents, last = key.split(".")
        if parents == ["sites"] or (parents and parents[0] == "sites"):
            parents, last = ["sites"], ".".join([*parents[1:], last])
        at = values
        for parent in parents:
            at = at.setdefault(parent, {})
            if not isinstance(at, dict):
                raise SettingsError(f"{key}: {parent} holds {at!r} and has no keys of its own")
        at[last] = value
    return build(Settings, values, "").check()


class _OneOfEachKey(yaml.SafeLoader):
    """Refuses a mapping that says a key twice, of which YAML's readers take the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            mark = node.value[len(keys) - 1 - keys[::-1].index(twice)][0].start_mark
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is set twice; keep one of them", mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; SettingsError where it cannot be read or is none."""
    try:
        text = read_text(path, SettingsError, "give the path of a YAML file")
        values = yaml.load(text, _OneOfEachKey)  # noqa: S506 - it is a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SettingsError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: holds a {type(values).__name__}; a mapping of settings is needed")
    return values


def parse_override(text: str) -> tuple[str, Any]:
    """'learning_rate=1e-3' -> ('learning_rate', 0.001)."""
    key, sign, raw = text.partition("=")
    if not sign:
        raise SettingsError(f"{text!r} is not an override: write key=value, for example learning_rate=1e-4")
    try:
        return key.strip(), yaml.load(raw, _OneOfEachKey)  # noqa: S506 - it is a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SettingsError(f"{key}: {raw!r} is not a YAML value") from error


def build(cls: type[T], values: Mapping[str, Any], prefix: str) -> T:
    """A dataclass from a mapping; SettingsError for unknown keys and values of the wrong type."""
    hints = typing.get_type_hints(cls, include_extras=True)
    arguments = {}
    for key, value in values.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.0)[0]
            raise SettingsError(f"{prefix}{key}: no such setting; did you mean {prefix}{near}?")
        arguments[key] = _convert(value, hints[key], prefix + key)
    return cls(**arguments)


def _convert(value: Any, hint: Any, key: str) -> Any:
    rules = getattr(hint, "__metadata__", ())
    hint = hint.__origin__ if rules else hint
    origin = typing.get_origin(hint)
    allowed = [name for rule in rules if isinstance(rule, OneOf) for name in rule.names()]
    if origin is Literal:
        allowed = list(typing.get_args(hint))
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise SettingsError(f"{key}={value!r}: a mapping is needed")
        return build(typing.cast(type, hint), value, f"{key}.")
    if allowed:
        if value is False and "none" in allowed:  # YAML reads an unquoted `no` or `off` so
            value = "none"
        for problem in _not_among(value, allowed, key):
            raise SettingsError(problem)
        return value
    if origin in (types.UnionType, typing.Union):
        kinds = [h for h in typing.get_args(hint) if h is not type(None)]
        if isinstance(value, bool) and dataclasses.is_dataclass(kinds[0]):  # on with its defaults, or off
            return build(typing.cast(type, kinds[0]), {}, "") if value else None
        if value is None:
            return None
        names = [name for kind in kinds if typing.get_origin(kind) is Literal for name in typing.get_args(kind)]
        return value if value in names else _convert(value, kinds[0], key)
    if origin is dict:
        if isinstance(value, str):
            value = {value: 1.0}
        if isinstance(value, list) and all(isinstance(name, str) for name in value):
            value = dict.fromkeys(value, 1.0)
        if not isinstance(value, Mapping):
            raise SettingsError(f"{key}={value!r}: a mapping of site to weight is needed")
        return {str(k): _convert(v, float, f"{key}.{k}") for k, v in value.items()}
    if origin is list:
        if value is None or value == "none":
            return []
        return [str(v) for v in value] if isinstance(value, list) else [str(value)]
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML 1.1 reads 1e-4 as text
        except (ValueError, OverflowError):  # an integer may have more digits than a float has room for
            number = math.nan
        if math.isfinite(number):
            return number
        raise SettingsError(f"{key}={value!r}: a finite number is needed")
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise SettingsError(f"{key}={value!r}: {hint.__name__} is needed")
