"""Labels are the answer's tokens and no others, whatever a tokenizer does to the words at the border."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from fastvkd.models.answers import collate_answers
from fastvkd.models.prompts import chat_prompt

WORDS = ["USER:", "ASSISTANT:", "Where", "is", "Rome", "Rome</s>", "New", "York", "not", "?"]


def llama_like() -> Tokenizer:
    """As LLaVA-1.5's: every text gets a mark before its first word, and every space becomes one."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "▁", *(f"▁{word}" for word in WORDS), *WORDS]
    backend = Tokenizer(models.Unigram([(word, -float(len(word) == 1)) for word in words], unk_id=3))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return backend


def merges_across_spaces() -> Tokenizer:
    """One token for the prompt's last word and the answer's first."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", " ", "ASSISTANT: Rome", *WORDS]
    backend = Tokenizer(models.Unigram([(word, -float(len(word) == 1)) for word in words], unk_id=3))
    backend.pre_tokenizer = pre_tokenizers.Split(r"(?!)", "isolated")
    backend.decoder = decoders.Fuse()
    return backend


@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        (llama_like(), [["▁Rome", "</s>"], ["▁New", "▁York", "</s>"]]),
        (merges_across_spaces(), [["ASSISTANT: Rome", "</s>"], [" ", "New", " ", "York", "</s>"]]),
    ],
)
def test_every_token_of_the_answer_is_a_label_and_no_other(backend: Tokenizer, expected: list[list[str]]) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    processor = LlavaProcessor(CLIPImageProcessor(), tokenizer, patch_size=14, image_token="<image>")
    assert chat_prompt(processor, "Where is?", image=False) == "USER: Where is? ASSISTANT:"
    pairs = [(None, "Where is?", "Rome"), (None, "Where is?", "New York")]
    batch = collate_answers(processor, pairs, range(2), [True, False])
    for predicts, words in zip(batch.predicts, expected, strict=True):
        assert tokenizer.convert_ids_to_tokens(predicts[predicts != -100].tolist()) == words
