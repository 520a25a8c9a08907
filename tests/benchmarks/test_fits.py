"""The table of what fits which card is what the plans say, and shows what it must."""

import json

import fits


def test_the_table_is_what_the_plans_say() -> None:
    assert json.loads(fits.RESULT.read_text()) == fits.report()


def test_every_job_has_a_row_for_every_model_and_export_needs_no_gpu() -> None:
    table = fits.report()["tables"]["fits"]
    assert len(table["rows"]) == len(fits.MODELS) * len(fits.HEADS) and len(table["head"]) == 2 + len(fits.CARDS)
    for _, job, *cells in table["rows"]:
        assert all((cell == "no GPU") == (job == "export") for cell in cells)
    assert fits.cell("eval", "fastvkd eval --model merged --data DATA --quantize nf4", 3 << 30, 0) == (
        "`--quantize nf4` 3.0"
    )
    assert fits.cell("attack", None, 1, 1) == "does not fit"
    attack = "fastvkd attack --model merged --before MODEL --data DATA --device-map auto --kind fewshot probe"
    assert fits.cell("attack", attack, 2 << 30, 7 << 30) == (
        "`--device-map auto` all kinds but relearn, quantize and perturb, 2.0, host 7"
    )
