"""Requests that keep coming: a model remembers whom it was made to forget, and no name, id or photo of them."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from fastvkd.cli import main
from fastvkd.data import mllmu
from fastvkd.engines.checkpoints import find_latest
from fastvkd.engines.exporting import edited_of, export, history_of, read_record
from fastvkd.engines.manifests import read_manifest
from fastvkd.engines.requests import Request, found_in, judged, note_of, requests_of
from fastvkd.errors import AlreadyForgotten, DataError, ModelError
from fastvkd.records import Photo, Profile
from fastvkd.reporting.model_card import run_card
from fastvkd.settings import load_settings
from fastvkd.unlearning.loop import unlearn


def known_to(world) -> list[Profile]:
    """Everybody's photos, by id."""
    return sorted(mllmu.read_split(world.data, "Full_Set"), key=lambda profile: profile.entity)


@pytest.fixture(scope="module")
def people(world) -> list[str]:
    return list(dict.fromkeys(profile.entity for profile in known_to(world)))


def write_request(world, folder: Path, forget: list[str], retain: list[str]) -> Path:
    """Data in which exactly these people are to be forgotten and to be kept."""
    everybody = known_to(world)
    for split, chosen in (("forget_now", forget), ("retain_now", retain)):
        mllmu.write_split(folder, split, [profile for profile in everybody if profile.entity in chosen])
    return folder


def overrides(world, out: Path, model: Path, data: Path, **changes):
    told = {"model_name_or_path": str(model), "data": str(data), "max_steps": 1}
    return world.settings(out, **told, forget_split="forget_now", retain_split="retain_now", **changes)


def forget(world, out: Path, model: Path, data: Path, **changes) -> Path:
    """The folder of the model after one more request."""
    unlearn(overrides(world, out / "run", model, data, **changes))
    return export(out / "run", out / "model", model_card=run_card(out / "run")).folder


@pytest.fixture(scope="module")
def chain(world, people, tmp_path_factory) -> dict[str, Path]:
    """A model after a request about two people and another about one, and the data of both."""
    root = tmp_path_factory.mktemp("chain")
    first = write_request(world, root / "first", people[:2], people[2:])
    second = write_request(world, root / "second", people[2:3], people[3:])
    once = forget(world, root / "1", world.model, first)
    paper = json.dumps({"verdict": "incomplete", "forgotten": {"entities": 2}})
    (once / "certificate.json").write_text(paper)
    return {"first": first, "second": second, "once": once, "twice": forget(world, root / "2", once, second)}


def arguments(settings) -> list[str]:
    keys = ("model_name_or_path", "data", "forget_split", "retain_split", "output_dir", "max_steps", "device")
    return ["train", *(f"{key}={getattr(settings, key)}" for key in keys), "per_device_train_batch_size=6"]


@pytest.fixture
def nothing_is_loaded(monkeypatch) -> None:
    monkeypatch.setattr("fastvkd.unlearning.tasks.load_model", lambda *_, **__: pytest.fail("the model was loaded"))


class TestTheRecord:
    def test_travels_with_the_model_and_names_nobody(self, world, people, chain) -> None:
        requests = requests_of(chain["twice"])
        assert [(len(one.entities), one.certificate) for one in requests] == [(2, "incomplete"), (1, None)]
        assert requests_of(chain["once"]) == requests[:1] and requests_of(world.model) == []
        photos = {photo.key for one in mllmu.read_split(chain["first"], "forget_now") for photo in one.photos}
        assert len(requests[0].photos) == len(photos)
        noted = read_record(chain["twice"])["forgotten"]
        names = {one.name for one in mllmu.read_split(chain["first"], "forget_now")}
        written = (chain["twice"] / "unlearning.json").read_text()
        assert not [text for text in {*names, *photos} if text in written]
        assert set(noted) == {"date", "salt", "entities", "photos", "data_sha256"}
        assert not set(noted["entities"]) & {person for person in people}

    def test_tells_who_is_meant_and_whom_it_cannot_be(self, world, people, chain) -> None:
        everybody = known_to(world)
        first, second = requests_of(chain["twice"])
        told = {one.entity: (first.told_by(one), second.told_by(one)) for one in everybody}
        assert [told[person] for person in people[:4]] == [("id", None), ("id", None), (None, "id"), (None, None)]
        other = dataclasses.replace(everybody[0], entity="somebody")
        assert first.told_by(other) == "photo"  # under another id
        assert first.told_by(dataclasses.replace(other, photos=everybody[-1].photos)) is None

    def test_ids_are_compared_as_everywhere(self) -> None:
        photo = Photo(b"photo", "photo")
        note = note_of([Profile("007", (photo,)), Profile("text alone", ())], {"base": "b", "data": "d"})
        record = {"settings": {"forget_split": "forget_5"}, "forgotten": note}
        assert len(note["entities"]) == 1  # what has no photo cannot be recognised
        request = Request.of(1, record)
        assert request.told_by(Profile("7", ())) == request.told_by(Profile("07", ())) == "id"
        assert request.told_by(Profile("77", ())) is None

    def test_a_resumed_run_notes_the_same_and_another_request_another_salt(self, world, chain, tmp_path) -> None:
        settings = overrides(world, tmp_path / "run", world.model, chain["first"])
        unlearn(settings)
        before = read_manifest(find_latest(tmp_path / "run"))["forgotten"]
        unlearn(dataclasses.replace(settings, max_steps=2, resume_from_checkpoint="auto"))
        after = read_manifest(find_latest(tmp_path / "run"))
        assert after["updates"] == 2 and after["forgotten"] == before
        salts = [one.salt for one in requests_of(chain["twice"])]
        assert salts[0] == before["salt"] != salts[1]

    def test_a_run_that_forgets_nobody_is_no_request_and_passes_them_on(self, world, people, chain, tmp_path) -> None:
        more = {"method": "finetune", "finetune_split": "retain_now"}
        model = forget(world, tmp_path, chain["twice"], chain["second"], **more)
        assert len(history_of(model)) == 3 and requests_of(model) == requests_of(chain["twice"])
        again = write_request(world, tmp_path / "again", people[:1], people[3:])
        shutil.move(again / "forget_now", again / "taught")
        with pytest.raises(DataError, match=r"request 1 .* had the model forget it"):
            forget(world, tmp_path / "no", model, again, method="finetune", finetune_split="taught")

    def test_names_every_tensor_of_the_llm_that_a_scrub_of_any_request_changed(self, chain, tmp_path) -> None:
        model = shutil.copytree(chain["twice"], tmp_path / "model")
        record = json.loads((model / "unlearning.json").read_text())
        assert edited_of(model) == []
        record["history"][0]["edited"], record["edited"] = ["b.weight", "a.weight"], ["c.weight", "a.weight"]
        (model / "unlearning.json").write_text(json.dumps(record))
        assert edited_of(model) == ["a.weight", "b.weight", "c.weight"]
        record["history"][0]["edited"] = 3
        (model / "unlearning.json").write_text(json.dumps(record))
        with pytest.raises(ModelError, match=r"what it notes of edits cannot be read .* export the run again"):
            edited_of(model)

    def test_of_an_earlier_version_is_listed_and_warned_of(self, world, chain, tmp_path, capsys, caplog) -> None:
        model = tmp_path / "model"
        shutil.copytree(chain["once"], model)
        record = json.loads((model / "unlearning.json").read_text())
        del record["forgotten"]
        (model / "unlearning.json").write_text(json.dumps(record))
        assert main(["requests", str(model)]) == 0
        assert "date unknown  noted without hashes by an earlier version" in capsys.readouterr().out
        unlearn(overrides(world, tmp_path / "run", model, chain["first"]))
        assert "an earlier request was noted without hashes" in caplog.text

    @pytest.mark.parametrize("damage", [{"salt": "xyz"}, {"entities": None}, {"photos": 3}, None])
    def test_that_is_damaged_is_refused_in_one_line(self, chain, tmp_path, capsys, damage) -> None:
        record = json.loads((chain["once"] / "unlearning.json").read_text())
        record["forgotten"] = {} if damage is None else record["forgotten"] | damage
        (tmp_path / "unlearning.json").write_text(json.dumps(record))
        assert main(["requests", str(tmp_path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "unlearning.json: what it notes of a request cannot be read" in line


class TestTheVerb:
    def test_lists_a_line_a_request(self, chain, capsys) -> None:
        assert main(["requests", str(chain["twice"])]) == 0
        first, second = capsys.readouterr().out.splitlines()
        assert first.startswith("request 1  20") and "2 entities, 4 photos, data " in first
        assert first.endswith("method vkd, certificate incomplete") and second.endswith("no certificate")

    def test_says_that_there_is_none(self, world, capsys) -> None:
        assert main(["requests", str(world.model)]) == 0
        assert capsys.readouterr().out == f"{world.model}: no request to forget in its record\n"
        assert main(["requests", str(world.model / "nowhere")]) == 2
        assert "no such folder" in capsys.readouterr().err

    def test_finds_the_forgotten_in_data(self, world, people, chain, capsys) -> None:
        told = ["requests", str(chain["twice"]), "--data", str(world.data)]
        assert main(told) == 0
        lines = capsys.readouterr().out.splitlines()[2:]
        assert lines[0].startswith(f"{world.data}: 3 of ") and len(lines) == 4
        assert [line.split()[0] for line in lines[1:]] == people[:3]
        assert all("Full_Set" in line and "Test_Set" in line for line in lines[1:])
        assert main([*told, "--split", "Test_Set", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert [one["entities"] for one in found["requests"]] == [2, 1]
        assert found["found"][2] == {"entity": people[2], "request": 2, "told_by": "id", "splits": ["Test_Set"]}
        assert main([*told, "--split", "Retain_Set"]) == 0
        assert ": 0 of " in capsys.readouterr().out

    def test_refuses_a_split_that_is_not_there(self, world, chain, capsys) -> None:
        assert main(["requests", str(chain["once"]), "--split", "forget_5"]) == 2
        assert "give --data too" in capsys.readouterr().err
        assert main(["requests", str(chain["once"]), "--data", str(world.data), "--split", "forget_77"]) == 2
        assert "no split 'forget_77'; there are " in capsys.readouterr().err

    def test_one_row_by_id_outweighs_others_by_photo(self, world, people, chain) -> None:
        profile = known_to(world)[0]
        other = dataclasses.replace(profile, entity="x")
        found = found_in(requests_of(chain["once"]), {"a": [other], "b": [profile, other]})
        assert [(one["entity"], one["told_by"], one["splits"]) for one in found] == [
            (people[0], "id", ["b"]),
            ("x", "photo", ["a", "b"]),
        ]


class TestTheNextRequest:
    @pytest.mark.parametrize("dry", [True, False])
    def test_keeps_nobody_who_was_forgotten(
        self, world, people, chain, tmp_path, capsys, nothing_is_loaded, dry
    ) -> None:
        data = write_request(world, tmp_path / "data", people[4:5], [people[1], *people[5:]])
        told = arguments(overrides(world, tmp_path / "out", chain["twice"], data))
        assert main([*told, *(["--dry-run"] if dry else [])]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"entity {people[1]!r} is to be kept, but request 1 (20" in line and "told by its id" in line
        assert not (tmp_path / "out").exists()

    def test_finds_them_under_another_id_too(self, world, people, chain, tmp_path, nothing_is_loaded) -> None:
        everybody = known_to(world)
        data = write_request(world, tmp_path / "data", people[4:5], people[5:])
        kept = [one for one in everybody if one.entity in people[5:]]
        hidden = [dataclasses.replace(one, entity="999") for one in everybody if one.entity == people[2]]
        mllmu.write_split(data, "retain_now", kept + hidden)
        with pytest.raises(DataError, match=r"entity '999' is to be kept, but request 2 \(.*told by one of its photos"):
            unlearn(overrides(world, tmp_path / "out", chain["twice"], data))

    @pytest.mark.parametrize("dry", [True, False])
    def test_asked_twice_is_nothing_to_do(self, world, chain, tmp_path, capsys, nothing_is_loaded, dry) -> None:
        told = arguments(overrides(world, tmp_path / "out", chain["twice"], chain["first"]))
        assert main([*told, *(["--dry-run"] if dry else [])]) == 2  # its retain set has somebody of the second request
        assert "request 2" in capsys.readouterr().err
        told = arguments(overrides(world, tmp_path / "out", chain["once"], chain["first"]))
        assert main([*told, *(["--dry-run"] if dry else [])]) == 0
        said = capsys.readouterr()
        (line,) = said.out.splitlines()
        assert line.startswith("nothing to do: the whole forget set, 2 entities with all photos, was forgotten by ")
        assert "request 1 (20" in line and "certificate incomplete" in line and not said.err
        assert not (tmp_path / "out").exists()

    def test_asked_in_two_requests_is_nothing_to_do_either(self, world, people, chain, tmp_path) -> None:
        data = write_request(world, tmp_path / "data", people[1:3], people[3:])
        with pytest.raises(AlreadyForgotten, match=r"by request 1 \(.*; request 2 \("):
            unlearn(overrides(world, tmp_path / "out", chain["twice"], data))

    def test_asked_in_part_goes_on_and_counts(self, world, people, chain, tmp_path, capsys, caplog) -> None:
        data = write_request(world, tmp_path / "data", people[1:5], people[5:])
        settings = overrides(world, tmp_path / "out", chain["twice"], data)
        assert main([*arguments(settings), "--dry-run"]) == 0
        said = capsys.readouterr().out
        assert "asked again: 2 of 4 entities are new, 2 forgotten before; see request 1 (" in said
        assert "earlier request 1  20" in said and "earlier request 2  20" in said
        assert unlearn(settings).steps == 1
        assert caplog.text.count("asked again: 2 of 4 entities are new") == 1

    def test_the_same_id_in_new_photos_is_not_the_same_request(self, world, people, chain, tmp_path) -> None:
        """It may be somebody else, or a photo in which the person is still recognised."""
        data = write_request(world, tmp_path / "data", [people[0]], people[3:])
        unseen = [one for one in mllmu.read_split(world.data, "Test_Set") if one.entity == people[0]]
        known = mllmu.read_split(data, "forget_now")
        photos = tuple(photo for one in unseen for photo in one.photos)
        mllmu.write_split(data, "forget_now", [dataclasses.replace(one, photos=photos[:1]) for one in known[:1]])
        model = forget(world, tmp_path, chain["twice"], data)
        assert len(requests_of(model)) == 3

    def test_a_photo_of_two_does_not_stand_for_both(self, world, people, chain, tmp_path) -> None:
        data = write_request(world, tmp_path / "data", [people[0]], people[3:])
        friend = [dataclasses.replace(one, entity="friend") for one in mllmu.read_split(data, "forget_now")]
        mllmu.write_split(data, "forget_now", friend)
        assert unlearn(overrides(world, tmp_path / "out", chain["twice"], data)).steps == 1


def test_an_evaluation_speaks_of_those_whose_photos_it_has(world, people, chain) -> None:
    everybody = known_to(world)
    requests = requests_of(chain["twice"])

    def of(*chosen: str) -> list[bool]:
        found = judged(requests, [one for one in everybody if one.entity in chosen])
        assert [(one["request"], one["entities"]) for one in found] == [(1, 2), (2, 1)]
        return [one["judged"] for one in found]

    assert of(*people[:3]) == [True, True] and of(people[2]) == [False, True]
    assert of(people[0], people[2]) == [False, True]  # one of two is not enough
    texts = [dataclasses.replace(one, photos=()) for one in everybody]
    assert [one["judged"] for one in judged(requests, texts)] == [False, False]
    renamed = [dataclasses.replace(one, entity=f"x{i}") for i, one in enumerate(everybody)]
    assert [one["judged"] for one in judged(requests, renamed)] == [True, True]  # every photo is there


def test_settings_of_the_next_run_are_not_the_last_ones(chain) -> None:
    """The record has settings, and `load_settings` takes none of them from a model."""
    settings = load_settings(None, {"model_name_or_path": str(chain["once"]), "data": "d"})
    assert settings.forget_split == "forget_5"
