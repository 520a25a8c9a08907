"""The model card: a metadata block that parses, every accuracy, honest about what failed, hostile text as text."""

from typing import Any

import pytest
import yaml
from example_run import report_parts

from fastvkd.reporting import build_report, model_card
from fastvkd.reporting.schema import CELLS
from fastvkd.reporting.verdict import headline_sentence


@pytest.fixture
def report() -> dict[str, Any]:
    return build_report(**report_parts())


def metadata(card: str) -> dict[str, Any]:
    parts = card.split("---\n")
    assert parts[0] == ""
    loaded: dict[str, Any] = yaml.safe_load(parts[1])
    return loaded


def test_card_holds_verdict_and_every_accuracy(report: dict[str, Any]) -> None:
    card = model_card(report)
    assert headline_sentence(report) in card
    for model in ("vanilla", "unlearned", "gold"):
        for name, kind in CELLS:
            cell = report[model][name][kind]
            low, high = cell["ci95"]
            assert f"{100 * cell['accuracy']:.1f} ({100 * low:.1f}–{100 * high:.1f})" in card
    assert "What this does not show" in card and card.endswith("\n")


def test_metadata_names_a_hub_model_but_not_a_local_folder(report: dict[str, Any]) -> None:
    assert "base_model" not in metadata(model_card(report))
    report["settings"]["model_name_or_path"] = "llava-hf/llava-1.5-7b-hf"
    found = metadata(model_card(report))
    assert found["base_model"] == "llava-hf/llava-1.5-7b-hf"
    assert found["pipeline_tag"] == "image-text-to-text" and found["library_name"] == "transformers"


def test_failed_requirement_and_changed_language_model_are_said(report: dict[str, Any]) -> None:
    report["language_model_sha256"]["after"] = "0" * 64
    card = model_card(report)
    assert "| Language model | unchanged, bit by bit | changed | **no** |" in card
    assert "**changed**" in card and "the same after" not in card


def test_tables_keep_their_columns_whatever_the_settings_hold(report: dict[str, Any]) -> None:
    report["settings"]["note"] = "a | b\n| <script> `x`"
    report["notes"] = ["<script>alert(1)</script> *not* bold"]
    card = model_card(report)
    assert "| `note` | `a \\| b \\| <script> 'x'` |" in card
    assert "- &lt;script&gt;alert(1)&lt;/script&gt; \\*not\\* bold" in card


def test_certificate_is_a_section_with_every_check(report: dict[str, Any]) -> None:
    card = model_card(report)
    assert "## Certificate: failed" in card
    assert "2 of 4 checks are met, 1 missed, 1 not measured." in card
    assert "| Relearning, area above gold | at most 0.10 | 0.22 | **no** |" in card
    assert "| Language model unchanged, bit by bit | yes | yes | yes |" in card
    del report["certificate"]
    assert "Certificate" not in model_card(report)
