"""The target `stranger`: maps that change what a model says of who somebody is and of nothing else, for every family;
then runs that find, keep and use them."""

import copy
import dataclasses
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch.utils._pytree import tree_leaves

from fastvkd.data.sources import read_forget_retain
from fastvkd.data.strangers import read_strangers
from fastvkd.engines.checkpoints import load_weights
from fastvkd.errors import DataError, SettingsError
from fastvkd.models import families, loading, placement
from fastvkd.models.folder import identify_base
from fastvkd.models.placement import Loading
from fastvkd.models.visual_path import VisualPath
from fastvkd.records import Choice, Open, Profile, Questions
from fastvkd.settings import Settings, Stranger
from fastvkd.unlearning.answers import read_answers
from fastvkd.unlearning.loop import unlearn
from fastvkd.unlearning.tasks import prepare
from fastvkd.unlearning.vkd import stranger
from fastvkd.unlearning.vkd.asking import Asker, Seen
from fastvkd.unlearning.vkd.images import ImageSet, Views
from fastvkd.unlearning.vkd.stranger import GuidedSearch, Natural, Population
from fastvkd.unlearning.vkd.teacher import split_by_image

WHO, WHAT = "who is this person ?", "the photo ?"


def tiny_population(name: str) -> tuple[torch.nn.Module, object, ImageSet, Population]:
    """Two forgotten people and three strangers with two photos each, of two sizes."""
    config, processor = tiny.BUILDERS[name]()
    shown = [tiny.as_photo(image, f"{i}") for i, image in enumerate(tiny.photos(*[(16, 16), (32, 16)] * 5))]
    images = ImageSet(shown, processor, config, dtype=torch.float32, pin=False)
    questions = Questions(
        generation=(Open(WHO, "A B"),), description=(Choice(WHAT, {"A": "B", "B": "C"}, "A"),),
    )  # fmt: skip
    profiles = [[Profile(str(e), tuple(shown[2 * e : 2 * e + 2]), questions)] for e in range(2)]
    pairs = [[2 * i, 2 * i + 1] for i in range(5)]
    return tiny.randomised(config), processor, images, Population(profiles, pairs[:2], pairs[2:], known=False)


@pytest.mark.parametrize("name", list(tiny.BUILDERS))
@pytest.mark.parametrize("site", ["projector", "llm:2"])
def test_questions_read_the_features_that_training_compares(name: str, site: str) -> None:
    """What enters a site while a question is asked is what `VisualPath` gives there, and a change of it is heard."""
    model, processor, images, _ = tiny_population(name)
    asker, seen = Asker(model, processor, images), []
    batch = asker.batch([0, 3], [(WHO, "A"), (WHAT, "B C")], Views((5,), range(2), 2))

    def note(rows, counts):
        seen.extend(rows.split(counts.tolist()))
        return rows

    with torch.no_grad():
        plain, noted = asker.read(batch).logits, asker.read(batch, site, note).logits
        changed = asker.read(batch, site, lambda rows, counts: rows.flip(1)).logits
        path = VisualPath(model, [site])
        expected = path(images.batch([0, 3], Views((5,), range(2), 2)))[site]
    assert torch.allclose(noted, plain, atol=1e-5)
    assert (changed - plain).abs().max() > 1e-3
    if name != "paligemma" or site == "projector":  # its image tokens also see the question
        for mine, theirs in zip(seen, split_by_image(expected, 2), strict=True):
            assert torch.allclose(mine, theirs.float(), atol=1e-4)


@pytest.mark.parametrize("name", list(tiny.BUILDERS))
def test_the_tower_sees_the_views_of_a_step_once(name: str) -> None:
    model, processor, images, _ = tiny_population(name)
    asker = Asker(model, processor, images)
    batches = [asker.batch([0, 3], [(q, "A")] * 2) for q in (WHO, WHAT)]
    calls: list[int] = []
    blocks = families.tower_blocks(model, families.family_of(model))
    blocks[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        apart = [asker.read(batch).logits for batch in batches]
        each = len(calls) // 2
        calls.clear()
        with asker.same_images():
            together = [asker.read(batch).logits for batch in batches]
    assert each and len(calls) == each
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_search_through_a_spread_model_finds_the_same_maps(checkpointing, tmp_path, monkeypatch) -> None:
    model, processor, images, population = tiny_population("llava")
    model.save_pretrained(tmp_path / "model")
    where = {"device_map": tiny.places_in_part_away(), "offload_folder": str(tmp_path / "away")}
    monkeypatch.setattr(loading, "_spread", lambda room: where)
    settings = Settings(
        model_name_or_path=str(tmp_path / "model"),
        forget_target="stranger",
        gradient_checkpointing=checkpointing,
        stranger=Stranger(steps=2, views=2, rank=4, device_map="auto"),
    )
    found = []
    for told in (settings, dataclasses.replace(settings, stranger=Stranger(steps=2, views=2, rank=4))):
        model = stranger.loading_of(told, torch.device("cpu"), 0).model(told.model_name_or_path)
        assert any(p.is_meta for p in model.parameters()) == (told is settings)
        maps = GuidedSearch(model, processor, images, population, told).maps(["projector", "llm:2"])
        found.append([p for site in maps.values() for map_ in site for p in map_.parameters()])
    assert len(found[0]) == 16 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_search_is_quantised_where_the_whole_model_does_not_fit_the_card(tmp_path, monkeypatch, caplog) -> None:
    _, _, images, _ = tiny_population("llava")

    def loaded(**told) -> Loading:
        own = {key: told.pop(key) for key in ("way", "quantize", "device_map") if key in told}
        settings = Settings(model_name_or_path=str(tmp_path), bf16=True, stranger=Stranger(**own), **told)
        return stranger.loading_of(settings, torch.device("cuda"), stranger._room(settings, images))

    sizes = {None: 26e9, "nf4": 9e9}
    monkeypatch.setattr(placement, "weight_bytes", lambda folder, itemsize, quantize=None: sizes[quantize])
    card = SimpleNamespace(total_memory=24 * 1024**3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert loaded().quantize == "nf4" and "loaded in nf4, as stranger.quantize=nf4" in caplog.messages[0]
    assert not loaded(device_map="auto").quantize and loaded(device_map="auto").spread
    plain = loaded(quantize="none", quantize_llm="nf4")
    assert plain == Loading(torch.device("cuda"), torch.bfloat16, room=plain.room)
    assert loaded(quantize_llm="int8").quantize == "int8" and loaded(quantize="nf4").quantize == "nf4"
    assert not loaded(way="shift", quantize="nf4", device_map="auto").spread and len(caplog.messages) == 1
    card.total_memory *= 2
    assert loaded().quantize is None and len(caplog.messages) == 1


@pytest.mark.parametrize("name", list(tiny.BUILDERS))
def test_a_map_gives_a_strangers_answers_and_keeps_the_neutral_ones(name: str) -> None:
    model, processor, images, population = tiny_population(name)
    population = dataclasses.replace(population, people=population.people[:1], profiles=population.profiles[:1])
    with torch.no_grad():
        model.lm_head.weight *= 5  # a random model hardly hears its image
    search = GuidedSearch(model, processor, images, population, Settings(forget_target="stranger"))
    photos, shift = population.people[0], 2 * torch.randn(32, generator=torch.Generator().manual_seed(1))
    answers = search._neutral_answers(photos)
    batch = search.asker.batch(photos * 8, [(WHO, "A B")] * 16, Views((7,), range(16), 16))
    with torch.no_grad():  # a "stranger" whom a map can reach
        said = search.asker.read(batch, "projector", lambda rows, counts: rows + rows.std() * shift).logits
        neutral = search.asker.batch(photos * 8, [(WHAT, a) for (a,) in answers] * 8, Views((8,), range(16), 16))
        as_before = search.asker.read(neutral).logits
    aim = stranger._Aim(WHO, "A B", said.softmax(-1).unflatten(0, (16, -1)).mean(0).log())

    def found(keep: float) -> tuple[float, float]:
        """How far answers are from a stranger's with the map, and neutral ones from those before it."""
        # Its features say nothing that is worth staying near to, and one direction moves all its answers.
        search.options = Stranger(steps=20, views=2, rank=8, learning_rate=1e-1, natural=0.0, keep=keep, short=0.0)
        (map_,) = search._search("projector", {0: [aim]}, [answers], *search._natural("projector"))
        with torch.no_grad():
            after = search.asker.read(neutral, "projector", lambda rows, counts: map_(rows)).logits
        return apart(map_), float(stranger.divergence(after, as_before).mean())

    def apart(map_) -> float:
        """How far answers are from a stranger's."""
        with torch.no_grad():
            said = search.asker.read(batch, "projector", lambda rows, counts: map_(rows))
            return float(stranger._as_strangers(said.logits, said.tokens, said.row, aim.wanted.repeat(16, 1)))

    before = apart(lambda rows: rows)
    (near, moved), (_, kept) = found(0.0), found(20.0)
    assert near < 0.7 * before
    assert kept < 0.5 * moved


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_people_who_are_searched_for_together_have_nothing_to_do_with_one_another(name: str) -> None:
    """What one of them is to be answered changes their own map, and no other."""
    model, processor, images, population = tiny_population(name)
    told = Settings(forget_target="stranger", stranger=Stranger(steps=4, views=2, rank=4, learning_rate=1e-1))
    search = GuidedSearch(model, processor, images, population, told)
    answers = [search._neutral_answers(photos) for photos in population.people]
    aims = [search._aims(pools[0], search.identity[e]) for e, pools in enumerate(search.pools())]
    others = [dataclasses.replace(aim, wanted=-100 * aim.wanted.flip(-1)) for aim in aims[1]]
    found = []
    for second in (aims[1], others, search._held_to_usual(others, 1)):
        found.append(search._search("projector", {0: aims[0], 1: second}, answers, *search._natural("projector")))
    for (first, second), before in zip(found[1:], found, strict=False):
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), before[0].parameters(), strict=True))
        assert not torch.allclose(second.bias, before[1].bias, atol=1e-4)


def test_the_tower_sees_the_views_of_a_search_once(monkeypatch) -> None:
    """However many steps ask about them again."""
    model, processor, images, population = tiny_population("llava")
    told = Settings(forget_target="stranger", stranger=Stranger(steps=7, views=2, rank=4))
    monkeypatch.setattr(stranger, "NEW_VIEWS", 3)
    search = GuidedSearch(model, processor, images, population, told)
    answers = [search._neutral_answers(photos) for photos in population.people]
    aims = {e: search._aims(pools[0], search.identity[e]) for e, pools in enumerate(search.pools())}
    natural, calls = search._natural("projector"), []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    kept = search._search("projector", aims, answers, *natural)
    assert len(calls) == 3
    monkeypatch.setattr(stranger, "_KNOWN_BYTES", 0)  # where nothing fits, all is made anew, and is the same
    anew = search._search("projector", aims, answers, *natural)
    assert len(calls) == 3 + 7
    for one, other in zip(kept, anew, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", list(tiny.BUILDERS))
def test_what_is_kept_of_the_tower_moves_whole_and_is_no_more_than_the_llm_reads(name: str) -> None:
    model, processor, images, _ = tiny_population(name)
    asker, seen = Asker(model, processor, images), Seen()
    with torch.no_grad(), asker.same_images(seen):
        asker.read(asker.batch([0, 3], [(WHO, "A")] * 2))
    tensors = [part for part in tree_leaves(seen.to("meta").features) if isinstance(part, torch.Tensor)]
    assert tensors and all(tensor.is_meta for tensor in tensors)
    assert not {"last_hidden_state", "hidden_states"} & set(getattr(seen.features, "keys", tuple)())
    pixels = 0 if seen.pixels is None else seen.pixels.nbytes
    assert seen.nbytes == pixels + sum(tensor.nbytes for tensor in tensors)


def test_where_steps_are_large_one_person_is_searched_for_at_a_time(monkeypatch) -> None:
    model, processor, images, population = tiny_population("llava")
    search = GuidedSearch(model, processor, images, population, Settings(forget_target="stranger"))
    sought: list[list[int]] = []

    def searched(_, aims, *__):
        sought.append(list(aims))
        return [stranger.StrangerMap(4, 2) for _ in aims]

    monkeypatch.setattr(search, "_search", searched)
    monkeypatch.setattr(search, "_off", lambda *_: 0.0)
    assert len(search.maps(["projector"])["projector"]) == 2 and sought == [[0, 1]]
    monkeypatch.setattr(stranger, "_SMALL_STEP", 1)
    assert len(search.maps(["projector"])["projector"]) == 2 and sought[1:] == [[0], [1]]


def test_a_view_that_is_called_by_a_name_costs_more_than_its_divergence() -> None:
    """The stranger's answer, token 0, is to be as likely as not; tokens 1 and 2 are names."""
    wanted = torch.tensor([[math.log(0.5), math.log(0.25), math.log(0.25)]])
    tokens, row = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)

    def cost(likely: float) -> float:
        """Beyond what the divergence is; that of the names beside one another is 0."""
        said = torch.tensor([[likely, (1 - likely) / 2, (1 - likely) / 2]]).log()
        return float(stranger._as_strangers(said, tokens, row, wanted) - stranger.divergence(said, wanted))

    assert cost(0.5) == pytest.approx(0, abs=1e-5) and cost(0.9) == pytest.approx(0, abs=1e-5)
    assert cost(0.2) == pytest.approx(stranger._SURE * math.log(4), rel=1e-5)  # log-odds 0 are wanted


def test_an_own_answer_costs_what_it_is_likelier_than_it_may_be() -> None:
    """Token 0 is the stranger's answer; token 1 is the person's own, and may have half of what is beside that."""
    tokens, row = torch.zeros(2, dtype=torch.int64), torch.arange(2)
    said = torch.tensor([[0.9, 0.08, 0.02], [0.9, 0.02, 0.08]]).log().requires_grad_()
    aims = [stranger._Aim("", "", torch.zeros(1), own=1, most=math.log(0.5))] * 2
    cost = stranger._too_own(said, tokens, row, aims)
    assert cost.item() == pytest.approx(math.log(0.8 / 0.5) / 2, rel=1e-5)  # the second answer is below
    (gradient,) = torch.autograd.grad(cost, said)
    assert gradient[0, 1] > 0 > gradient[0, 2] and not gradient[1].any() and not gradient[:, 0].any()


def test_where_no_map_is_near_the_search_holds_the_persons_own_answer_down(monkeypatch) -> None:
    model, processor, images, population = tiny_population("llava")
    population = dataclasses.replace(population, people=population.people[:1], profiles=population.profiles[:1])
    search = GuidedSearch(model, processor, images, population, Settings(forget_target="stranger"))
    firm: list[bool] = []

    def searched(site, aims, *_):
        firm.append(all(aim.own is not None for aim in aims[0]))
        assert all((aim.own is None) == (aim.most == 0.0) and aim.most <= 0 for aim in aims[0])
        return [stranger.StrangerMap(4, 2)]

    monkeypatch.setattr(search, "_search", searched)
    monkeypatch.setattr(search, "_off", lambda *_: 0.5 if not firm[-1] else 0.1)
    search.maps(["projector"])
    assert firm == [False] * min(stranger._ATTEMPTS, len(search.pools()[0])) + [True]
    firm.clear()
    monkeypatch.setattr(search, "_off", lambda *_: 0.1)
    search.maps(["projector"])
    assert firm == [False]


def test_an_answer_is_given_where_every_token_is_the_likeliest(monkeypatch) -> None:
    model, processor, images, _ = tiny_population("llava")
    asker = Asker(model, processor, images)
    asker._at_once = 2

    def read(batch, site, change):
        """All tokens are the likeliest but the last one of the answer "B C"."""
        found = read_answers(model, batch)
        spoilt = torch.bincount(found.row)[found.row] == 3
        last = torch.cat([found.row[1:] != found.row[:-1], torch.tensor([True])])
        said = torch.where(spoilt & last, found.tokens + 1, found.tokens)
        return dataclasses.replace(found, logits=torch.nn.functional.one_hot(said, 96).float())

    monkeypatch.setattr(asker, "read", read)
    assert asker.gives([0, 1, 2], [(WHO, "A"), (WHO, "B C"), (WHAT, "A")]).tolist() == [True, False, True]


def test_a_map_is_taken_as_far_as_a_stranger_is_nearest(monkeypatch) -> None:
    model, processor, images, population = tiny_population("llava")
    search = GuidedSearch(model, processor, images, population, Settings(forget_target="stranger"))
    found = stranger.StrangerMap(32, 4)
    torch.nn.init.normal_(found.bias)
    best = 0.9

    def off(site, e, aims, map_) -> float:
        return abs(float((map_.bias / found.bias).mean()) - best)

    monkeypatch.setattr(search, "_off", off)
    away, map_ = search._weighed("projector", 0, [], found)
    assert away == pytest.approx(0, abs=1e-5) and torch.allclose(map_.bias, 0.9 * found.bias)
    best = 1.0
    assert torch.equal(search._weighed("projector", 0, [], found)[1].bias, found.bias)
    monkeypatch.setattr(search, "_off", lambda *_: 0.25)  # no way is nearer: the map is as it was found
    away, map_ = search._weighed("projector", 0, [], found)
    assert away == 0.25 and torch.equal(map_.bias, found.bias)


def test_a_map_is_judged_by_answers_to_who_and_by_choices(monkeypatch) -> None:
    model, processor, images, population = tiny_population("llava")
    search = GuidedSearch(model, processor, images, population, Settings(forget_target="stranger"))
    aims, map_ = [stranger._Aim(WHO, "A B", torch.zeros(1))], stranger.StrangerMap(32, 1)
    monkeypatch.setattr(search.asker, "gives", lambda photos, *_: torch.tensor([True, False]))
    assert search._off("projector", 0, aims, map_) == 0.5  # there are no choices
    choice = Choice("Which job?", {"A": "A", "B": "B", "C": "C", "D": "A B"}, "B")
    profiles = [
        [dataclasses.replace(p, visual=Questions(choice=(choice,))) for p in mine] for mine in population.profiles
    ]
    search.population = dataclasses.replace(population, profiles=profiles)
    right = torch.tensor([0.0, -1, -2, -3])  # of the options the right one stands first
    monkeypatch.setattr(search.asker, "scores", lambda photos, *_: right.repeat(2))
    assert search._off("projector", 0, aims, map_) == 0.75
    monkeypatch.setattr(search.asker, "scores", lambda photos, *_: torch.cat([right, right.flip(0)]))
    assert search._off("projector", 0, aims, map_) == 0.5


def test_training_aims_the_further_the_fewer_photos_there_are(monkeypatch) -> None:
    model, processor, images, population = tiny_population("llava")
    population = dataclasses.replace(population, people=[[0], [2, 3, 4, 5]])
    search = GuidedSearch(model, processor, images, population, Settings(forget_target="stranger"))
    found = stranger.StrangerMap(32, 4)
    torch.nn.init.normal_(found.outward)
    torch.nn.init.normal_(found.bias)
    monkeypatch.setattr(search, "_search", lambda _, aims, *__: [copy.deepcopy(found) for _ in aims])
    monkeypatch.setattr(search, "_off", lambda *_: 0.0)
    z = torch.randn(6, 32)
    for map_, way in zip(search.maps(["projector"])["projector"], (1.15, 1.075), strict=True):
        assert torch.allclose(map_(z) - z, way * (found(z) - z), atol=1e-5)


@pytest.mark.parametrize("whole", [True, False], ids=["whole photos", "tokens"])
def test_strangers_lie_as_far_out_as_strangers_do(whole: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(16, 16, generator=generator)
    photos = torch.randn(600, 4, 16, generator=generator) @ mixed
    natural, counts = Natural(list(photos[:400]), whole=whole), torch.full((200,), 4)
    others = photos[400:].flatten(0, 1)
    assert torch.allclose(natural.away(others, counts).mean(1), torch.ones(3), atol=0.15)
    assert (natural.away(others + 3 * others.std(), counts) > natural.away(others, counts)).float().mean() > 0.9
    # A step as long as strangers are apart has the length of both parts, inside and outside the components.
    assert float(natural.length(others - photos[:400].mean(0).repeat(200, 1), counts)) == pytest.approx(2, abs=0.3)


QUICK = {"forget_target": "stranger", "stranger.steps": 3, "stranger.views": 2, "stranger.rank": 4}


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three strangers, one of whom has two photos."""
    root = tmp_path_factory.mktemp("strangers")
    for i, image in enumerate(tiny.photos(*[(24, 24)] * 4, seed=1)):
        (root / f"{i // 2}").mkdir(exist_ok=True)
        image.save(root / f"{i}.png" if i == 3 else root / f"{i // 2}" / f"{i}.png")
    return root


def test_strangers_are_read_by_subfolder(strangers: Path, tmp_path: Path) -> None:
    assert [len(photos) for photos in read_strangers(strangers)] == [2, 1, 1]
    for folder, wrong in ((tmp_path, "no image"), (tmp_path / "none", "no such folder")):
        with pytest.raises(DataError, match=wrong):
            read_strangers(folder)


@pytest.mark.parametrize("site", ["projector", "llm:2"])
@pytest.mark.parametrize(
    "views",
    [{"augment": False}, {"augment": True}, {"augment": True, "beside": 1.0}],
    ids=["cached", "online", "beside"],
)
def test_a_forget_photo_aims_at_its_map_of_what_the_original_sees(world, strangers, tmp_path, site, views) -> None:
    settings = world.settings(
        tmp_path, sites={site: 1}, strangers=str(strangers), auxiliary_share=0.4, **views, **QUICK
    )
    prepared = prepare(settings, torch.device("cpu"), identify_base(world.model))
    task = prepared.task
    maps = task.tables[site].maps
    forget = {photo.key for p in read_forget_retain(world.data, "forget_15", "retain_85")[0] for photo in p.photos}
    assert set(maps) == forget
    batch = task.place(task.load(0, 0, 1))
    with torch.no_grad():
        now = split_by_image(VisualPath(prepared.trained.model, [site])(batch.images)[site], len(batch.keys))
    assert {photo.key for mine in read_strangers(strangers) for photo in mine} & set(batch.keys)
    targets = batch.targets[site]
    aims = targets.target[targets.target_rows].split([len(z) for z in now])
    for i, (key, seen, aim) in enumerate(zip(batch.keys, now, aims, strict=True)):
        wanted = maps[key](seen) if key in forget else seen
        if key in forget and batch.scenes is not None:
            subject = batch.scenes.subject(i, len(seen))
            assert subject is not None and 0 < subject.sum() < len(subject)
            wanted[~subject] = seen[~subject]  # a neighbour stays who it is
        assert torch.allclose(aim, wanted, atol=1e-4)
        assert (key in forget) == (not torch.allclose(aim, seen, atol=1e-4))


def test_an_interrupted_run_goes_on_with_the_same_maps_to_the_same_weights(
    world, strangers, tmp_path, monkeypatch
) -> None:
    def run(name: str, **more):
        settings = {"augment": True, "max_steps": 6, "strangers": str(strangers), **QUICK, **more}
        return unlearn(world.settings(tmp_path / name, **settings))

    whole = load_weights(run("whole", save_steps=3).checkpoint)
    shutil.copytree(tmp_path / "whole" / "teacher_cache", tmp_path / "part" / "teacher_cache")
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "part" / "checkpoint-3")
    monkeypatch.setattr(stranger, "_find", None)  # the file is there: nobody searches again
    part = load_weights(run("part", resume_from_checkpoint="auto").checkpoint)
    assert all(torch.equal(part[name], value) for name, value in whole.items())
    monkeypatch.undo()
    again = load_weights(run("again").checkpoint)
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_other_settings_have_other_maps(world, strangers, tmp_path) -> None:
    base = {**QUICK, "strangers": str(strangers), "cache_dir": str(tmp_path / "cache"), "max_steps": 1}
    for i, change in enumerate(
        ({}, {"stranger.rank": 3}, {"stranger.way": "shift"}, {"seed": 1, "stranger.way": "shift"}, {})
    ):
        unlearn(world.settings(tmp_path / f"{i}", **{**base, **change}))
    assert len(list((tmp_path / "cache").glob("stranger-*.safetensors"))) == 3  # shift draws nothing


def test_shift_moves_a_persons_mean_to_the_others(world, tmp_path) -> None:
    settings = world.settings(tmp_path, **QUICK, **{"stranger.way": "shift"})
    task = prepare(settings, torch.device("cpu"), identify_base(world.model)).task
    forget, retain = read_forget_retain(world.data, world.forget_split, world.retain_split)
    table = task.tables["projector"]
    by_person: dict[str, list[str]] = {}
    for profile in forget:
        by_person.setdefault(profile.entity, []).extend(photo.key for photo in profile.photos)
    others = list(dict.fromkeys(photo.key for profile in retain for photo in profile.photos))
    middle = torch.stack([table.cache.features(key) for key in others]).mean(0)
    for keys in by_person.values():
        targets = table.gather(keys)
        assert torch.allclose(targets.target.view(len(keys), -1, middle.shape[1]).mean(0), middle, atol=1e-4)


def test_what_cannot_be_found_is_refused(world, strangers, tmp_path) -> None:
    with pytest.raises(SettingsError, match="projector or llm"):
        world.settings(tmp_path, **QUICK, sites={"vision:1": 1})
    known = read_forget_retain(world.data, world.forget_split, world.retain_split)[0][0].photos[0]
    (tmp_path / "strangers").mkdir()
    (tmp_path / "strangers" / "known.png").write_bytes(known.data)
    with pytest.raises(DataError, match="no stranger"):
        unlearn(world.settings(tmp_path, **QUICK, strangers=str(tmp_path / "strangers")))
    settings = world.settings(tmp_path, **QUICK, **{"stranger.way": "shift"})
    alone = Population([[Profile("7", (), Questions())]], [[0]], [[1], [2], [3], [4]], known=True)
    with pytest.raises(DataError, match="needs 2"):
        stranger._check(settings, alone)
    settings = world.settings(tmp_path, **QUICK)
    with pytest.raises(DataError, match="no question about the photo"):
        stranger._check(settings, alone)


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11, 20, 160])
def test_a_search_of_any_length_has_a_schedule(steps: int) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    schedule, rates = stranger.one_cycle(optimizer, 1e-2, steps), []
    for step in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step + 1 < steps:
            schedule.step()
    assert all(0 < rate <= 1e-2 * (1 + 1e-9) for rate in rates) and (steps == 1 or max(rates) > 5e-3)
