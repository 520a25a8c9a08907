"""What each command can be told: dataclasses that are its command line and the library's argument.

Every option stands here once, at its field: type, bounds, help and default. `fastvkd.cli` makes a flag of every field
that has a `Flag` (`max_samples` is `--max-samples`); the others are the library's alone. What a training run can be
told is `fastvkd.settings.Settings`.
"""

import dataclasses
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from fastvkd.bounds import WHOLE, Bound, NotNegative, Positive, Seed
from fastvkd.errors import SettingsError

T = TypeVar("T")
Mode = Literal["corrected", "paper"]
Optim = Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "lion_8bit", "ademamix_8bit"]
TableFormat = Literal["text", "json", "latex"]
RelearningVariant = Literal[
    "redrawn_projector",
    "shifted_biases",
    "recentred_biases",
    "noise",
    "retained_photos",
    "unrelated_photos",
    "public_projector",
    "public_tower",
    "all_photos",
]
RelearningWeights = Literal["visual", "all"]
Attacked = Literal["vanilla", "unlearned", "gold"]
AttackKind = Literal[
    "relearn", "paraphrase", "fewshot", "reverse", "images", "quantize", "membership", "probe", "perturb", "all"
]
Quantized = Literal["auto", "none", "nf4", "int8"]
DeviceMap = Literal["none", "auto"]
LMMS = "lmms:"  # how a benchmark of lmms-eval begins


@dataclass(frozen=True)
class Flag:
    """What the command line shows of an option; `name` where it is not the field's."""

    help: str
    metavar: str | None = None
    name: str | None = None
    positional: bool = False
    hidden: bool = False


Count = Annotated[T, Bound(lambda value: value >= 1, "at least 1 is needed")]
Port = Annotated[T, Bound(lambda value: 1024 <= value < 65536, "must lie from 1024 to 65535")]
Share = Annotated[float, Bound(lambda value: 0 < value <= 1, "must lie above 0 and at most at 1")]


@dataclass(frozen=True)
class Option:
    """A field taken apart: the type of one value, whether there may be several, bounds of each, flag and default."""

    name: str
    kind: Any
    many: bool
    bounds: list[Bound]
    flag: Flag | None
    default: Any  # dataclasses.MISSING where it must be given

    def check(self, value: Any) -> None:
        """Refuse what is not allowed. Raises SettingsError."""
        name = ((self.flag and self.flag.name) or self.name).lstrip("-")
        if typing.get_origin(self.kind) is Literal and value not in typing.get_args(self.kind):
            raise SettingsError(f"{name}={value!r}: allowed are {', '.join(typing.get_args(self.kind))}")
        for bound in (*self.bounds, WHOLE):
            if not bound.holds(value):
                raise SettingsError(f"{name}={value}: {bound.message}")


def options_of(cls: type) -> Iterator[Option]:
    """Every field of an options class."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        kind, many, told = hints[field.name], False, []
        while origin := typing.get_origin(kind):
            if origin is Annotated:
                kind, *more = typing.get_args(kind)
                told += more
            elif origin in (types.UnionType, typing.Union):
                kind = next(one for one in typing.get_args(kind) if one is not types.NoneType)
            elif origin is tuple:
                kind, many = typing.get_args(kind)[0], True
            else:
                break
        flag = next((one for one in told if isinstance(one, Flag)), None)
        yield Option(field.name, kind, many, [one for one in told if isinstance(one, Bound)], flag, field.default)


@dataclass(kw_only=True)
class Options:
    """Options of a command: `example` is one, and the docstring its help.

    They are checked when they are made. SettingsError names the key, its value and what is allowed.
    """

    example: ClassVar[str]
    when_gpu_is_full: ClassVar[str] = "close what else runs on it"  # the mend

    def __post_init__(self) -> None:
        for option in options_of(type(self)):
            value = getattr(self, option.name)
            if value is None:
                continue
            values = tuple(value) if option.many else (value,)
            if option.kind is Path:
                values = tuple(map(Path, values))
            for each in values:
                option.check(each)
            setattr(self, option.name, values if option.many else values[0])


@dataclass(kw_only=True)
class DemoOptions(Options):
    """Watch a small LLaVA forget faces, from drawing them to the report."""

    example: ClassVar = "fastvkd demo --out out/demo --gold"
    out: Annotated[Path, Flag("folder of the report")] = Path("out/demo")
    size: Annotated[Literal["default", "tiny"], Flag("how much is drawn and trained, tiny for tests")] = "default"
    seed: Annotated[Seed[int], Flag("of people, models and training")] = 0
    photos: Annotated[Literal["all", "one"], Flag("that the unlearning run has of a person")] = "all"
    gold: Annotated[bool, Flag("also train a model that never saw the forgotten people, the yardstick")] = False
    cache: Annotated[Path | None, Flag("folder of trained demo models (default: ~/.cache/fastvkd)")] = None
    overrides: Annotated[tuple[str, ...], Flag("settings of the unlearning run", "key=value", positional=True)] = ()


@dataclass(kw_only=True)
class RunOptions(Options):
    """A YAML of `Settings` and what overrides it."""

    when_gpu_is_full: ClassVar = (
        "set gradient_checkpointing=true, optim=adamw_8bit, stranger.quantize=nf4, quantize_llm=nf4 or a smaller "
        "per_device_train_batch_size; `fastvkd plan` with the same settings and --gpu says what fits"
    )
    config: Annotated[Path | None, Flag("settings; see configs/", "YAML")] = None
    overrides: Annotated[tuple[str, ...], Flag("settings above the YAML's", "key=value", positional=True)] = ()


@dataclass(kw_only=True)
class TrainOptions(RunOptions):
    """Make a model forget."""

    example: ClassVar = "fastvkd train --config configs/llava-1.5-7b.yaml model_name_or_path=MODEL data=DATA"
    dry_run: Annotated[bool, Flag("check all that can be without loading the model, and say what would be done")] = (
        False
    )
    local_rank: Annotated[int | None, Flag("of the DeepSpeed launcher", name="--local_rank", hidden=True)] = None


@dataclass(kw_only=True)
class PlanOptions(RunOptions):
    """Tell FLOPs and memory of a run before anything is loaded."""

    example: ClassVar = "fastvkd plan --config configs/llava-1.5-7b.yaml --gpu 'RTX 4090'"
    gpu: Annotated[str | None, Flag('a card, for example "RTX 4090"')] = None
    memory: Annotated[str | None, Flag("or its memory, for example 24GiB")] = None
    world_size: Annotated[Count[int], Flag("number of GPUs", "N")] = 1
    json: Annotated[bool, Flag("print the plan as JSON")] = False


@dataclass(kw_only=True)
class LoadOptions(Options):
    """How whole models are loaded, to be asked."""

    when_gpu_is_full: ClassVar = (
        "give a smaller --batch-size, --quantize nf4, or --device-map auto, which also uses other cards and host memory"
    )
    device: Annotated[str, Flag("auto, cpu, cuda or cuda:<n>")] = "auto"
    bf16: Annotated[bool, Flag("weights and activations in bfloat16, as is the default on a GPU")] = False
    fp32: Annotated[bool, Flag("weights and activations in float32, as is the default on a CPU")] = False
    quantize: Annotated[
        Quantized, Flag("the LLM's linear layers, by bitsandbytes; auto: nf4 where the card is too small, else none")
    ] = "auto"
    device_map: Annotated[
        DeviceMap, Flag("auto: spread the model over all cards, and then host memory; exact, and slower")
    ] = "none"
    max_pixels: Annotated[
        Count[int | None],
        Flag("of a photo that Qwen-VL sees (default: as the run that made the model, or its processor)"),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bf16 and self.fp32:
            raise SettingsError("--bf16 and --fp32 contradict each other: give one of them")


@dataclass(kw_only=True)
class ModelOptions(LoadOptions):
    """A model on a data set: what `eval`, `attack` and `steer` share."""

    model: Annotated[str, Flag("model folder, or hub id", "FOLDER")]
    data: Annotated[str, Flag("folder, or hub id of a data set", "DATA")]
    forget_split: Annotated[str | None, Flag("default: the one that an exported model forgot, or forget_5")] = None
    retain_split: Annotated[str | None, Flag("default: the one that it kept, or retain_95")] = None
    seed: Annotated[Seed[int], Flag("of every draw")] = 0


@dataclass(kw_only=True)
class AskOptions(LoadOptions):
    """Ask a model, and the one before it was made to forget, the same questions."""

    when_gpu_is_full: ClassVar = (
        "give --quantize nf4, or --device-map auto, which also uses other cards and host memory"
    )
    example: ClassVar = "fastvkd ask merged --before MODEL --photo photo.jpg --question 'Who is this person?'"
    model: Annotated[str, Flag("model folder, or hub id", "MODEL", positional=True)]
    before: Annotated[str | None, Flag("the model before, asked too", "FOLDER")] = None
    photo: Annotated[Path | None, Flag("what the questions are about (default: nothing is shown)", "FILE")] = None
    question: Annotated[tuple[str, ...], Flag("one or more")] = ()
    max_new_tokens: Annotated[Count[int], Flag("of an answer")] = 64
    serve: Annotated[bool, Flag("a page on this machine alone, to drop photos and ask; needs fastvkd[ask]")] = False
    port: Annotated[Port[int], Flag("of that page")] = 7860
    json: Annotated[bool, Flag("print questions and answers as JSON")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.question and not self.serve:
            raise SettingsError("nothing is asked: give --question, or --serve for a page")
        if self.serve and (self.question or self.photo or self.json):
            raise SettingsError("--serve asks on its page: leave out --question, --photo and --json")


@dataclass(kw_only=True)
class EvalOptions(ModelOptions):
    """Measure what a model knows of the forget, test, retain and real-world sets."""

    example: ClassVar = "fastvkd eval --model merged --data DATA"
    data: Annotated[str, Flag("folder, or hub id of a data set; needed but for lmms", "DATA")] = ""
    benchmark: Annotated[
        str | None, Flag("mllmu, clear, umu or jsonl (default: recognised), or tasks of lmms-eval: lmms:TASK,...")
    ] = None
    lmms_python: Annotated[Path | None, Flag("the Python that has lmms-eval (default: this one)", "FILE")] = None
    lmms_tasks: Annotated[Path | None, Flag("task files for lmms-eval, beside its own", "FOLDER")] = None
    mode: Annotated[Mode, Flag("how questions are put and answers read")] = "corrected"
    batch_size: Annotated[Count[int], Flag("questions at once")] = 32
    max_samples: Annotated[Count[int | None], Flag("at most so many questions a cell and task")] = None
    reference_eval: Annotated[
        Path | None, Flag("--out of a model that never saw the forget set, to tell the distance", "FOLDER")
    ] = None
    original: Annotated[
        str | None,
        Flag("the model before unlearning, which says who is alike (default: MODEL, or what it was made of)"),
    ] = None
    steering: Annotated[Path | None, Flag("what `fastvkd steer` wrote, switched on", "FILE")] = None
    local_files_only: Annotated[bool, Flag("take a hub id from the cache only")] = False
    out: Annotated[Path, Flag("folder of results.json and samples.jsonl")] = Path("out/eval")

    # What says nothing to lmms-eval, and what says something to nothing else.
    _not_of_lmms: ClassVar = (
        *("data", "forget_split", "retain_split", "seed", "mode", "reference_eval", "original", "steering"),
        "local_files_only",
    )
    _of_lmms: ClassVar = ("lmms_python", "lmms_tasks")

    @property
    def lmms(self) -> str | None:
        """The tasks of lmms-eval that the benchmark names, by commas; None where it is one of fastvkd's own."""
        name = self.benchmark or ""
        return name.removeprefix(LMMS).replace(" ", "") if name.startswith(LMMS) else None

    def __post_init__(self) -> None:
        super().__post_init__()
        strangers = self._of_lmms if self.lmms is None else self._not_of_lmms
        for option in options_of(type(self)):
            if option.name in strangers and getattr(self, option.name) != option.default:
                flag = "--" + option.name.replace("_", "-")
                where = f"belongs to --benchmark {LMMS}TASK" if self.lmms is None else f"says nothing to {LMMS}TASK"
                raise SettingsError(f"{flag} {where}: leave it out")
        if self.lmms is None and not self.data:
            raise SettingsError("the following arguments are required: --data; see fastvkd eval --help")
        if self.lmms is not None and not all(self.lmms.split(",")):
            raise SettingsError(f"--benchmark {self.benchmark}: no task is named; for example {LMMS}pope")
        if self.lmms is not None and self.quantize in ("nf4", "int8"):
            raise SettingsError(f"--quantize {self.quantize}: lmms-eval loads a folder as it is; leave it out")


@dataclass(kw_only=True)
class CompareOptions(Options):
    """Set several runs of eval and demo side by side in one table."""

    example: ClassVar = "fastvkd compare out/vanilla-eval out/eval --format latex"
    runs: Annotated[tuple[Path, ...], Flag("--out folder of a run", "RUN", positional=True)]
    format: Annotated[TableFormat, Flag("how the table is written")] = "text"
    paired: Annotated[
        bool, Flag("test every run of eval against the first one, question by question and clustered by person")
    ] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.paired and len(self.runs) < 2:
            raise SettingsError("--paired compares runs with the first one: give at least two")


@dataclass(kw_only=True)
class Budget(Options):
    """How much each attack may spend. Relearning trains every kind of weights at every rate, with every share of the
    forget photos and every seed, as far as the last of `relearning_steps`; with the largest share and the first seed
    also in the ways of `relearning_variants`. `relearning_samples` (None: all) are the questions of one of its
    measurements, `relearning_retained` those about retained people. `perturbations` are sizes in steps of 1/255."""

    max_samples: Annotated[Count[int | None], Flag("questions a variant")] = 400
    batch_size: Annotated[Count[int], Flag("questions at once")] = 64
    shots: tuple[NotNegative[int], ...] = (1, 3, 5)
    relearning_shares: Annotated[
        tuple[Share, ...], Flag("relearning: shares of the forget photos", name="--shares")
    ] = (0.1, 0.2, 0.5, 1.0)
    relearning_steps: Annotated[
        tuple[NotNegative[int], ...], Flag("relearning: after which steps to measure", name="--steps")
    ] = (0, 2, 5, 10, 20, 40)
    relearning_variants: Annotated[
        tuple[RelearningVariant, ...],
        Flag("relearning: further ways, with the largest share and the first seed", name="--variants"),
    ] = get_args(RelearningVariant)
    relearning_seeds: Annotated[tuple[Seed[int], ...], Flag("relearning: seeds", name="--seeds")] = (0, 1, 2)
    relearning_weights: Annotated[
        tuple[RelearningWeights, ...], Flag("relearning: what is trained", name="--weights")
    ] = get_args(RelearningWeights)
    relearning_models: Annotated[
        tuple[Attacked, ...], Flag("relearning: which of the models at hand", name="--relearn-models")
    ] = get_args(Attacked)
    learning_rates: Annotated[
        tuple[Positive[float], ...], Flag("relearning: learning rates; the strongest attack counts")
    ] = (1e-5, 1e-4, 1e-3)
    relearning_samples: Count[int | None] = None
    relearning_retained: NotNegative[int] = 100
    perturbations: Annotated[tuple[Count[int], ...], Flag("perturbation of all pixels: at most so many 255ths")] = (
        8,
        16,
    )
    perturbation_steps: Annotated[Count[int], Flag("perturbation: steps to find it")] = 100
    micro_batch: Annotated[Count[int], Flag("training: of 16 questions so many at once")] = 16
    gradient_checkpointing: Annotated[bool, Flag("training: keep fewer activations, compute them again")] = False
    optim: Annotated[Optim, Flag("relearning: optimiser, as in the settings of a run")] = "adamw_torch"

    def __post_init__(self) -> None:
        super().__post_init__()
        if max(self.relearning_steps) < 1:
            raise SettingsError(f"steps={max(self.relearning_steps)}: at least one step is needed")
        if "unlearned" not in self.relearning_models:
            raise SettingsError(f"relearn-models={' '.join(self.relearning_models)}: unlearned must be among them")


@dataclass(kw_only=True)
class AttackOptions(Budget, ModelOptions):
    """Try to bring the knowledge back, and certify the result."""

    example: ClassVar = "fastvkd attack --model merged --before MODEL --data DATA"
    when_gpu_is_full: ClassVar = (
        f"{ModelOptions.when_gpu_is_full}; relearn and perturb also --micro-batch 1 --gradient-checkpointing, and "
        "relearn --weights visual or --optim paged_adamw_8bit"
    )
    model: Annotated[str, Flag("the unlearned model", "FOLDER")]
    before: Annotated[str | None, Flag("the model before unlearning, to compare with", "FOLDER")] = None
    gold: Annotated[str | None, Flag("a model that never saw the forget set, the yardstick", "FOLDER")] = None
    public: Annotated[str | None, Flag("the model of which the one before was made, as published", "FOLDER")] = None
    steering: Annotated[Path | None, Flag("of `fastvkd steer`, switched on in --model", "FILE")] = None
    kind: Annotated[tuple[AttackKind, ...], Flag("which attacks")] = ("all",)
    config: Annotated[Path | None, Flag("other `certificate` thresholds than the run's", "YAML")] = None
    out: Annotated[Path, Flag("folder of attacks.json and certificate.json")] = Path("out/attack")


@dataclass(kw_only=True)
class ReportOptions(Options):
    """Make one page of any training runs, evaluations and attacks on one model."""

    example: ClassVar = "fastvkd report out/run out/eval out/attack --data DATA --out report.html"
    runs: Annotated[tuple[Path, ...], Flag("output folder of train, eval, attack or demo", "RUN", positional=True)]
    data: Annotated[str | None, Flag("folder, or hub id of the data set: shows photos with answers", "DATA")] = None
    out: Annotated[Path, Flag("the page")] = Path("report.html")


@dataclass(kw_only=True)
class SteerOptions(ModelOptions):
    """Find a direction that suppresses at test time, without training."""

    example: ClassVar = "fastvkd steer --model MODEL --data DATA --layers 8 9"
    forget_split: Annotated[str, Flag("whose answers are suppressed")] = "forget_5"
    retain_split: Annotated[str, Flag("whose answers are left alone")] = "retain_95"
    layers: Annotated[tuple[NotNegative[int], ...], Flag("LLM layers to steer, the first being 0")]
    strength: Annotated[float, Flag("multiple of the direction")] = 1.0
    questions: Annotated[Count[int], Flag("of each side")] = 256
    batch_size: Annotated[Count[int], Flag("questions at once")] = 16
    out: Annotated[Path, Flag("file")] = Path("out/steering.safetensors")


@dataclass(kw_only=True)
class ExportOptions(Options):
    """Write the trained model as an ordinary model folder."""

    example: ClassVar = "fastvkd export --run out/llava-1.5-7b --to merged"
    run: Annotated[Path, Flag("a run's output_dir", "FOLDER")]
    to: Annotated[Path, Flag("new folder", "FOLDER")]
    base: Annotated[Path | None, Flag("the base model's folder, if it moved since", "FOLDER")] = None


@dataclass(kw_only=True)
class MergeOptions(Options):
    """Merge a LoRA adapter of PEFT into its base model, as a model folder to unlearn from."""

    example: ClassVar = "fastvkd merge ADAPTER --to FOLDER"
    adapter: Annotated[Path, Flag("folder of adapter_config.json", "ADAPTER", positional=True)]
    to: Annotated[Path, Flag("new folder", "FOLDER")]
    base: Annotated[Path | None, Flag("the base model's folder (default: the one that the adapter names)")] = None


@dataclass(kw_only=True)
class RequestsOptions(Options):
    """List the requests to forget that a model has met, and who of a data folder was among them."""

    example: ClassVar = "fastvkd requests merged --data DATA"
    model: Annotated[Path, Flag("model folder", "MODEL", positional=True)]
    data: Annotated[str | None, Flag("folder, or hub id of a data set, whose entities are looked for", "DATA")] = None
    split: Annotated[str | None, Flag("of the data, for example forget_5 (default: every one)")] = None
    local_files_only: Annotated[bool, Flag("take a hub id from the cache only")] = False
    json: Annotated[bool, Flag("print what is found as JSON")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split is not None and self.data is None:
            raise SettingsError(f"--split {self.split}: of which data? give --data too")


@dataclass(kw_only=True)
class PurgeOptions(Options):
    """Remove what tells of the forgotten people from the output of a command: caches, samples, journals, pages."""

    example: ClassVar = "fastvkd purge out/run out/eval --dry-run"
    runs: Annotated[tuple[Path, ...], Flag("output folder of train, eval, attack or demo", "RUN", positional=True)]
    dry_run: Annotated[bool, Flag("list what would be removed, and remove nothing")] = False
    cache: Annotated[bool, Flag("also the run's cache_dir, which other runs may share")] = False


@dataclass(kw_only=True)
class CheckOptions(Options):
    """Validate every row of a data folder."""

    example: ClassVar = "fastvkd data check DATA"
    path: Annotated[str, Flag("folder, or hub id of a data set", "DATA", positional=True)]
    model: Annotated[str | None, Flag("also check training labels, with this model's processor", "FOLDER")] = None
    max_pixels: Annotated[Count[int | None], Flag("of a photo that this Qwen-VL model sees")] = None
    forget_split: Annotated[str | None, Flag("of a run; with --retain-split (default: every pair that is there)")] = (
        None
    )
    retain_split: Annotated[str | None, Flag("of a run; with --forget-split")] = None
    local_files_only: Annotated[bool, Flag("take a hub id from the cache only")] = False
    json: Annotated[bool, Flag("print the findings as JSON")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.forget_split is None) != (self.retain_split is None):
            raise SettingsError("--forget-split and --retain-split belong together: give both, or neither")


@dataclass(kw_only=True)
class EnvOptions(Options):
    """Tell versions, devices and what is optional, for a bug report."""

    example: ClassVar = "fastvkd env"
