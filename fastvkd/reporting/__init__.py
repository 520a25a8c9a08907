"""What a run leaves for its readers: report.json, report.html and the model card."""

from fastvkd.reporting.html import write_html
from fastvkd.reporting.model_card import model_card
from fastvkd.reporting.report import build_report, read_report, validate, write_report

__all__ = ["build_report", "model_card", "read_report", "validate", "write_html", "write_report"]
