"""Texts of data that a prompt cannot take as they are: words that a model's tokenizer reads as marks of its own.

A question that says `<image>` would stand for a photo that is not there; an answer that says `</s>` would end itself.
"""

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache

from fastvkd.errors import DataError
from fastvkd.records import Profile

# What the supported families write for a photo. No text says one of these by chance, so no model is asked first.
PLACEHOLDERS = (
    "<image>",
    "<|image_pad|>",
    "<|vision_start|>",
    "<IMG_CONTEXT>",
    "<image_soft_token>",
    "<start_of_image>",
    "<fake_token_around_image>",
)


def texts_of(profile: Profile) -> Iterator[tuple[str, str]]:
    """Every text of a profile that stands in a prompt, with what it is."""
    for questions in (profile.visual, profile.textual):
        for choice in (*questions.choice, *questions.description):
            yield "question", choice.question
            yield from (("option", text) for text in choice.options.values())
        for asked in (*questions.generation, *questions.cloze):
            yield from (("question", asked.question), ("answer", asked.answer))
        for truth in questions.truth:
            yield from (("question", truth.question), ("answer", truth.answer), ("answer", truth.paraphrase))
            yield from (("wrong answer", text) for text in truth.perturbed)


def marks_in(profile: Profile, marks: Iterable[str]) -> str | None:
    """The message about the first text of a profile that holds one of `marks`; None where no text does."""
    marks = tuple(marks)
    for what, text in texts_of(profile):
        if found := mark_in(text, marks):
            return (
                f"{profile.source}: the {what} {text[:80]!r} holds {found!r}, which a model reads as a mark of "
                "its own and not as text; remove it (a photo's place in the prompt is written for you)"
            )
    return None


def mark_in(text: str, marks: Iterable[str]) -> str | None:
    """The first of `marks` that a text holds."""
    found = _pattern(tuple(marks)).search(text)
    return found and found[0]


def refuse_placeholders(profile: Profile) -> Profile:
    """The profile itself. Raises DataError, naming its row, where a text holds an image placeholder."""
    return _refused(profile, PLACEHOLDERS)


def refuse_marks(profiles: Iterable[Profile], marks: Iterable[str]) -> None:
    """Raises DataError, naming the row, where a text holds one of a model's special tokens (`special_tokens`)."""
    marks = tuple(marks)
    for profile in profiles:
        _refused(profile, marks)


def _refused(profile: Profile, marks: tuple[str, ...]) -> Profile:
    if message := marks_in(profile, marks):
        raise DataError(message)
    return profile


@lru_cache(maxsize=8)
def _pattern(marks: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True)) or "(?!)")
