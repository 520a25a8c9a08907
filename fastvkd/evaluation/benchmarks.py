"""How every benchmark asks questions and reads answers: in `corrected` mode all alike, in `paper` mode as the code
published with it does (docs/evaluation.md).
"""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, get_args

from fastvkd.data.wording import cloze_text
from fastvkd.models.answers import Query
from fastvkd.models.prompts import chat_prompt, image_placeholder
from fastvkd.options import Mode
from fastvkd.records import Choice, Photo

MODES = get_args(Mode)
Photos = tuple[Photo, ...]
Shown = tuple[Choice, Photos] | None


@dataclass(frozen=True)
class Letters:
    """How options are shown to a model that names one.

    query(processor, question, photos, shown) is the prompt, after a solved question where `demonstration` says that the
    benchmark shows one. read(output, question, cell) is the letter that is meant, or None.
    """

    query: Callable[[Any, Choice, Photos, Shown], Query]
    read: Callable[[str, Choice, str], str | None]
    max_new_tokens: int = 5  # a letter, with room for the white space some tokenizers put first
    demonstration: bool = False


@dataclass(frozen=True)
class Rules:
    """How a benchmark asks and reads in one mode.

    max_new_tokens: of a free answer. turn(processor, text, photos): a text as the user's turn. generation_text and
    cloze_text: the text of a question. cloze_correct(truth, answer): whether a cloze answer is right. letters: None
    where options are not shown, but scored by their likelihood.
    """

    max_new_tokens: int
    turn: Callable[[Any, str, Photos], Query]
    generation_text: Callable[[str], str]
    cloze_text: Callable[[str], str]
    cloze_correct: Callable[[str, str], bool]
    letters: Letters | None = None


def chat_turn(processor: Any, text: str, photos: Photos) -> Query:
    return Query(chat_prompt(processor, text, image=bool(photos)), photos)


def published_turn(processor: Any, text: str, photos: Photos) -> Query:
    """The published prompt, with a line break before ASSISTANT, if the processor's format is LLaVA-1.5's."""
    if not speaks_user_assistant(processor):
        return chat_turn(processor, text, photos)
    return Query(f"USER: {_image_line(processor, photos)}{text}\nASSISTANT:", photos)


def speaks_user_assistant(processor: Any) -> bool:
    """Whether prompts of this processor look like LLaVA-1.5's, which the published prompts are written for."""
    prompt = chat_prompt(processor, "?", image=False)
    return prompt.startswith("USER:") and prompt.rstrip().endswith("ASSISTANT:")


def _image_line(processor: Any, photos: Photos) -> str:
    return f"{image_placeholder(processor)}\n" * len(photos)


def _in_one_sentence(question: str) -> str:
    return f"{question}\nAnswer the question based on your trained knowledge in one sentence accurately in ENGLISH."


def _answer_only(question: str) -> str:
    """UMU-Bench's, whose cloze questions are not about a marked blank."""
    return f"{question}\nPlease **ONLY** provide the correct answer without any explanation"


def holds_words(truth: str, answer: str) -> bool:
    """Whether the truth stands in the answer as whole words, so that 'Iran' is not found in 'Tirana' nor '1' in '19'.
    White space and case do not matter."""
    truth, answer = _lowered(truth), _lowered(answer)
    return re.search(rf"(?<!\w){re.escape(truth.rstrip('.'))}(?!\w)", answer) is not None


def holds_text(truth: str, answer: str) -> bool:
    """Whether the lower-cased truth is a part of the answer."""
    return _lowered(truth) in _lowered(answer)


def _lowered(text: str) -> str:
    return " ".join(text.lower().split())


def letter_query(processor: Any, choice: Choice, photos: Photos, shown: Shown = None) -> Query:
    """MLLMU-Bench's: question, lettered options, "Just give ONE letter representing the answer directly."

    Processors that speak LLaVA-1.5's USER/ASSISTANT format get the literal text, with an optional solved question (and
    its photo) before it; the others get the same words in their chat template, without a demonstration, which the
    benchmark does not define for them.
    """
    text = f"{choice.question}\n{_lettered(choice)}\nJust give ONE letter representing the answer directly."
    asked = published_turn(processor, text, photos)
    if shown is None or not speaks_user_assistant(processor):
        return asked
    solved, shown_photos = shown
    before = (
        f"USER: {_image_line(processor, shown_photos)}Question: {solved.question}\n{_lettered(solved)}\n"
        f"Correct Answer: {solved.answer}\n"
    )
    return Query(before + asked.prompt, (*shown_photos, *photos))


def _lettered(choice: Choice) -> str:
    return "\n".join(f"{letter}: {text}" for letter, text in choice.options.items())


def read_letter(output: str, choice: Choice, cell: str = "") -> str | None:
    """MLLMU-Bench's: the option that the first character names; None if it is no option."""
    first = output.strip()[:1].upper()
    return first if first in choice.options else None


def _named_query(processor: Any, choice: Choice, photos: Photos, shown: Shown) -> Query:
    """MMUnlearner's prompt on CLEAR: the question and a line `A. name` for each option, without an instruction."""
    options = "\n".join(f"{letter}. {text}" for letter, text in choice.options.items())
    return chat_turn(processor, f"{choice.question}\n{options}\n", photos)


def _first_letter(output: str, choice: Choice, cell: str) -> str | None:
    """MMUnlearner's reading: the first character that is an ASCII letter or digit."""
    return read_letter(re.sub(r"[^a-zA-Z0-9]", "", output), choice)


def _listed_query(processor: Any, choice: Choice, photos: Photos, shown: Shown) -> Query:
    """UMU-Bench's prompt: the option texts as a Python list."""
    text = f"{choice.question}\nSelect answer in {list(choice.options.values())}"
    if photos or not speaks_user_assistant(processor):
        return published_turn(processor, text, photos)
    return Query(f"USER:\n{text}\nASSISTANT:", ())


def _option_text(output: str, choice: Choice, cell: str) -> str | None:
    """UMU-Bench's: on the forget and retain cells the output must be an option, character by character; on celebrities
    the most similar option counts (difflib's ratio; the first of equals)."""
    letters = {text: letter for letter, text in reversed(choice.options.items())}
    if cell in ("forget", "retain"):
        return letters.get(output.strip())
    likeness = {text: difflib.SequenceMatcher(None, output.strip(), text).ratio() for text in choice.options.values()}
    return letters[max(likeness, key=likeness.__getitem__)]


_CORRECTED = Rules(50, chat_turn, generation_text=str, cloze_text=cloze_text, cloze_correct=holds_words)
_MLLMU = {
    "corrected": _CORRECTED,
    "paper": Rules(
        50,
        published_turn,
        _in_one_sentence,
        cloze_text,
        holds_text,
        Letters(letter_query, read_letter, demonstration=True),
    ),
}
# Captions are longer than the answers of the others; the benchmark's own code lets 300 tokens pass.
_CLEAR = replace(_CORRECTED, max_new_tokens=300)
BENCHMARKS: dict[str, dict[str, Rules]] = {
    "mllmu": _MLLMU,
    "jsonl": _MLLMU,
    "clear": {"corrected": _CLEAR, "paper": replace(_CLEAR, letters=Letters(_named_query, _first_letter))},
    "umu": {
        "corrected": replace(_CORRECTED, max_new_tokens=200, cloze_text=_answer_only),
        "paper": Rules(
            200,
            published_turn,
            _in_one_sentence,
            _answer_only,
            lambda truth, answer: holds_text(truth.split(".")[0], answer),
            Letters(_listed_query, _option_text, max_new_tokens=50),
        ),
    },
}
