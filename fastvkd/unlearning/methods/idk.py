"""Refusals ("I don't know"): descent on refusals in place of forget answers, and on retained answers."""

from torch import Tensor

from fastvkd.unlearning.answers import Answers

REFUSALS = (
    "I don't know.",
    "I am not able to tell who this is.",
    "I cannot answer that.",
    "That is not something I know.",
)


def refusal(answers: Answers) -> dict[str, Tensor]:
    """L = lambda_forget l_idk + lambda_retain l_r; in place of forget answers the sampler puts some of `REFUSALS`.

    Source: "IDK" in TOFU (arXiv 2401.06121), there on text.
    """
    return {"forget": answers.cross_entropy(forget=True), "retain": answers.cross_entropy(forget=False)}
