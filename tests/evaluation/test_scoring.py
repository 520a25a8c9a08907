"""Option scores and greedy texts: equal to a loop over single samples, whatever the batch, on both paths."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fastvkd.errors import DataError, ModelError
from fastvkd.evaluation import inputs
from fastvkd.evaluation.generation import generate_embedded, generate_with_processor
from fastvkd.evaluation.inputs import Embedder, Tokens, embeddable
from fastvkd.evaluation.multiple_choice import OptionScores, _Pack, score_options, score_options_packed
from fastvkd.models.answers import Query, with_answer
from fastvkd.models.prompts import chat_prompt
from fastvkd.photos import decode_image
from fastvkd.records import Photo


def asked(tiny, people):
    """Queries and options: several questions per photo, and text questions, in mixed order."""
    queries, options = [], []
    for who in people:
        for question in who.visual.choice:
            queries.append(Query(chat_prompt(tiny.processor, question.question, image=True), who.photos))
            options.append(list(question.options.values()))
        for question in who.textual.choice[:1]:
            queries.append(Query(chat_prompt(tiny.processor, question.question, image=False)))
            options.append(list(question.options.values())[: 2 + len(queries) % 3])
    return queries, options


def naive_scores(model, processor, queries, options):
    """One option at a time through the whole model in float64: the definition."""
    model = copy.deepcopy(model).double()
    found = []
    for query, texts in zip(queries, options, strict=True):
        sums, counts = [], []
        images = [decode_image(photo.data, photo.source) for photo in query.photos] or None
        prompt = processor(text=query.prompt, images=images, return_tensors="pt")
        start = prompt["input_ids"].shape[1]
        for text in texts:
            inputs = processor(text=with_answer(query.prompt, text), images=images, return_tensors="pt")
            if images:
                inputs["pixel_values"] = inputs["pixel_values"].double()
            with torch.no_grad():
                log_probs = model(**inputs).logits[0].log_softmax(-1)
            ids = inputs["input_ids"][0]
            assert torch.equal(ids[:start], prompt["input_ids"][0])
            sums.append(sum(float(log_probs[place - 1, ids[place]]) for place in range(start, len(ids))))
            counts.append(len(ids) - start)
        found.append(OptionScores(tuple(sums), tuple(counts)))
    return found


def assert_same(found, expected, tolerance=1e-4):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.log_likelihood, other.log_likelihood, atol=tolerance, rtol=0)


def test_both_paths_equal_a_naive_loop_in_float64(tiny, people):
    queries, options = asked(tiny, people)
    expected = naive_scores(tiny.model, tiny.processor, queries, options)
    assert embeddable(tiny.model)
    packed = score_options_packed(Embedder(tiny.model, tiny.processor, 4), queries, options)
    assert_same(packed, expected)
    assert_same(score_options(tiny.model, tiny.processor, queries, options, 4), expected)
    # The test would not notice a path that ignores photos if the model did.
    blind = [Query(query.prompt, people[0].photos if query.photos else ()) for query in queries]
    other = naive_scores(tiny.model, tiny.processor, blind[-3:-1], options[-3:-1])
    assert abs(other[0].log_likelihood[0] - expected[-3].log_likelihood[0]) > 0.05


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scores_do_not_depend_on_the_batch(tiny, people, batch_size):
    queries, options = asked(tiny, people)
    expected = score_options_packed(Embedder(tiny.model, tiny.processor, 7), queries, options)
    assert_same(score_options_packed(Embedder(tiny.model, tiny.processor, batch_size), queries, options), expected)
    assert_same(score_options(tiny.model, tiny.processor, queries, options, batch_size), expected)


def test_many_questions_on_one_photo_are_split_into_packs(tiny, people):
    question = "Which of these many words, if any, would you choose for a person that looks like number {}?"
    queries = [
        Query(chat_prompt(tiny.processor, question.format(number), image=True), people[0].photos) for number in range(9)
    ]
    options = [["Oslo", "Port Moresby", "Porto Alegre"]] * 9
    packed = score_options_packed(Embedder(tiny.model, tiny.processor, 4), queries, options)
    assert_same(packed, naive_scores(tiny.model, tiny.processor, queries, options))


def test_eager_attention_gives_the_same_scores(tiny, people):
    queries, options = asked(tiny, people[:2])
    expected = score_options_packed(Embedder(tiny.model, tiny.processor, 4), queries, options)
    eager = copy.deepcopy(tiny.model)
    eager.set_attn_implementation("eager")
    assert_same(score_options_packed(Embedder(eager, tiny.processor, 4), queries, options), expected)


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=9), min_size=1, max_size=6))
def test_a_packed_token_sees_exactly_its_own_sequence(sequences):
    pack = _Pack(())
    for option, tokens in enumerate(sequences):
        pack.add(Tokens(tokens, np.arange(len(tokens))[None]), 1, 0, option)
    visible = pack.visible(len(pack.ids) + 2)
    positions = np.concatenate(pack.positions, axis=1)[0]
    scored = {}
    for _, option, parent, target in pack.targets:
        seen = np.flatnonzero(visible[parent])
        in_order = seen[np.argsort(positions[seen])]
        scored.setdefault(option, []).append(([pack.ids[node] for node in in_order], target))
        assert sorted(positions[seen]) == list(range(len(seen)))
    for option, tokens in enumerate(sequences):
        assert scored[option] == [(tokens[:place], tokens[place]) for place in range(1, len(tokens))]


def test_normalisation_is_the_mean_over_tokens():
    scores = OptionScores((-2.0, -3.0), (1, 3))
    assert scores.normalised == (-2.0, -1.0) and scores.best == 1


@pytest.mark.parametrize("batch_size", [2, 5, 64])
def test_generation_gives_the_text_of_batch_size_one(tiny, people, batch_size):
    queries = [
        Query(chat_prompt(tiny.processor, question.question, image=True), who.photos)
        for who in people
        for question in (*who.visual.generation, *who.visual.choice)
    ] + [Query(chat_prompt(tiny.processor, question.question, image=False)) for question in people[1].textual.choice]
    alone = [generate_with_processor(tiny.model, tiny.processor, [query], 1, 20)[0] for query in queries]
    assert len(set(alone)) > 3
    assert generate_embedded(Embedder(tiny.model, tiny.processor, batch_size), queries, 20) == alone
    assert generate_with_processor(tiny.model, tiny.processor, queries, batch_size, 20) == alone


def test_generation_stops_at_the_end_token_and_drops_finished_rows(tiny, people, monkeypatch):
    """With whichever token each row emits third declared an end token, no row is longer and the decoder idles."""
    queries = [
        Query(chat_prompt(tiny.processor, question.question, image=True), who.photos)
        for who in people
        for question in who.visual.choice
    ]
    embedder = Embedder(tiny.model, tiny.processor, 64)
    sizes = []
    hidden = Embedder.hidden

    def counted(self, **inputs):
        sizes.append(tuple(inputs["inputs_embeds"].shape[:2]))
        return hidden(self, **inputs)

    monkeypatch.setattr(Embedder, "hidden", counted)
    free = generate_embedded(embedder, queries, 12)
    assert [size[0] for size in sizes] == [len(queries)] * 12 and all(size[1] == 1 for size in sizes[1:])
    ids = [tiny.processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in free]
    ends = sorted({row[2] for row in ids[: len(ids) // 2] if len(row) > 2})
    monkeypatch.setattr(tiny.model.generation_config, "eos_token_id", ends)
    sizes.clear()
    stopped = generate_embedded(embedder, queries, 12)
    assert stopped == [generate_with_processor(tiny.model, tiny.processor, [query], 1, 12)[0] for query in queries]
    assert sum(map(len, stopped)) < sum(map(len, free))
    assert sizes[-1][0] < len(queries)


def test_the_tower_runs_once_per_distinct_photo(tiny, people, monkeypatch):
    queries, options = asked(tiny, people)
    # The same bytes in another object, as another row of a parquet file would give them.
    twin = Photo(bytes(bytearray(people[0].photos[0].data)), "twin")
    queries.append(Query(queries[0].prompt, (twin,)))
    options.append(options[0])
    seen = []
    inner = tiny.model.get_image_features

    def counted(pixel_values):
        seen.append(len(pixel_values))
        return inner(pixel_values=pixel_values)

    monkeypatch.setattr(tiny.model, "get_image_features", counted)
    embedder = Embedder(tiny.model, tiny.processor, 4)
    scores = score_options_packed(embedder, queries, options)
    generate_embedded(embedder, queries, 3)
    assert sum(seen) == len(people)
    assert scores[-1] == pytest.approx(scores[0]) or np.allclose(scores[-1].normalised, scores[0].normalised, atol=1e-5)


def test_prepared_photos_take_no_more_memory_than_their_bound(tiny, people, monkeypatch):
    queries, options = asked(tiny, people)
    free = score_options_packed(Embedder(tiny.model, tiny.processor, 2), queries, options)
    prepared = []
    original = type(tiny.processor.image_processor).__call__

    def counted(*args, **kwargs):
        prepared.append(1)
        return original(*args, **kwargs)

    one = 3 * 4 * tiny.model.config.vision_config.image_size**2
    monkeypatch.setattr(inputs, "_PREPARED_BYTES", 2 * one)
    monkeypatch.setattr(inputs, "_PASSES_AHEAD", 1)
    monkeypatch.setattr(type(tiny.processor.image_processor), "__call__", counted)
    photos = inputs.PreparedPhotos(tiny.processor)
    bounded = score_options_packed(Embedder(tiny.model, tiny.processor, 2, photos), queries, options)
    assert all(np.allclose(a.normalised, b.normalised, atol=1e-6) for a, b in zip(free, bounded, strict=True))
    distinct = {photo.key: photo for who in people for photo in who.photos}
    assert len(prepared) == len(distinct) > 2  # photos that go into one pass are prepared once, and then let go
    assert sum(key in photos._prepared for key in distinct) == 2
    assert all("pixel_values" not in photos.sizes(photo) for photo in distinct.values())


def test_a_bad_photo_and_a_missing_placeholder_are_named(tiny, people):
    embedder = Embedder(tiny.model, tiny.processor, 4)
    bad = Query(chat_prompt(tiny.processor, "Who?", image=True), (Photo(b"", "forget.parquet:3"),))
    with pytest.raises(DataError, match=r"forget\.parquet:3"):
        score_options_packed(embedder, [bad], [["a", "b"]])
    with pytest.raises(ModelError, match="0 image placeholders for 1 photos"):
        score_options_packed(embedder, [Query("USER: Who? ASSISTANT:", people[0].photos)], [["a", "b"]])
