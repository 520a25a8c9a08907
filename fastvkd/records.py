"""What every reader yields: one `Profile` per dataset row, whatever benchmark it came from."""

from dataclasses import dataclass, field
from functools import cached_property

from fastvkd.photos import content_hash


@dataclass(frozen=True)
class Photo:
    """Encoded image bytes (PNG, JPEG, ...), not yet decoded; `source` is 'file:row[:k]' for messages."""

    data: bytes
    source: str

    @cached_property
    def key(self) -> str:
        """The photo's identity across splits and caches: SHA-256 of its bytes, in hex."""
        return content_hash(self.data)


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
    """A question whose answer is weighed against wrong ones of the same form (TOFU, arXiv 2401.06121).

    `paraphrase` is the answer in other words; `perturbed` are the wrong answers.
    """

    question: str
    answer: str
    paraphrase: str
    perturbed: tuple[str, ...]


@dataclass(frozen=True)
class Questions:
    """Questions by task. `description`: what a photo shows beside who it is; asked openly, the options are all values
    that there are."""

    choice: tuple[Choice, ...] = ()
    generation: tuple[Open, ...] = ()
    cloze: tuple[Open, ...] = ()
    truth: tuple[Perturbed, ...] = ()
    description: tuple[Choice, ...] = ()


@dataclass(frozen=True)
class Profile:
    """One row: an entity, its photos (usually one), the questions about the photo and the ones about the text.

    Several rows may share `entity`: then they show different photos of it. A photo of two people is in two rows, one
    about each. `name` is the person's, where the data know it.
    """

    entity: str
    photos: tuple[Photo, ...]
    visual: Questions = field(default_factory=Questions)
    textual: Questions = field(default_factory=Questions)
    biography: str = ""
    source: str = ""
    name: str = ""
