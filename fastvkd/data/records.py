"""What every reader yields: one `Profile` per dataset row, whatever benchmark it came from."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Photo:
    """Encoded image bytes (PNG, JPEG, ...), not yet decoded; `source` is 'file:row[:k]' for messages."""

    data: bytes
    source: str


@dataclass(frozen=True)
class Choice:
    """A multiple-choice question: `options` maps letter to text, `answer` is the letter of the right one.

    A benchmark that asks the same thing about the photo and about the text gives both questions the same `pair`.
    """

    question: str
    options: dict[str, str]
    answer: str
    pair: str = ""

    @property
    def answer_text(self) -> str:
        return self.options[self.answer]


@dataclass(frozen=True)
class Open:
    """A question with a free-text answer; in a cloze question the blank is written `__`. `pair` as in `Choice`."""

    question: str
    answer: str
    pair: str = ""


@dataclass(frozen=True)
class Perturbed:
    """A question whose answer is weighed against wrong ones of the same form (TOFU, arXiv 2401.06121): `paraphrase` is
    the answer in other words, `perturbed` are the wrong answers."""

    question: str
    answer: str
    paraphrase: str
    perturbed: tuple[str, ...]


@dataclass(frozen=True)
class Questions:
    choice: tuple[Choice, ...] = ()
    generation: tuple[Open, ...] = ()
    cloze: tuple[Open, ...] = ()
    truth: tuple[Perturbed, ...] = ()


@dataclass(frozen=True)
class Profile:
    """One row: an entity, its photos (usually one), the questions about the photo and the ones about the text.

    Several rows may share `entity`: then they show different photos of it.
    """

    entity: str
    photos: tuple[Photo, ...]
    visual: Questions = field(default_factory=Questions)
    textual: Questions = field(default_factory=Questions)
    biography: str = ""
    source: str = ""
