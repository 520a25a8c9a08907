"""The prompt around an image: the chat template's text, and its part up to the image placeholder.

Both come from one function, so training and evaluation have the same prefix.
"""

from typing import Any

from jinja2 import TemplateError
from transformers import PaliGemmaProcessor

from fastvkd.errors import ModelError, one_line


def chat_prompt(processor: Any, question: str, *, image: bool) -> str:
    """The prompt of a one-turn chat. It ends where the answer begins.

    A processor's chat template is used where there is one. PaliGemma is no chat model and has its task prefix
    `<image>answer en {question}`. Others have LLaVA-1.5's `USER: <image>\\n{question} ASSISTANT:`.
    """
    template = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
    if isinstance(template, dict):  # several named templates
        template = template.get("default")
    if template:
        content: list[dict[str, str]] = [{"type": "image"}] if image else []
        content.append({"type": "text", "text": question})
        # the tokenizer renders what the processor would; SmolVLM's own method wants a video processor for it
        return _rendered(processor.tokenizer, template, content)
    if isinstance(processor, PaliGemmaProcessor):
        return f"{image_placeholder(processor) if image else ''}answer en {question}"
    placeholder = f"{image_placeholder(processor)}\n" if image else ""
    return f"USER: {placeholder}{question} ASSISTANT:"


def _rendered(tokenizer: Any, template: str, content: list[dict[str, str]]) -> str:
    """The user's turn as a chat template writes it. Raises ModelError where the template raises, or writes nothing."""
    place, mend = tokenizer.name_or_path, "use the chat_template.jinja that belongs to this model"
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=template, add_generation_prompt=True, tokenize=False
        )
    except (
        TemplateError,
        TypeError,
        ValueError,
        AttributeError,
        LookupError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise ModelError(f"{place}: the chat template cannot be rendered ({one_line(error, 160)}); {mend}") from error
    if not text.strip():
        raise ModelError(f"{place}: the chat template writes nothing for a user's turn; {mend}")
    return text


def visual_prefix(processor: Any) -> str:
    """The prompt up to and including the image placeholder. Under causal attention visual tokens see no more."""
    prompt, placeholder = chat_prompt(processor, "", image=True), image_placeholder(processor)
    end = prompt.rfind(placeholder)
    if end < 0:
        raise ModelError(
            f"{processor.tokenizer.name_or_path}: the chat template writes no {placeholder!r} for an image "
            f"({prompt[:80]!r}): use the template that belongs to this processor"
        )
    return prompt[: end + len(placeholder)]


def image_placeholder(processor: Any) -> str:
    """The text that a template writes for one image. A processor then repeats it, once per visual token."""
    # Gemma 3 writes one begin-of-image token and expands that into soft tokens
    token = getattr(processor, "boi_token", None) or getattr(processor, "image_token", None)
    if token is None:
        raise ModelError(f"{type(processor).__name__} names no image token: use a multimodal processor")
    return str(token)


def adds_special_tokens(processor: Any, prompt: str) -> bool:
    """Whether the tokenizer should add its own BOS. It should not where the template has already written one."""
    bos = processor.tokenizer.bos_token
    return not (bos and prompt.startswith(bos))
