"""Fine-tuning on answers: makes the model that a benchmark unlearns from, and the gold one that never saw the rest."""

from torch import Tensor

from fastvkd.unlearning.answers import Answers


def finetune(answers: Answers) -> dict[str, Tensor]:
    """L = l, the mean token cross-entropy of all answers; questions, chat text and image tokens carry no label."""
    return {"retain": answers.cross_entropy(forget=False)}
