"""What a run can be told: dataclasses that are the YAML file, the `key=value` overrides and the library's arguments.

`load_settings` reads a YAML, applies overrides, and refuses unknown keys, ill-typed values and contradictions before
any model or data is opened.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from fastvkd.errors import SettingsError

ForgetTarget = Literal["noise", "mean", "redirect", "reference", "repel", "saturate"]
Distance = Literal["mse", "cosine", "smooth_l1"]
Method = Literal["vkd", "ga", "gd", "kl", "npo", "idk", "rmu", "mmunlearner", "manu", "finetune"]
AnswerLoss = Literal["none", "ga", "gd", "kl", "npo", "idk"]
Optim = Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "lion_8bit", "ademamix_8bit"]
Trainable = Literal["vision+projector", "projector", "vision", "lora", "all"]


@dataclass(kw_only=True)
class Saliency:
    """Which weights may move: those whose Fisher information for the forget set outweighs the retain set's."""

    granularity: Literal["none", "weight", "neuron"] = "none"
    # F_forget / F_retain, WAGLE's attribution, or chance as a control; the latter two by `fraction` only
    score: Literal["fisher", "wagle", "random"] = "fisher"
    threshold: float | None = None  # keep where F_forget / F_retain >= threshold
    fraction: float | None = None  # or: keep this share of the weights (neurons), highest ratio first
    batches: int = 8  # batches of each side that estimate the Fisher information


@dataclass(kw_only=True)
class Certificate:
    """Thresholds of certificate.json; null leaves a check out. Fractions, but for the area under a ROC curve."""

    chance_band: float | None = 0.10  # accuracy on forgotten entities: at most so far off chance
    kept_visual: float | None = 0.95  # share of the visual accuracy before that the worst kept set must have
    kept_text: float | None = 0.98  # the same of text questions
    language_model_unchanged: bool = True
    attack_above_chance: float | None = 0.15  # paraphrase, few-shot, reverse, edited photos, quantised: worst variant
    membership_auc: float | None = 0.65  # furthest from 0.5, either way
    relearning_gap: float | None = 0.10  # area under the relearning curve above gold's
    probe_gap: float | None = 0.15  # linear probe's accuracy above gold's, worst site


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
    method: Method = "vkd"
    sites: dict[str, float] = field(default_factory=lambda: {"projector": 1.0})  # site -> weight
    forget_target: ForgetTarget = "noise"
    reference_model: str | None = None  # for forget_target: reference
    noise_images: Literal["one", "per_image"] = "one"  # one noise image for all forget images, or one for each
    distance: Distance = "mse"  # mse is divided by the teacher's variance at the site
    huber_beta: float = 1.0  # smooth_l1's beta
    repel_margin: float = 1.0  # repel: rows further than this from the teacher are let go
    repel_start: float = 0.02  # repel: relative size of the random start, since its gradient at the teacher is zero
    saturation_margin: float = 20.0  # saturate: how far below zero the projector's hidden units are to lie
    lambda_forget: float = 1.0
    lambda_retain: float = 1.0
    answer_loss: AnswerLoss = "none"
    lambda_answer: float = 0.1
    npo_beta: float = 0.4
    kl_top_k: int = 64  # tokens of the original's distribution that are remembered at each retained answer position
    rmu_layer: int | None = None  # k, the LLM layer whose output rmu steers; None: a quarter of the depth
    rmu_scale: float = 6.5  # length of the vector that forget answers are steered to
    manu_fraction: float = 0.02  # share of MLP neurons that manu zeroes
    manu_batches: int = 16  # batches of each side that estimate the neurons' importance
    finetune_split: str = "Full_Set"  # what method: finetune learns; A-B is A without the people of B; see docs/data.md
    augment: bool = False  # views (turn, zoom, shift, flip, light, grey) of every image; needs the online teacher
    auxiliary_images: int = 0  # synthetic "dead leaves" images that are retained too, to protect what no data set names
    auxiliary_share: float = 0.25  # their share of the retained part of a batch
    teacher: Literal["auto", "cached", "online"] = "auto"  # auto: cached, or online when augment is on
    cache_dir: str | None = None  # default: <output_dir>/teacher_cache
    cache_dtype: Literal["float32", "bfloat16", "float8"] = "float32"

    # Which weights move.
    trainable: Trainable = "vision+projector"  # lora: adapters on the LLM's linear layers; all: everything
    lora_rank: int = 16
    lora_alpha: float = 32.0
    saliency: Saliency = field(default_factory=Saliency)

    # Optimisation.
    learning_rate: float = 1e-4
    lr_scheduler_type: Literal["constant", "cosine", "linear"] = "cosine"
    warmup_steps: int = 0
    max_steps: int = 500
    num_train_epochs: float | None = None  # instead of max_steps: passes over the forget (fine-tuning: all) questions
    per_device_train_batch_size: int = 16  # images a step on each device, forget and retain together
    forget_share: float = 0.5  # share of forget images in a batch
    gradient_accumulation_steps: int = 1
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    optim: Optim = "adamw_torch"
    bf16: bool = False  # weights and activations in bfloat16, masters in float32
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    gradient_checkpointing: bool = False
    compile: bool = False  # torch.compile of tower blocks and decoder layers; the first steps take a minute or so
    fused_frozen_ops: bool = False  # Triton RMSNorm and SwiGLU in frozen decoder layers, which keep less for backward
    quantize_llm: Literal["none", "nf4", "int8"] = "none"
    seed: int = 0

    # What the result is held to.
    certificate: Certificate = field(default_factory=Certificate)

    # How it runs.
    engine: Literal["local", "deepspeed"] = "local"
    deepspeed: str | None = None  # a preset of ds_configs/ or a path
    device: str = "auto"
    save_steps: int = 0  # 0: only at the end
    save_total_limit: int = 2
    resume_from_checkpoint: str | None = None  # "auto" or a checkpoint folder
    logging_steps: int = 10  # how often figures are read back from the device
    prefetch: int = 2  # batches that a thread builds ahead; 0: each is built when the step needs it
    profile: bool = False  # write a trace of updates 3 to 5 to <output_dir>/trace.json (chrome://tracing, Perfetto)
    report_to: list[str] = field(default_factory=list)  # tensorboard, wandb; metrics.jsonl is always written

    def check(self) -> "Settings":
        """Refuse contradictions; returns self. Raises SettingsError naming the key and the mend."""
        for key in ("model_name_or_path", "data"):
            if not getattr(self, key):
                raise SettingsError(f"{key} is not set: give it in the YAML or as {key}=PATH")
        if not self.sites:
            raise SettingsError("sites is empty: name at least one of vision:<k>, projector, llm:<k>")
        for site, weight in self.sites.items():
            if not weight > 0:
                raise SettingsError(f"sites.{site}={weight}: a weight must be above 0")
        _within(self, "forget_share", 0, 1, open_ends=True)
        _within(self, "auxiliary_share", 0, 1, open_ends=False)
        _within(self, "manu_fraction", 0, 1, open_ends=True)
        for key in (
            "learning_rate",
            "huber_beta",
            "repel_margin",
            "saturation_margin",
            "max_steps",
            "num_train_epochs",
            "gradient_accumulation_steps",
            "npo_beta",
            "kl_top_k",
            "rmu_layer",
            "rmu_scale",
            "manu_batches",
            "lora_rank",
            "lora_alpha",
            "logging_steps",
        ):
            if getattr(self, key) is not None and not getattr(self, key) > 0:
                raise SettingsError(f"{key}={getattr(self, key)}: must be above 0")
        for key in (
            "lambda_forget",
            "lambda_retain",
            "lambda_answer",
            "weight_decay",
            "warmup_steps",
            "save_steps",
            "prefetch",
            "auxiliary_images",
            "seed",
            "save_total_limit",
            "repel_start",
            "max_grad_norm",
        ):
            if getattr(self, key) < 0:
                raise SettingsError(f"{key}={getattr(self, key)}: must not be negative")
        if self.per_device_train_batch_size < 2:
            raise SettingsError(
                f"per_device_train_batch_size={self.per_device_train_batch_size}: at least 2, "
                "one forget and one retain image"
            )
        if self.forget_target == "reference" and not self.reference_model:
            raise SettingsError("forget_target=reference needs reference_model: the folder of the model to imitate")
        if self.forget_target == "saturate" and all(site.startswith("vision") for site in self.sites):
            raise SettingsError(
                "forget_target=saturate acts in the projector, which no site in the tower reaches: "
                "add projector or llm:<k> to sites"
            )
        if self.teacher == "cached" and self.augment:
            raise SettingsError(
                "teacher=cached cannot serve augment=true, whose views are new at every step: use teacher=online"
            )
        if self.forget_target == "reference" and self.augment:
            raise SettingsError(
                "forget_target=reference is cached once per image and cannot follow augment=true: set augment=false"
            )
        self._check_trainable()
        if self.answer_loss != "none" and self.method != "vkd":
            raise SettingsError(
                f"answer_loss={self.answer_loss} joins the feature losses of method=vkd; "
                f"with method={self.method} set answer_loss=none"
            )
        self._check_saliency()
        if self.profile and self.max_steps < 3:
            raise SettingsError(
                f"profile=true with max_steps={self.max_steps}: updates 3 to 5 are traced; set at least 3"
            )
        if self.deepspeed and self.engine != "deepspeed":
            raise SettingsError(f"deepspeed={self.deepspeed!r} is set but engine={self.engine!r}: set engine=deepspeed")
        unknown = set(self.report_to) - {"tensorboard", "wandb"}
        if unknown:
            raise SettingsError(f"report_to={sorted(unknown)}: allowed are tensorboard and wandb")
        return self

    def _check_saliency(self) -> None:
        """Refuse a mask that cannot be made, or settings of one that is off."""
        given, mask = self.saliency, self.mask
        if mask is None:
            if given != Saliency(batches=given.batches):
                raise SettingsError(
                    "saliency.granularity=none, but other keys of saliency ask for a mask: set it to weight or neuron"
                )
            return
        if mask.fraction is not None and not 0 < mask.fraction <= 1:
            raise SettingsError(f"saliency.fraction={mask.fraction}: must lie above 0 and at most at 1")
        if mask.threshold is not None and not mask.threshold > 0:
            raise SettingsError(f"saliency.threshold={mask.threshold}: must be above 0")
        if mask.batches < 1:
            raise SettingsError(f"saliency.batches={mask.batches}: must be above 0")
        if self.method in ("ga", "manu", "finetune"):
            raise SettingsError(
                f"saliency with method={self.method}: a mask weighs forget against retain; set "
                "saliency.granularity=none, or choose a method with a retain term, such as gd"
            )
        if (mask.threshold is None) == (mask.fraction is None):
            raise SettingsError("saliency needs exactly one of saliency.threshold and saliency.fraction")
        if mask.score != "fisher" and mask.fraction is None:
            raise SettingsError(
                f"saliency.score={mask.score} ranks weights: give saliency.fraction, not saliency.threshold"
            )
        if self.weight_decay:
            raise SettingsError(
                f"weight_decay={self.weight_decay} would move weights that the saliency mask holds: set weight_decay=0"
            )

    def _check_trainable(self) -> None:
        """Refuse what cannot be trained together."""
        changes_llm = self.trainable in ("lora", "all")
        if self.method == "vkd" and changes_llm:
            raise SettingsError(
                f"method=vkd with trainable={self.trainable}: VKD leaves the LLM as it is; set trainable to "
                "vision+projector, projector or vision, or choose another method"
            )
        if self.method == "vkd" and self.num_train_epochs is not None:
            raise SettingsError("num_train_epochs counts questions, which method=vkd does not ask: set max_steps")
        if self.trainable == "lora" and (self.method == "manu" or self.mask is not None):
            what = "method=manu zeroes" if self.method == "manu" else "a saliency mask holds"
            raise SettingsError(f"trainable=lora: {what} weights that the model has already; set trainable=all")
        if self.trainable == "all" and self.quantize_llm != "none":
            raise SettingsError(
                f"trainable=all with quantize_llm={self.quantize_llm}: quantised weights cannot be trained; "
                "set trainable=lora, or quantize_llm=none"
            )
        if changes_llm and self.fused_frozen_ops:
            raise SettingsError(
                f"fused_frozen_ops=true with trainable={self.trainable}: they are for a frozen LLM; set it to false"
            )
        if self.method == "manu" and self.engine != "local":
            raise SettingsError(f"method=manu with engine={self.engine}: it trains nothing; set engine=local")

    @property
    def mask(self) -> Saliency | None:
        """What chooses the weights that may move, or None. MMUnlearner's default is F_forget / F_retain >= 1."""
        if self.saliency.granularity != "none":
            return self.saliency
        if self.method != "mmunlearner":
            return None
        default = 1.0 if self.saliency.threshold is None and self.saliency.fraction is None else self.saliency.threshold
        return dataclasses.replace(self.saliency, granularity="weight", threshold=default)

    @property
    def online_teacher(self) -> bool:
        return self.teacher == "online" or (self.teacher == "auto" and self.augment)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _within(settings: Settings, key: str, low: float, high: float, *, open_ends: bool) -> None:
    value = getattr(settings, key)
    if not (low < value < high if open_ends else low <= value <= high):
        raise SettingsError(f"{key}={value}: must lie between {low} and {high}")


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


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; SettingsError where it cannot be read or is none."""
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
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
        return key.strip(), yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise SettingsError(f"{key}: {raw!r} is not a YAML value") from error


T = typing.TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], prefix: str) -> T:
    """A dataclass from a mapping; SettingsError for unknown keys and values of the wrong type."""
    hints = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.0)[0]
            raise SettingsError(f"{prefix}{key}: no such setting; did you mean {prefix}{near}?")
        arguments[key] = _convert(value, hints[key], prefix + key)
    return cls(**arguments)


def _convert(value: Any, hint: Any, key: str) -> Any:
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise SettingsError(f"{key}={value!r}: a mapping is needed")
        return build(typing.cast(type, hint), value, f"{key}.")
    if origin is Literal:
        allowed = typing.get_args(hint)
        if value is False and "none" in allowed:  # YAML reads an unquoted `no` or `off` so
            value = "none"
        if value not in allowed:
            raise SettingsError(f"{key}={value!r}: allowed are {', '.join(map(str, allowed))}")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _convert(value, next(h for h in typing.get_args(hint) if h is not type(None)), key)
    if origin is dict:
        if isinstance(value, str):
            value = {value: 1.0}
        if isinstance(value, Sequence):
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
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
        raise SettingsError(f"{key}={value!r}: a finite number is needed")
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise SettingsError(f"{key}={value!r}: {hint.__name__} is needed")
