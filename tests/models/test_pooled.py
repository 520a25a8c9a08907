"""Images are prepared in threads, and a batch is what the processor itself makes of it; memory has a bound."""

import threading

import pytest
import tiny
import torch

from fastvkd.models import answers, visual_path
from fastvkd.models import pooled as photos
from fastvkd.models.answers import Query, collate_answers, processor_inputs
from fastvkd.models.visual_path import collate_images

SIZES = [(24, 20), (40, 20), (17, 33), (60, 60), (24, 20)]


def batches(case) -> list[dict[str, torch.Tensor]]:
    images = tiny.photos(*SIZES)
    prompt = case.processor.image_token if hasattr(case.processor, "image_token") else ""
    query = answers.chat_prompt(case.processor, tiny.QUESTION, image=True)
    assert prompt in query
    pairs = [(image, tiny.QUESTION, tiny.ANSWER) for image in images]
    queries = [Query(query, (tiny.as_photo(image),)) for image in images]
    return [
        collate_images(case.processor, case.config, images, question=tiny.QUESTION).inputs,
        collate_answers(case.processor, pairs, range(len(pairs)), [True] * len(pairs)).inputs,
        processor_inputs(case.processor, queries, None, torch.device("cpu")),
    ]


def test_a_batch_is_what_the_processor_makes_of_all_images_at_once(case, monkeypatch) -> None:
    monkeypatch.setattr(photos, "workers", lambda: 4)
    seen: set[str] = set()
    for module in (visual_path, answers):
        monkeypatch.setattr(module, "pooled", watched(module.pooled, seen))
    found = batches(case)
    assert seen and all(name.startswith("fastvkd-photos") for name in seen)
    for module in (visual_path, answers):
        monkeypatch.setattr(module, "pooled", lambda processor: processor)
    for mine, wanted in zip(found, batches(case), strict=True):
        assert mine.keys() == wanted.keys()
        for key, value in wanted.items():
            assert torch.equal(mine[key], value) and mine[key].dtype == value.dtype, key


def watched(pooled, seen: set[str]):
    """`pooled`, with the names of the threads that process images noted in `seen`."""

    def wrapped(processor):
        own = pooled(processor)
        original = own.image_processor._image_processor

        class Watched:
            def __getattr__(self, name):
                return getattr(original, name)

            def __call__(self, *args, **kwargs):
                seen.add(threading.current_thread().name)
                return original(*args, **kwargs)

        own.image_processor._image_processor = Watched()
        return own

    return wrapped


def test_the_oldest_goes_where_memory_has_its_bound() -> None:
    made: list[int] = []

    def make(key: int) -> tuple[int, int]:
        made.append(key)
        return key * key, 10 * key

    kept: photos.Recent[int] = photos.Recent(60)
    for key in (1, 2, 3, 1, 4):  # 10 + 20 + 30 fit; 4 takes the place of 2 and 3
        assert kept.get(key, lambda key=key: make(key)) == key * key
    assert made == [1, 2, 3, 4]
    assert [key in kept for key in (1, 2, 3, 4)] == [True, False, False, True]
    assert kept.get(9, lambda: make(9)) == 81 and 9 in kept and 4 not in kept  # larger than the bound


def test_results_are_in_order_and_an_error_is_raised(monkeypatch) -> None:
    monkeypatch.setattr(photos, "workers", lambda: 3)
    assert photos.in_threads(lambda n: n * n, range(20)) == [n * n for n in range(20)]
    with pytest.raises(ZeroDivisionError):
        photos.in_threads(lambda n: 1 // n, [1, 0, 2])


def test_ranks_of_a_machine_share_its_cores(monkeypatch) -> None:
    alone = photos.workers()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert photos.workers() == 1 <= alone
