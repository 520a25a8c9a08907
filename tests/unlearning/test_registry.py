"""A method is one object: others ask it and compare no names, and a new one is a file and an entry."""

import ast
import dataclasses
import json
import re
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch

import fastvkd
from fastvkd.engines.checkpoints import load_weights
from fastvkd.errors import SettingsError
from fastvkd.methods import METHODS, Method
from fastvkd.models.loading import load_model
from fastvkd.planning.plan import recipe_of
from fastvkd.reporting.model_card import run_card
from fastvkd.settings import Settings
from fastvkd.unlearning.loop import unlearn

PACKAGE = Path(fastvkd.__file__).parent
LOSS = """
class Shrink:
    remembered = 0

    def __init__(self, scale):
        self.scale = scale

    def remember(self, answers):
        Shrink.remembered += int(answers.is_forget.logical_not().sum())

    def __call__(self, answers):
        away = (answers.hidden - 1).square().mean()
        return {"forget": self.scale * away, "retain": answers.cross_entropy(forget=False)}
"""


@pytest.fixture
def shrink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Method:
    """A method that fastvkd does not have: its loss in a file of its own, and its entry."""
    (tmp_path / "shrink_loss.py").write_text(LOSS)
    monkeypatch.syspath_prepend(tmp_path)
    method = Method(
        name="shrink", code="shrink_loss:Shrink", keys=("rmu_scale",), remembers="retain", joins_features=True
    )
    monkeypatch.setitem(METHODS, method.name, method)
    return method


def test_a_new_method_is_a_file_and_an_entry(world, tmp_path: Path, shrink: Method, monkeypatch) -> None:
    settings = world.settings(tmp_path / "run", method="shrink", rmu_scale=2.0, learning_rate=3e-2, max_steps=12)
    result = unlearn(settings)
    lines = [json.loads(line) for line in result.metrics.read_text().splitlines()]
    assert len(lines) == 12 and lines[-1]["loss_answer_forget"] < lines[0]["loss_answer_forget"]
    before, after = load_model(world.model).state_dict(), load_weights(result.checkpoint)
    assert any(not torch.equal(after[name], before[name]) for name in after)
    assert resolve_name(shrink.code).remembered > 0
    assert "by the method `shrink`; only the visual part was changed" in run_card(tmp_path / "run")
    monkeypatch.undo()  # elsewhere nobody may know it
    assert "by the method `shrink`" in run_card(tmp_path / "run")
    with pytest.raises(SettingsError, match="method='shrink'"):
        settings.check()


def test_a_new_method_has_no_plan(world, shrink: Method) -> None:
    settings = world.settings(Path("unused"), method=shrink.name)
    with pytest.raises(SettingsError, match="method=shrink: plans are made for method=vkd"):
        recipe_of(settings, 1)


def test_a_new_method_joins_features_and_takes_a_mask(world, tmp_path: Path, shrink: Method, monkeypatch) -> None:
    mask = {"saliency.granularity": "weight", "saliency.fraction": 0.5, "saliency.batches": 2}
    assert unlearn(world.settings(tmp_path / "beside", answer_loss="shrink")).steps == 4
    assert 0.4 < unlearn(world.settings(tmp_path / "masked", method="shrink", **mask)).trained_share < 0.6
    one_sided = dataclasses.replace(shrink, name="one-sided", sides=("forget",), joins_features=False)
    monkeypatch.setitem(METHODS, one_sided.name, one_sided)
    with pytest.raises(SettingsError, match="method=one-sided: a mask weighs forget against retain"):
        world.settings(tmp_path, method="one-sided", **mask)
    with pytest.raises(
        SettingsError, match="answer_loss='one-sided': allowed are none, ga, gd, kl, npo, undial, idk, shrink"
    ):
        world.settings(tmp_path, answer_loss="one-sided")


@pytest.mark.parametrize("key", ["method", "answer_loss"])
def test_a_name_that_is_none_meets_what_there_is_and_the_nearest(world, key: str) -> None:
    with pytest.raises(SettingsError, match=rf"{key}='npoo': allowed are \w+, ga, .*; did you mean npo\?"):
        world.settings(Path("unused"), **{key: "npoo"})
    with pytest.raises(SettingsError, match=f"{key}='npoo'"):
        dataclasses.replace(world.settings(Path("unused")), **{key: "npoo"}).check()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_what_an_entry_names_is_there(method: Method) -> None:
    settings = Settings(method=method.name)
    made = method.make(settings)
    assert callable(made) and hasattr(made, "remember") == (method.remembers is not None)
    named = {*method.keys, method.split_key, method.layer_key} - {None}
    assert named <= {field.name for field in dataclasses.fields(Settings)}
    assert not method.refusals or all(isinstance(text, str) for text in resolve_name(method.refusals))
    assert method.sides and set(method.sides) <= {"forget", "retain"}


def names_compared_in(source: str) -> list[str]:
    """Comparisons of something called `method` with a method's name, in Python or in a template."""
    found = re.findall(r"\bmethod\b\W{0,3}\s*(?:==|!=)\s*[\"']\w+", source)
    try:
        compared = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Compare)]
    except SyntaxError:
        return found
    for node in compared:
        names = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)} & set(METHODS)
        if names and "method" in ast.unparse(node):
            found.append(ast.unparse(node))
    return found


def test_no_name_is_tested_outside_the_registry() -> None:
    files = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".html", ".md", ".j2")]
    assert PACKAGE / "settings.py" in files
    wrong = {str(path.relative_to(PACKAGE)): names_compared_in(path.read_text()) for path in files}
    assert not any(wrong.values()), {name: found for name, found in wrong.items() if found}
    assert names_compared_in("settings.method == 'vkd'") and names_compared_in(
        'x = settings.get("method") in ("ga", "gd")'
    )
    assert names_compared_in("{% if method != 'vkd' %}") and not names_compared_in("METHODS[settings.method].features")
