"""Cloze questions: a sentence with a blank, answered freely and right if the answer contains what belongs there."""

import re
from typing import Any

from fastvkd.data.records import Open
from fastvkd.evaluation.generation import instruction_query
from fastvkd.evaluation.inputs import Query

INSTRUCTION = "Please **ONLY** provide the correct answer that should replace the [Blank]."
_BLANK = re.compile("_{2,}")


def cloze_text(question: str) -> str:
    """The question as it is asked: the blank (`__`) written `[Blank]`, and the benchmark's instruction after it."""
    return f"{_BLANK.sub('[Blank]', question)}\n{INSTRUCTION}"


def cloze_query(processor: Any, question: Open, photos: tuple[Any, ...], mode: str) -> Query:
    return instruction_query(processor, cloze_text(question.question), photos, mode)


def cloze_correct(truth: str, answer: str, mode: str) -> bool:
    """`paper`: the lower-cased truth is a substring. `corrected`: it stands there as whole words, so that 'Iran' is not
    found in 'Tirana' nor '1' in '19'; white space and case do not matter."""
    truth, answer = (" ".join(text.lower().split()) for text in (truth, answer))
    if mode == "paper":
        return truth in answer
    return re.search(rf"(?<!\w){re.escape(truth.rstrip('.'))}(?!\w)", answer) is not None
