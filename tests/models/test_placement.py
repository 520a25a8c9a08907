"""How the commands that only ask a model load it: a default that fits the card, and what is spread over memory."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

from fastvkd.attacks.run import Attack
from fastvkd.devices import GIB
from fastvkd.errors import DataError, ModelError, SettingsError
from fastvkd.evaluation.asker import Asker as EvaluationAsker
from fastvkd.evaluation.inputs import PreparedPhotos
from fastvkd.models import loading, placement
from fastvkd.models.answers import Query
from fastvkd.models.loading import load_model
from fastvkd.models.placement import Loading, fitting, loading_of, weight_bytes
from fastvkd.models.prompts import chat_prompt
from fastvkd.options import EvalOptions
from fastvkd.records import Choice, Profile, Questions

taken: Counter[int] = Counter()  # bytes of each GPU that something lies in


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """GiB of the GPUs that torch seems to see."""
    sizes = [22.5]
    taken.clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(sizes))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)

    def properties(device: torch.device | int) -> SimpleNamespace:
        index = device if isinstance(device, int) else device.index or 0
        return SimpleNamespace(total_memory=int(sizes[index] * GIB))

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (int(sizes[i] * GIB) - taken[i], int(sizes[i] * GIB)))
    return sizes


def options(**told) -> EvalOptions:
    return EvalOptions(model="m", data="d", **told)


def sized(monkeypatch: pytest.MonkeyPatch, billions: float) -> Path:
    """A folder whose model has so many parameters, 95 % of them in the LLM's layers."""

    def bytes_of(_: Path, itemsize: int, quantize: str | None = None) -> int:
        each = {None: itemsize, "nf4": 0.5625}[quantize]
        return int(billions * 1e9 * (0.05 * itemsize + 0.95 * each))

    monkeypatch.setattr(placement, "weight_bytes", bytes_of)
    return Path("models/LLaVA-13B")


def test_bfloat16_is_the_default_on_a_gpu_and_float32_on_a_cpu(cards, monkeypatch) -> None:
    folder = sized(monkeypatch, 7)
    assert loading_of(options(), folder) == Loading(torch.device("cuda"), torch.bfloat16)
    assert loading_of(options(fp32=True, quantize="int8"), folder).dtype == torch.float32
    cpu = Loading(torch.device("cpu"))
    assert loading_of(options(device="cpu"), folder) == cpu and cpu.dtype == torch.float32
    assert loading_of(options(device="cpu", bf16=True), folder).dtype == torch.bfloat16
    with pytest.raises(SettingsError, match="--bf16 and --fp32"):
        options(bf16=True, fp32=True)


def test_the_default_fits_the_card_and_says_so(cards, monkeypatch, caplog) -> None:
    folder = sized(monkeypatch, 13)
    found = loading_of(options(), folder)
    assert (found.quantize, found.spread) == ("nf4", False) and len(caplog.messages) == 1
    needs = "LLaVA-13B in bfloat16 needs 28 GB; this card has 24: loaded in nf4, as --quantize nf4"
    assert caplog.messages[0].startswith(needs) and "--device-map auto is exact" in caplog.messages[0]
    caplog.clear()
    assert loading_of(options(quantize="none"), folder).quantize is None
    assert loading_of(options(device_map="auto"), folder) == Loading(torch.device("cuda"), torch.bfloat16, spread=True)
    assert not caplog.messages  # what was asked for need not be said
    cards.append(22.5)
    assert loading_of(options(), folder).spread and "spread over 2 cards" in caplog.messages[0]
    assert loading_of(options(device="cuda:1"), folder).quantize == "nf4"  # one card was named
    with pytest.raises(SettingsError, match="leave out --device cuda:1"):
        loading_of(options(device="cuda:1", device_map="auto"), folder)
    assert fitting(folder, torch.device("cuda"), torch.bfloat16, "auto").quantize == "nf4"
    auto = loading_of(options(device_map="auto"), folder)
    assert auto.scattered(folder) == "cards"
    cards[:] = [22.5]
    assert auto.scattered(folder) == "host" and loading_of(options(quantize="nf4"), folder).scattered(folder) == ""
    folder = sized(monkeypatch, 40)
    caplog.clear()
    assert loading_of(options(), folder).spread and "spread over cards and host memory" in caplog.messages[0]


def test_bytes_of_a_folder_are_those_of_the_loaded_model(llava) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(llava.folder, dtype=dtype)
        assert weight_bytes(llava.folder, dtype.itemsize) == sum(p.nbytes for p in model.parameters())
    linear = sum(p.numel() for n, p in model.named_parameters() if "language_model.layers" in n and p.dim() == 2)
    rounded = weight_bytes(llava.folder, 4) - weight_bytes(llava.folder, 4, "nf4")
    assert linear and rounded == pytest.approx(linear * (4 - 0.5625), abs=1)
    assert weight_bytes(llava.folder, 4) - weight_bytes(llava.folder, 4, "int8") == linear * 3


def test_a_spread_model_fills_the_cards_first(llava, cards, monkeypatch) -> None:
    cards.append(45.0)
    asked: dict = {}

    def read(auto_class, folder, path, config, given, may_lack):
        asked.update(given)
        raise ModelError("enough seen")

    monkeypatch.setattr(loading, "_read", read)
    with pytest.raises(ModelError, match="enough seen"):
        Loading(torch.device("cuda"), torch.bfloat16, spread=True).model(llava.folder)
    assert asked["device_map"] == "auto" and asked["dtype"] == torch.bfloat16
    room = asked["max_memory"]
    assert list(room) == [0, 1, "cpu"] and room["cpu"] > 0
    assert room[0] == pytest.approx((22.5 * 0.96 - 0.78 - 2) * GIB, rel=0.01) and room[1] > 2 * room[0]
    taken[0] = 10 * GIB  # by the model that was loaded first
    with pytest.raises(ModelError, match="enough seen"):
        Loading(torch.device("cuda"), torch.bfloat16, spread=True, room=GIB).model(llava.folder)
    assert asked["max_memory"][0] == (22.5 - 10 - 1) * GIB


@pytest.fixture
def spread(llava, tmp_path, monkeypatch) -> torch.nn.Module:
    """The model with its second layer and its head away, as in host memory beside a GPU: here on disk beside a CPU."""
    where = {"device_map": tiny.places_in_part_away(), "offload_folder": str(tmp_path)}
    monkeypatch.setattr(loading, "_spread", lambda room: where)
    model = Loading(torch.device("cpu"), spread=True).model(llava.folder)
    away = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.is_meta}
    assert "lm_head" in away and any("layers.1." in name for name in away)
    return model


def test_a_spread_model_answers_as_a_whole_one(llava, spread) -> None:
    """Up to the last bit: some CPUs' matrix products round by where in memory a weight begins."""
    whole = load_model(llava.folder)
    photo = tiny.as_photo(tiny.photos((20, 20))[0])
    prompt = chat_prompt(llava.processor, "who is this person ?", image=True)
    queries = [Query(prompt, (photo,)), Query(chat_prompt(llava.processor, "who ?", image=False))]
    for fast in (True, False):
        one, other = (EvaluationAsker(model, llava.processor, fast=fast) for model in (spread, whole))
        assert one.answers(queries, 4) == other.answers(queries, 4)
        for mine, theirs in zip(*(asker.scores(queries, [["A", "B C"]] * 2) for asker in (one, other)), strict=True):
            assert mine.tokens == theirs.tokens
            assert mine.log_likelihood == pytest.approx(theirs.log_likelihood, rel=1e-6)


def test_attacks_that_need_all_weights_are_left_out_where_some_are_away(llava, spread, caplog) -> None:
    photo = tiny.as_photo(tiny.photos((20, 20))[0])
    choice = Choice("who is this person ?", {"A": "A", "B": "B"}, "A")
    people = [Profile(name, (photo,), Questions(choice=(choice,))) for name in ("a", "b")]
    cells = {"forget": people[:1], "test": people[:1], "retain": people[1:]}
    loaders = {"unlearned": lambda: spread}
    attack = Attack(loaders, llava.processor, cells, PreparedPhotos(llava.processor), scattered="host")
    found = attack.run(["all"])
    assert {row["kind"] for row in found["questions"]} >= {"plain", "images"} and "relearning" not in found
    assert "quantize" not in {row["kind"] for row in found["questions"]}
    assert sum("lie partly in host memory" in message for message in caplog.messages) == 3
    with pytest.raises(DataError, match="relearn: the weights lie partly in host memory"):
        attack.run(["relearn"])
