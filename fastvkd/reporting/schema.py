"""What report.json may hold, as pydantic models, and what is wrong with one in lines that a user understands."""

import difflib
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

SCHEMA_VERSION = 3  # 2 lacks the figures about strangers and the variants of relearning, and is read as well
Kind = Literal["vqa", "qa"]
KINDS = get_args(Kind)
SETS = (
    *("forget", "test", "retain", "realworld", "forget_faces", "retain_faces", "real_faces", "real_world"),
    *("stranger", "neighbour", "pair"),
)
CELLS = tuple((name, kind) for name in SETS[:4] for kind in KINDS)
MODELS = ("vanilla", "unlearned", "gold")
PLAIN = "plain"  # the relearning attack that takes the model as it is

_ABSENT: Any = None  # the default of what may be left out; null where it is written is refused
_LOW_HIGH = "expected low <= high"


def _holding(*names: str) -> BeforeValidator:
    """An object that lacks one of `names` is refused as a whole."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and not set(names) <= set(value):
            raise ValueError(f"expected an object with {', '.join(names)}")
        return value

    return BeforeValidator(check)


def _low_high(interval: list[float]) -> list[float]:
    if interval[0] > interval[1]:
        raise ValueError(_LOW_HIGH)
    return interval


Text = Annotated[str, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Seconds = Annotated[Number, Field(ge=0)]
Whole = Annotated[int, Field(strict=True, ge=0)]
Count = Annotated[int, Field(strict=True, gt=0)]
Interval = Annotated[list[Fraction], Field(min_length=2, max_length=2), AfterValidator(_low_high)]
Digest = Annotated[Text, Field(pattern="^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Cell(BaseModel):
    """The figures of one set and kind; more of them may follow."""

    accuracy: Fraction
    n: Count
    ci95: Interval
    rouge_l: Fraction | None
    cloze: Fraction | None

    @model_validator(mode="before")
    @classmethod
    def _without_choices(cls, value: Any) -> Any:
        # Data without multiple-choice questions have no accuracy: such a cell is whole without it.
        if isinstance(value, dict) and [value.get(key, 1) for key in ("accuracy", "ci95", "n")] == [None, None, 0]:
            return value | {"accuracy": 0, "ci95": [0, 0], "n": 1}
        return value


Kinds = dict[Kind, Cell]


class Point(_Part):
    step: Whole
    accuracy: Fraction


def _rising(curve: list[Point]) -> list[Point]:
    for i in range(1, len(curve)):
        if curve[i].step <= curve[i - 1].step:
            found, error = curve[i].step, ValueError(f"expected a whole number above {curve[i - 1].step}")
            where: Any = {"type": "value_error", "loc": (i, "step"), "input": found, "ctx": {"error": error}}
            raise ValidationError.from_exception_data("curve", [where])
    return curve


Weights = Literal["visual", "all"]
Curve = Annotated[list[Point], Field(min_length=1), AfterValidator(_rising)]
Curves = Annotated[dict[Literal["vanilla", "unlearned", "gold"], Curve], _holding("unlearned")]


class Areas(_Part):
    unlearned: Fraction
    vanilla: Fraction = 0
    gold: Fraction = 0
    relearning_gap: Annotated[Number, Field(ge=-1, le=1)] = 0


class Accuracy(BaseModel):
    accuracy: Fraction


class Area(BaseModel):
    auc: Fraction
    ci95: Interval


class Answered(Accuracy):
    ci95: Interval
    n: Count


class Found(Accuracy):
    """By a linear probe; `chance`: of guessing."""

    chance: Fraction


class Figures(_Part):
    unlearned: Accuracy
    vanilla: Accuracy = _ABSENT
    gold: Accuracy = _ABSENT


class Questioned(_Part):
    unlearned: Answered
    vanilla: Answered = _ABSENT
    gold: Answered = _ABSENT


class Question(BaseModel):
    kind: Text
    variant: Text
    chance: Fraction
    figures: Questioned


class Probe(BaseModel):
    sites: list[Text]
    models: dict[str, dict[str, dict[str, Found]]]


class Perturbed(BaseModel):
    """Accuracy under a perturbation of at most `size` 255ths of every pixel."""

    size: Whole
    on: Literal["unseen", "strangers"]
    chance: Fraction
    figures: Figures


class Attacks(_Part):
    questions: list[Question] = []
    membership: dict[str, dict[str, dict[str, Area]]] = {}
    probe: Probe = _ABSENT
    perturbation: list[Perturbed] = []


class Check(BaseModel):
    key: Text
    name: Text
    asked: Text
    figure: Number | None
    met: Annotated[bool, Field(strict=True)] | None


class Forgotten(BaseModel):
    entities: Whole
    images: Whole


class Request(_Part):
    """A request that the model has met; `judged`: whether the certificate speaks of it."""

    request: Count
    date: Text | None
    entities: Whole | None
    judged: Annotated[bool, Field(strict=True)]


class CertificateSummary(BaseModel):
    verdict: Literal["passed", "failed", "incomplete"]
    forgotten: Forgotten
    checks: list[Check]
    loading: dict[str, Text] = _ABSENT
    requests: list[Request] = []


class Parameters(BaseModel):
    trainable: Whole
    frozen: Whole
    total: Whole

    @field_validator("total")
    @classmethod
    def _adds_up(cls, total: int, info: ValidationInfo) -> int:
        if {"trainable", "frozen"} <= set(info.data) and total != info.data["trainable"] + info.data["frozen"]:
            raise ValueError("expected trainable + frozen")
        return total


class Digests(BaseModel):
    before: Digest
    after: Digest


class Method(BaseModel):
    name: Text
    forget: Fraction
    retain: Fraction


class Share(BaseModel):
    accuracy: Fraction
    n: Count


class Described(Share):
    ci95: Interval


class Who(BaseModel):
    """How the greedy answers to "who is it" are divided; the three shares are of all `n`."""

    right: Fraction
    abstains: Fraction
    misnamed: Fraction
    n: Count


class Band(BaseModel):
    low: Fraction
    high: Fraction

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.low > self.high:
            raise ValueError(_LOW_HIGH)
        return self


class Null(BaseModel):
    median: Fraction
    high: Fraction


class Telltale(BaseModel):
    scores: dict[str, Fraction]
    null: Null = _ABSENT


class Beside(_Part):
    """What is known of one model about forgotten people beside strangers; docs/evaluation.md says what each is."""

    by_person: dict[Text, dict[Kind, Share]] = _ABSENT
    who: dict[Literal["forget", "retain", "stranger"], Who] = _ABSENT
    description: dict[Literal["forget", "retain", "stranger", "neighbour"], Described] = _ABSENT
    stranger_band: Band = _ABSENT
    telltale_auc: Fraction = _ABSENT
    telltale: Telltale = _ABSENT
    retain_by_likeness: dict[Literal["near", "middle", "far"], Share] = _ABSENT


class Model(Beside):
    """All figures of one model: the cells of every set, and what sets people beside strangers."""

    forget: Kinds = _ABSENT
    test: Kinds = _ABSENT
    retain: Kinds = _ABSENT
    realworld: Kinds = _ABSENT
    forget_faces: Kinds = _ABSENT
    retain_faces: Kinds = _ABSENT
    real_faces: Kinds = _ABSENT
    real_world: Kinds = _ABSENT
    stranger: Kinds = _ABSENT
    neighbour: Kinds = _ABSENT
    pair: Kinds = _ABSENT


FIGURES = tuple(Beside.model_fields)


class Relearned(BaseModel):
    """The area under one relearning curve; `variant` is how the attacker prepared the model. One that has `collapsed`
    is no evidence: retained people were lost too."""

    variant: Text = PLAIN
    weights: Weights
    learning_rate: Annotated[Number, Field(gt=0)] = _ABSENT
    collapsed: Annotated[bool, Field(strict=True)] = False
    auc: Annotated[Areas, _holding("unlearned")]


class Report(_Part):
    """The whole of report.json; what has a default may be left out, and is never null."""

    schema_version: Literal[2, 3]
    settings: dict[str, Any]
    versions: dict[str, Text]
    chance: Fraction
    vanilla: Model
    unlearned: Model
    seconds: Annotated[dict[str, Seconds], Field(min_length=1)]
    peak_memory_bytes: Count
    parameters: Parameters
    language_model_sha256: Digests
    relearning: dict[Weights, Curves]
    gold: Model = _ABSENT
    comparison: list[Method] = []
    hardware: dict[str, Any] = {}
    notes: list[Text] = []
    relearning_auc: dict[Weights, Annotated[Areas, _holding("unlearned")]] = {}
    relearning_variants: list[Relearned] = []
    attacks: Attacks = _ABSENT
    certificate: Annotated[CertificateSummary, _holding("verdict", "forgotten", "checks")] = _ABSENT


REQUIRED_KEYS = tuple(name for name, field in Report.model_fields.items() if field.is_required())


def validate(report: Any, *, cells: Iterable[tuple[str, str]] = CELLS, partial: bool = False) -> list[str]:
    """Every way in which `report` breaks the schema, as 'key: what was found, what is allowed'; empty if none.

    Args:
        report: the parsed content of report.json.
        cells: the (set, kind) pairs that every model must have; all eight unless the data lack some.
        partial: required keys may be missing, as in what `fastvkd report` collects.
    """
    if not isinstance(report, dict):
        return [f"report: found {_shown(report)}, expected an object"]
    cells, problems = tuple(cells), []
    try:
        Report.model_validate(report)
    except ValidationError as error:
        found = error.errors(include_url=False)
        problems = [
            _in_words(one) for one in found if not (partial and one["type"] == "missing" and len(one["loc"]) == 1)
        ]
    for model in MODELS:
        sets = report.get(model)
        if isinstance(sets, dict):
            missing = [cell for cell in cells if not _measured(sets, *cell)]
            problems += [f"{model}.{name}.{kind}: missing" for name, kind in missing]
    return problems


def _measured(sets: dict[str, Any], name: str, kind: str) -> bool:
    try:
        return sets[name][kind]["accuracy"] is not None
    except (KeyError, TypeError):
        return False


def _in_words(error: Any) -> str:
    """A pydantic error as 'key.path[2]: found ..., expected ...'."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"] if part != "[key]")
    path = path.removeprefix(".")
    if error["type"] == "missing":
        return f"{path}: missing"
    if error["type"] == "extra_forbidden":
        last = error["loc"][-1]
        known = _keys_beside(error["loc"])
        near = difflib.get_close_matches(str(last), known, n=1)
        return f"{path}: unknown key, " + (
            f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
        )
    allowed = str(error["ctx"]["error"]) if error["type"] == "value_error" else error["msg"]
    allowed = re.sub(r"^\w+ should |^(?=String)", "expected to ", allowed).partition(" or instance of")[0]
    return f"{path}: found {_shown(error['input'])}, {allowed}"


def _keys_beside(place: tuple[int | str, ...]) -> list[str]:
    """The keys that are allowed where an unknown one was found."""
    parts: dict[str, type[BaseModel]] = {"attacks": Attacks, "figures": Figures, "relearning_auc": Areas, "auc": Areas}
    if place[0] in MODELS:
        return list(Model.model_fields)
    inside = next((parts[part] for part in reversed(place[:-1]) if part in parts), Point if len(place) > 1 else Report)
    return list(inside.model_fields)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
