"""What a run leaves for its readers: report.json, the page report.html, and the model card."""

from fastvkd.reporting.collect import relearning_parts, write_page
from fastvkd.reporting.html import write_html
from fastvkd.reporting.model_card import model_card
from fastvkd.reporting.report import build_report, read_report, write_report
from fastvkd.reporting.schema import validate

__all__ = [
    "build_report",
    "model_card",
    "read_report",
    "relearning_parts",
    "validate",
    "write_html",
    "write_page",
    "write_report",
]
