"""What differs between benchmarks in how a question is asked and an answer read: prompts and readings of `paper` mode,
and how long an answer may be. `corrected` mode asks and reads all of them alike (see docs/data.md).
"""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastvkd.data.records import Choice, Open, Photo
from fastvkd.evaluation.cloze import cloze_query
from fastvkd.evaluation.generation import instruction_query
from fastvkd.evaluation.inputs import Query
from fastvkd.evaluation.multiple_choice import image_line, letter_query, read_letter, speaks_user_assistant
from fastvkd.models.prompts import chat_prompt

Photos = tuple[Photo, ...]
Shown = tuple[Choice, Photos] | None
_LETTER_TOKENS = 5  # a letter, with room for the white space some tokenizers put first


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark asks and reads.

    max_new_tokens: of a free answer, in both modes. choice_tokens: of an answer to a choice in paper mode.
    choice_query(processor, question, photos, shown): its prompt in paper mode, after a solved question where
    `demonstration` says that the benchmark shows one. read_choice(output, question, cell): the letter that is meant,
    or None. cloze_query(processor, question, photos, mode): its prompt. cloze_truth(answer): what paper mode looks for
    in an answer. instructed: whether paper mode adds the MLLMU-Bench instruction to generation questions.
    """

    max_new_tokens: int
    choice_tokens: int
    demonstration: bool
    choice_query: Callable[[Any, Choice, Photos, Shown], Query]
    read_choice: Callable[[str, Choice, str], str | None]
    cloze_query: Callable[[Any, Open, Photos, str], Query]
    cloze_truth: Callable[[str], str]
    instructed: bool


def _named_query(processor: Any, choice: Choice, photos: Photos, shown: Shown) -> Query:
    """MMUnlearner's on CLEAR: the question and `A. name` a line, without an instruction."""
    options = "\n".join(f"{letter}. {text}" for letter, text in choice.options.items())
    return Query(chat_prompt(processor, f"{choice.question}\n{options}\n", image=bool(photos)), photos)


def _first_letter(output: str, choice: Choice, cell: str) -> str | None:
    """MMUnlearner's: the first character that is an ASCII letter or digit."""
    return read_letter(re.sub(r"[^a-zA-Z0-9]", "", output), choice)


def _listed_query(processor: Any, choice: Choice, photos: Photos, shown: Shown) -> Query:
    """UMU-Bench's: the option texts as a Python list."""
    text = f"{choice.question}\nSelect answer in {list(choice.options.values())}"
    if not speaks_user_assistant(processor):
        return Query(chat_prompt(processor, text, image=bool(photos)), photos)
    return Query(f"USER:{' ' + image_line(processor, photos) if photos else chr(10)}{text}\nASSISTANT:", photos)


def _option_text(output: str, choice: Choice, cell: str) -> str | None:
    """UMU-Bench's: on the forget and retain sets the output must be an option, character by character; on celebrities
    the most similar option counts (difflib's ratio; the first of equals)."""
    letters = {text: letter for letter, text in reversed(choice.options.items())}
    if cell in ("forget", "retain"):
        return letters.get(output.strip())
    likeness = {text: difflib.SequenceMatcher(None, output.strip(), text).ratio() for text in choice.options.values()}
    return letters[max(likeness, key=likeness.__getitem__)]


def _answer_only_query(processor: Any, question: Open, photos: Photos, mode: str) -> Query:
    """UMU-Bench's, whose cloze questions are not about a marked blank."""
    text = f"{question.question}\nPlease **ONLY** provide the correct answer without any explanation"
    return instruction_query(processor, text, photos, mode)


_MLLMU = Benchmark(
    max_new_tokens=50,
    choice_tokens=_LETTER_TOKENS,
    demonstration=True,
    choice_query=letter_query,
    read_choice=lambda output, choice, cell: read_letter(output, choice),
    cloze_query=cloze_query,
    cloze_truth=str,
    instructed=True,
)
BENCHMARKS = {
    "mllmu": _MLLMU,
    "jsonl": _MLLMU,
    # Captions are longer than the answers of the others; the benchmark's own code lets 300 tokens pass.
    "clear": Benchmark(
        max_new_tokens=300,
        choice_tokens=_LETTER_TOKENS,
        demonstration=False,
        choice_query=_named_query,
        read_choice=_first_letter,
        cloze_query=cloze_query,
        cloze_truth=str,
        instructed=False,
    ),
    "umu": Benchmark(
        max_new_tokens=200,
        choice_tokens=50,
        demonstration=False,
        choice_query=_listed_query,
        read_choice=_option_text,
        cloze_query=_answer_only_query,
        cloze_truth=lambda answer: answer.split(".")[0],
        instructed=True,
    ),
}
