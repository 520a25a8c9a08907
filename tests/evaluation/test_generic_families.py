"""The processor path on a tiny model of every supported family: an option's score is what generation, forced to say
that option one token at a time, gives it; and batches generate what single prompts do."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_llava import picture
from transformers import LogitsProcessor, LogitsProcessorList

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import tiny

from fastvkd.evaluation.generation import generate_embedded, generate_with_processor
from fastvkd.evaluation.inputs import EMBEDDABLE, Embedder, embeddable
from fastvkd.evaluation.multiple_choice import score_options, score_options_packed
from fastvkd.evaluation.protocol import evaluate_cells
from fastvkd.models.answers import Query, processor_inputs, token_ids, with_answer
from fastvkd.models.prompts import chat_prompt
from fastvkd.photos import decode_image
from fastvkd.records import Choice, Photo, Profile, Questions

OPTIONS = ["A B C", "the photo", "person", "C"]


@pytest.fixture(scope="module", params=list(tiny.BUILDERS))
def family(request):
    config, processor = tiny.BUILDERS[request.param]()
    return tiny.randomised(config).eval(), processor


class Forced(LogitsProcessor):
    """Says the given tokens, and keeps the log-probability that the model gave each."""

    def __init__(self, tokens):
        self.tokens, self.found = tokens, []

    def __call__(self, input_ids, scores):
        token = self.tokens[len(self.found)]
        self.found.append(float(scores[0].double().log_softmax(-1)[token]))
        only = torch.full_like(scores, -torch.inf)
        only[:, token] = 0
        return only


def forced_score(model, processor, query, option):
    start = len(token_ids(processor, [query.prompt])[0])
    tokens = token_ids(processor, [with_answer(query.prompt, option)])[0][start:]
    inputs = processor_inputs(processor, [query], None, torch.device("cpu"))
    forced = Forced(tokens)
    model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=len(tokens),
        eos_token_id=None,
        logits_processor=LogitsProcessorList([forced]),
    )
    return sum(forced.found), len(tokens)


def test_option_scores_are_those_of_forced_generation(family):
    model, processor = family
    asked = [("who is this person ?", (picture(1),)), ("who ?", (picture(2),)), ("who is the person ?", ())]
    queries = [Query(chat_prompt(processor, text, image=bool(photos)), photos) for text, photos in asked]
    for part in (queries[:2], queries[2:]):
        scores = score_options(model, processor, part, [OPTIONS] * len(part), batch_size=3)
        for query, score in zip(part, scores, strict=True):
            for option, total, count in zip(OPTIONS, score.log_likelihood, score.tokens, strict=True):
                expected, tokens = forced_score(model, processor, query, option)
                assert count == tokens
                np.testing.assert_allclose(total, expected, atol=1e-4, rtol=1e-4)


def test_batches_generate_what_single_prompts_do(family):
    model, processor = family
    texts = ("who is this person ?", "who ?", "the photo : who is this person ?")
    queries = [
        Query(chat_prompt(processor, text, image=True), (picture(number),)) for number, text in enumerate(texts)
    ] + [Query(chat_prompt(processor, text, image=False)) for text in texts[:2]]
    alone = [generate_with_processor(model, processor, [query], 1, 8)[0] for query in queries]
    assert generate_with_processor(model, processor, queries, 3, 8) == alone


def wide(number):
    """A photo of another shape: in Qwen's families the number of visual tokens follows it."""
    image = decode_image(picture(number).data, "-").resize((16, 56))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Photo(buffer.getvalue(), "wide")


def test_the_embedding_path_equals_the_processor_path_where_it_is_used(family):
    model, processor = family
    assert embeddable(model) == (model.config.model_type in EMBEDDABLE)
    if not embeddable(model):
        return
    photos = (picture(1), wide(2), picture(3))
    queries = [
        Query(chat_prompt(processor, text, image=True), (photo,))
        for photo in photos
        for text in ("who ?", "who is this person ?", "the photo : who is this person ?")
    ] + [Query(chat_prompt(processor, "who is the person ?", image=False))]
    embedder = Embedder(model, processor, 4)
    packed = score_options_packed(embedder, queries, [OPTIONS] * len(queries))
    plain = [score_options(model, processor, [query], [OPTIONS], batch_size=2)[0] for query in queries]
    for one, other in zip(packed, plain, strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.log_likelihood, other.log_likelihood, atol=1e-4, rtol=1e-4)
    alone = [generate_with_processor(model, processor, [query], 1, 8)[0] for query in queries]
    assert generate_embedded(embedder, queries, 8) == alone


@pytest.mark.parametrize("mode", ["corrected", "paper"])
def test_the_protocol_runs_on_every_family(family, mode):
    model, processor = family
    options = dict(zip("ABCD", OPTIONS, strict=True))
    questions = Questions(choice=(Choice("who ?", options, "A"), Choice("who is this person ?", options, "C")))
    cells = {"forget": [Profile(str(number), (picture(number),), questions, questions) for number in range(2)]}
    figures = evaluate_cells(model, processor, cells, batch_size=4, mode=mode, seed=0)["forget"]
    assert figures["vqa"]["n"] in (3, 4) and 0 <= figures["vqa"]["accuracy"] <= 1
    assert figures["qa"]["n"] in (3, 4)
