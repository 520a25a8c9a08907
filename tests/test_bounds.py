"""No whole number of a setting or option may be larger than what every library takes, nor a count below zero."""

import dataclasses
import json
import math
import typing
from collections.abc import Iterator
from typing import Any

import pytest

from fastvkd.bounds import is_finite_number
from fastvkd.errors import DataError, SettingsError, TrainingError
from fastvkd.evaluation.protocol import logged_samples
from fastvkd.options import Budget, Options, options_of
from fastvkd.reporting.report import read_log
from fastvkd.settings import Scrub, Settings, Stranger, load_settings
from fastvkd.unlearning.metrics import lines_up_to

LARGE = (2**63, 2**64 + 1, 10**30)


def whole_numbers(section: type, prefix: str = "") -> Iterator[str]:
    for key, hint in typing.get_type_hints(section).items():
        parts = typing.get_args(hint) or (hint,)
        for part in parts:
            if dataclasses.is_dataclass(part):
                yield from whole_numbers(typing.cast(type, part), f"{prefix}{key}.")
        if int in parts:
            yield prefix + key


KEYS = list(whole_numbers(Settings))


def test_a_finite_number_has_room_in_a_float_and_is_no_truth_value() -> None:
    assert all(map(is_finite_number, (0, -3, 1.5, 2**70)))
    assert not any(map(is_finite_number, (True, "1", None, math.nan, -math.inf, 10**400)))


def test_a_log_with_a_whole_number_beyond_floats_is_read_without_it(tmp_path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps({"step": 1, "loss": 10**400, "rate": math.inf}) + "\n")
    assert read_log(file) == [{"step": 1}]


def test_a_sample_with_a_whole_number_beyond_floats_is_refused_in_one_line(tmp_path) -> None:
    file = tmp_path / "samples.jsonl"
    file.write_text(json.dumps({"cell": "forget", "task": "generation", "rouge_l": 10**400}) + "\n")
    with pytest.raises(DataError, match="rouge_l is not a finite number"):
        logged_samples(file, "delete it")


def test_all_are_known() -> None:
    assert {"max_steps", "seed", "rmu_layer", "saliency.batches", "stranger.steps", "scrub.rank"} <= set(KEYS)
    assert len(KEYS) > 20 and Stranger and Scrub


@pytest.mark.parametrize("value", [*LARGE, -1, -(2**63)])
@pytest.mark.parametrize("key", KEYS)
def test_a_setting_out_of_all_bounds_is_one_line(key: str, value: int) -> None:
    with pytest.raises(SettingsError, match=f"{key}={value}: ") as error:
        load_settings(None, {"model_name_or_path": "m", "data": "d", key: value})
    assert "\n" not in str(error.value)


def every(cls: type) -> Iterator[type]:
    for one in cls.__subclasses__():
        yield one
        yield from every(one)


def test_an_option_out_of_all_bounds_is_one_line() -> None:
    checked = 0
    for cls in [Budget, *every(Options)]:
        for option in options_of(cls):
            if option.kind is int and option.name != "local_rank":  # launchers give -1 for none
                for value in (*LARGE, -1, -(2**63)):
                    with pytest.raises(SettingsError, match=f"{value}: "):
                        option.check(value)
                        pytest.fail(f"{cls.__name__}.{option.name}={value} is taken")
                    checked += 1
    assert checked > 50


def test_a_damaged_line_of_metrics_is_named(tmp_path: Any) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert lines_up_to(file, 1) == ['{"step": 1}\n']
    for wrong in ('{"step": 1', '{"stop": 1}', "[1]", '{"step": "1"}'):
        file.write_text(f'{{"step": 1}}\n{wrong}\n{{"step": 3}}\n')
        with pytest.raises(TrainingError, match=r"metrics\.jsonl:2: "):
            lines_up_to(file, 3)
