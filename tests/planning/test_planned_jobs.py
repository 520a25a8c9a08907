"""What a plan says of evaluation, attacks and export against what they allocate, on a LLaVA with random weights; and in
which way each job fits a card."""

import gc
import json
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import infer_auto_device_map
from accelerate.utils import compute_module_sizes
from bitsandbytes.functional import QuantState
from safetensors.torch import save_file
from test_planning import measured_peak, settings_for
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from fastvkd.attacks.relearning import Attacker, relearning_curve
from fastvkd.cli import main
from fastvkd.devices import GIB, WORKING_BYTES, at_once, usable_bytes
from fastvkd.errors import ModelError
from fastvkd.evaluation.asker import Asker
from fastvkd.evaluation.inputs import Embedder, evaluating
from fastvkd.models import placement
from fastvkd.models.answers import Query
from fastvkd.models.loading import load_model
from fastvkd.models.prompts import chat_prompt
from fastvkd.options import EvalOptions
from fastvkd.paths import shipped
from fastvkd.planning.architecture import architecture_of, find_architecture
from fastvkd.planning.jobs import WholeModel, _ways, other_jobs
from fastvkd.planning.plan import plan
from fastvkd.records import Choice, Profile, Questions

SIDE, PHOTOS, ASKED = 64, 8, ("who is this person ?", "the photo ?", "who ?")


class Case:
    """A LLaVA of 256 visual tokens, its plan, and eight photos with three questions each. In bfloat16 it is half as
    wide: a CPU that has no instructions for it takes 50 times as long."""

    def __init__(self, dtype: torch.dtype):
        width = 128 * (dtype.itemsize // 2)
        self.config, self.processor = tiny.llava(
            hidden_size=width,
            intermediate_size=11 * width // 4,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=width // 4,
        )
        vision = self.config.vision_config
        vision.image_size, vision.num_attention_heads = SIDE, 4
        vision.hidden_size, vision.intermediate_size = 3 * width // 4, 3 * width
        self.config.image_seq_length = 256
        self.processor.image_processor.size = {"height": SIDE, "width": SIDE}
        self.processor.image_processor.crop_size = {"height": SIDE, "width": SIDE}
        torch.manual_seed(0)
        self.model = AutoModelForImageTextToText.from_config(self.config).eval().to(dtype)
        self.photos = [tiny.noise(SIDE, seed) for seed in range(PHOTOS)]
        self.whole = WholeModel(architecture_of(self.config.to_dict()), dtype.itemsize, asked_tokens=9)

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def queries(self, asked: tuple[str, ...]) -> list[Query]:
        prompts = [chat_prompt(self.processor, question, image=True) for question in asked]
        return [Query(prompt, (photo,)) for photo in self.photos for prompt in prompts]

    def score(self) -> None:
        queries = self.queries(ASKED)
        Asker(self.model, self.processor, PHOTOS).scores(queries, [["A", "B C"]] * len(queries))

    def answer(self) -> None:
        Asker(self.model, self.processor, PHOTOS).answers(self.queries(ASKED[:1]), 4)

    def see(self) -> None:
        with evaluating(self.model):
            Embedder(self.model, self.processor, PHOTOS).features(self.photos)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_planned_memory_of_evaluation_is_the_measured_peak(case: Case, monkeypatch) -> None:
    embedder = Embedder(case.model, case.processor, PHOTOS)
    with evaluating(case.model):
        tokens = max(len(text.ids) for text in embedder.encode(case.queries(ASKED[:1])))
    pack = tokens + 18  # two further short questions, of three tokens and an option's two each
    expected = {
        case.score: PHOTOS * embedder.pack_bytes(pack),
        case.answer: PHOTOS * embedder.answer_bytes(tokens + 4),
        case.see: PHOTOS * embedder._tower_bytes(257),
    }
    found = {}
    for work, planned in expected.items():
        work()  # lazy initialisation outside the measurement
        gc.collect()
        found[work] = measured_peak(work)
        assert found[work] == pytest.approx(planned, rel=0.10), work.__name__
    # The plan takes the largest; it counts a photo's questions as twice the first, where data ask some fifteen.
    monkeypatch.setattr("fastvkd.planning.jobs._PACK_TOKENS", pack - tokens)
    assert case.whole.asking(PHOTOS) >= 0.9 * max(found.values())
    loaded = measured_peak(lambda: AutoModelForImageTextToText.from_config(case.config, dtype=case.model.dtype))
    assert case.whole.weights() == sum(p.nbytes for p in case.model.parameters()) <= 1.05 * loaded


@pytest.mark.parametrize("gently", [False, True])
@pytest.mark.parametrize("weights", ["visual", "all"])
def test_relearning_takes_what_is_planned(case: Case, weights, gently) -> None:
    choice = Choice(ASKED[0], {"A": "A", "B": "B"}, "A")
    people = [Profile(str(i), (photo,) * 2, Questions(choice=(choice,))) for i, photo in enumerate(case.photos)]

    def relearn() -> None:
        attacker = Attacker(case.processor, people, batch_size=16)
        told = {"weights": weights, "measure_at": (0, 2), "max_samples": 1}
        told |= {"micro_batch": 1, "gradient_checkpointing": True} if gently else {}
        relearning_curve(case.model, case.processor, attacker, people, **told)

    planned = case.whole.relearning(everything=weights == "all", gently=gently)
    there = case.whole.weights()  # before, and trained where they lie
    assert there + measured_peak(relearn) == pytest.approx(planned, rel=0.10)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_planned_memory_of_quantised_weights_is_what_they_hold(case: Case, tmp_path, quantize) -> None:
    case.save(tmp_path)
    case.model = load_model(tmp_path, dtype=case.model.dtype, quantize_llm=quantize)
    held = sum(held_storages(case.model).values())
    assert held == pytest.approx(case.whole.weights(quantize), rel=0.10)
    if quantize == "int8" or case.model.dtype == torch.bfloat16:
        return  # bitsandbytes multiplies int8 on a CPU in float32, which no card does
    embedder = Embedder(case.model, case.processor, PHOTOS)
    with evaluating(case.model):
        tokens = max(len(text.ids) for text in embedder.encode(case.queries(ASKED[:1])))
    case.score()
    gc.collect()
    assert measured_peak(case.score) == pytest.approx(PHOTOS * embedder.pack_bytes(tokens + 18), rel=0.10)


def held_storages(model: nn.Module) -> dict[int, int]:
    """Bytes of all memory that a model's weights lie in, by address, with what says how they are rounded."""
    found: dict[int, int] = {}
    for owner in (*model.parameters(), *(module.state for module in model.modules() if hasattr(module, "state"))):
        for part in (owner, *vars(owner).values()):
            for value in (part, *(vars(part).values() if isinstance(part, QuantState) else ())):
                nested = vars(value).values() if isinstance(value, QuantState) else ()
                for tensor in filter(torch.is_tensor, (value, *nested)):
                    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return found


@pytest.mark.parametrize("name", ["llava-1.5-13b", "llava-v1.6-34b", "qwen2.5-vl-72b"])
def test_accelerate_spreads_a_model_as_planned(name: str) -> None:
    """At real size: what accelerate puts on a card of 24 GB, and what into host memory."""
    facts = json.loads(shipped(f"configs/architectures/{name}.json").read_text())
    facts.pop("name_or_path")
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**facts), dtype=torch.bfloat16)
    whole = WholeModel(find_architecture(name))
    room = max(WORKING_BYTES, whole.asking(EvalOptions.batch_size))
    free = usable_bytes(int(22.5 * GIB)) - room
    spread = next(way for way in _ways(whole, "", room, 1) if "host" in way.how)
    on_card, in_host, fits = spread.needs(int(22.5 * GIB), 1)
    sizes = compute_module_sizes(model)
    places = infer_auto_device_map(
        model, max_memory={0: free, "cpu": 1000 * GIB}, no_split_module_classes=model._no_split_modules
    )
    lies = {where: sum(sizes[part] for part, place in places.items() if place == where) for where in (0, "cpu")}
    coming = max(sizes["model.language_model.layers.0"], sizes["lm_head"])  # while it is at work
    assert fits and on_card - room == pytest.approx(lies[0] + coming, rel=0.10)
    assert in_host == pytest.approx(lies["cpu"], rel=0.10)


def test_evaluation_goes_in_batches_that_its_memory_holds(monkeypatch) -> None:
    case = Case(torch.float32)
    scored = Asker(case.model, case.processor, PHOTOS).scores(case.queries(ASKED), [["A", "B C"]] * 24)
    gc.collect()
    before = measured_peak(case.score)
    sizes: list[int] = []
    decoder = case.model.get_decoder()
    decoder.register_forward_pre_hook(lambda _, args, kw: sizes.append(len(kw["inputs_embeds"])), with_kwargs=True)
    monkeypatch.setattr("fastvkd.devices.WORKING_BYTES", before // 3)
    assert measured_peak(case.score) < before / 2 and max(sizes) == 2 and sum(sizes) == PHOTOS
    again = Asker(case.model, case.processor, PHOTOS).scores(case.queries(ASKED), [["A", "B C"]] * 24)
    assert all(
        a.log_likelihood == pytest.approx(b.log_likelihood, abs=1e-5) for a, b in zip(again, scored, strict=True)
    )
    assert at_once(GIB) == 1  # more than there is still goes, one by one


def test_a_plan_and_the_commands_choose_alike(monkeypatch, tmp_path) -> None:
    """Whatever the card, `eval` loads a model as the plan says."""
    for name in ("llava-1.5-7b", "llava-1.5-13b", "llava-v1.6-34b", "qwen2.5-vl-72b"):
        whole = WholeModel(find_architecture(name))
        sizes = {None: whole.weights(), "nf4": whole.weights("nf4")}
        monkeypatch.setattr(placement, "weight_bytes", lambda folder, itemsize, kind=None, of=sizes: of[kind])
        for gib in (14.8, 22.5, 45.0, 79.1, 178):
            card = type("Card", (), {"total_memory": int(gib * GIB)})
            monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, card=card: card)
            for cards in (1, 2):
                monkeypatch.setattr(torch.cuda, "device_count", lambda cards=cards: cards)
                job = other_jobs(find_architecture(name), int(gib * GIB), cards)[1]
                device = torch.device("cuda")
                found = placement.fitting(tmp_path, device, torch.bfloat16, "auto", anywhere=True)
                told = f"{'--quantize nf4' if found.quantize else ''}{'--device-map auto' if found.spread else ''}"
                if job.fits:
                    assert job.command.removeprefix("fastvkd eval --model merged --data DATA").strip() == told


def test_every_job_has_a_way_on_24_gib() -> None:
    for name in ("llava-1.5-7b", "llava-1.5-13b"):
        result = plan(settings_for(name, sites={"projector": 1.0}), gpu="L4")
        assert all(job.fits for job in result.jobs) and result.fits
        text = result.table()
        assert "fastvkd export --run RUN --to merged" in text and "fastvkd eval --model merged" in text
    assert other_jobs(find_architecture("llava-1.5-13b"), None)[1].how == "as it is"
    host = other_jobs(find_architecture("qwen2.5-vl-72b"), int(22.5 * GIB))[1]
    assert host.host_bytes > 100 * GIB and host.gpu_bytes < 22 * GIB and "--device-map auto" in host.command


def test_a_plan_needs_no_data_and_looks_at_the_folder(tmp_path, capsys) -> None:
    config, _ = tiny.llava()
    config.save_pretrained(tmp_path)

    def notes(**config_changes) -> list[str]:
        written = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**written, **config_changes}))
        assert main(["plan", f"model_name_or_path={tmp_path}", "--json"]) == 0
        return json.loads(capsys.readouterr().out)["notes"]

    assert "no weights in it" in notes()[0]
    (tmp_path / "consolidated.pth").touch()
    assert "weights in consolidated.pth only" in notes()[0]
    (tmp_path / "pytorch_model.bin").touch()
    assert notes() == []  # which are read
    save_file({"a": torch.ones(1)}, tmp_path / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "1 of 2 shards are missing, first model-2.safetensors" in notes()[0]
    save_file({"b": torch.ones(1)}, tmp_path / "model-2.safetensors")
    assert notes() == []
    assert "quantised already (awq)" in notes(quantization_config={"quant_method": "awq"})[0]
    (tmp_path / "config.json").unlink()
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "llava-hf/llava-1.5-7b-hf"}')
    with pytest.raises(ModelError, match=r"an adapter of llava-hf/llava-1\.5-7b-hf; merge it"):
        plan(settings_for(str(tmp_path)))
