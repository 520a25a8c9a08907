"""Questions and answers worded as the evaluation asks them, for whatever trains on them."""

import re

from fastvkd.records import Questions

INSTRUCTION = "Please **ONLY** provide the correct answer that should replace the [Blank]."
_BLANK = re.compile("_{2,}")


def cloze_text(question: str) -> str:
    """The question as it is asked: the blank (`__`) written `[Blank]`, and the benchmark's instruction after it."""
    return f"{_BLANK.sub('[Blank]', question)}\n{INSTRUCTION}"


def question_answer_pairs(questions: Questions) -> list[tuple[str, str]]:
    """Every (question, answer): multiple choice without its options, open questions, cloze with the blank marked."""
    return (
        [(c.question, c.answer_text) for c in questions.choice]
        + [(o.question, o.answer) for o in questions.generation]
        + [(cloze_text(o.question), o.answer) for o in questions.cloze]
    )


def description_pairs(questions: Questions) -> list[tuple[str, str]]:
    """(question, answer) of every question about what a photo shows beside who it is."""
    return [(c.question, c.answer_text) for c in questions.description]
