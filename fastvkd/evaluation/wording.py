"""Questions and answers worded as the evaluation asks them, for whatever trains on them."""

from fastvkd.data.records import Questions
from fastvkd.evaluation.cloze import cloze_text


def question_answer_pairs(questions: Questions) -> list[tuple[str, str]]:
    """Every (question, answer): multiple choice without its options, open questions, cloze with the blank marked."""
    return (
        [(c.question, c.answer_text) for c in questions.choice]
        + [(o.question, o.answer) for o in questions.generation]
        + [(cloze_text(o.question), o.answer) for o in questions.cloze]
    )
