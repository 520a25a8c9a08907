"""Settings: what is accepted, what is refused, and that a refusal names the key and the mend."""

from pathlib import Path
from typing import get_args

import pytest

from fastvkd.engines.optimizers import MOMENT_BYTES
from fastvkd.errors import SettingsError
from fastvkd.settings import Optim, Settings, load_settings

BASE = {"model_name_or_path": "m", "data": "d"}


def test_yaml_and_overrides_meet(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model_name_or_path: m\ndata: d\nsites: {llm:8: 2}\nlearning_rate: 1e-5\nsaliency: {fraction: 0.2}\n"
    )
    settings = load_settings(file, ["saliency.granularity=neuron", "max_steps=7", "sites.projector=1"])
    assert settings.sites == {"llm:8": 2.0, "projector": 1.0}
    assert settings.learning_rate == 1e-5  # YAML 1.1 reads 1e-5 as text
    assert (settings.saliency.granularity, settings.saliency.fraction, settings.max_steps) == ("neuron", 0.2, 7)


def test_sites_may_be_a_name_or_a_list() -> None:
    assert load_settings(None, {**BASE, "sites": "llm:3"}).sites == {"llm:3": 1.0}
    assert load_settings(None, {**BASE, "sites": ["projector", "vision:2"]}).sites == {
        "projector": 1.0,
        "vision:2": 1.0,
    }


def test_settings_round_trip() -> None:
    settings = load_settings(None, {**BASE, "saliency.granularity": "weight", "saliency.threshold": 1.0})
    assert load_settings(None, settings.to_dict()) == settings


@pytest.mark.fault("bad input")
@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("lerning_rate=1e-3", "did you mean learning_rate"),
        ("saliency.fractoin=0.1", "did you mean saliency.fraction"),
        ("forget_target=gaussian", "noise, mean, redirect, reference, repel"),
        ("max_steps=many", "max_steps"),
        ("max_steps=true", "max_steps"),
        ("learning_rate=-1", "learning_rate"),
        ("sites={}", "sites"),
        ("sites={llm:2: 0}", "sites.llm:2"),
        ("forget_target=reference", "reference_model"),
        ("saliency.granularity=weight", "saliency.threshold"),
        ("per_device_train_batch_size=1", "per_device_train_batch_size"),
        ("forget_share=1", "forget_share"),
        ("deepspeed=zero2", "engine=deepspeed"),
        ("report_to=[mlflow]", "tensorboard"),
        ("logging_steps=0", "logging_steps=0: must be above 0"),
        ("seed=-1", "seed"),
        ("optim=adamw", "adamw_torch, adamw_8bit"),
        ("lambda_forget=.nan", "lambda_forget=nan: a finite number"),
        ("learning_rate=.inf", "finite"),
        ("saliency={granularity: weight, fraction: 7}", "saliency.fraction=7"),
        ("saliency={granularity: weight, threshold: -1}", "saliency.threshold=-1"),
        ("saliency={granularity: weight, fraction: 0.5, batches: 0}", "saliency.batches=0"),
        ("saliency.fraction=0.1", "set it to weight or neuron"),
        ("saliency.score=wagle", "set it to weight or neuron"),
        ("method=[gd]", "method"),
        ("sites=[[projector]]", "sites=[['projector']]: a mapping of site to weight is needed"),
        ("learning_rate=" + "9" * 400, "a finite number is needed"),
        ("max_\nsteps=1", "max_\\nsteps: no such setting; did you mean max_steps?"),
        ("nonsense", "key=value"),
    ],
)
def test_refused_with_the_key_and_the_mend(override: str, names: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(None, [*(f"{k}={v}" for k, v in BASE.items()), override])
    assert names in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_optimiser_that_there_is_may_be_asked_for() -> None:
    assert set(get_args(Optim)) == set(MOMENT_BYTES)


def test_a_cached_teacher_cannot_serve_augmented_views() -> None:
    with pytest.raises(SettingsError, match="teacher=online"):
        load_settings(None, {**BASE, "teacher": "cached", "augment": True})


def test_weight_decay_would_move_masked_weights() -> None:
    with pytest.raises(SettingsError, match="weight_decay"):
        load_settings(None, {**BASE, "weight_decay": 0.1, "saliency.granularity": "neuron", "saliency.fraction": 0.5})


@pytest.mark.fault("bad input")
@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [1\n", None])
def test_unreadable_yaml_is_one_line(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "x.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SettingsError) as caught:
        load_settings(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_paths_must_be_set() -> None:
    with pytest.raises(SettingsError, match="model_name_or_path"):
        Settings().check()
