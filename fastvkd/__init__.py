"""Make a multimodal LLM forget faces and logos in images by Visual Knowledge Distillation (arXiv 2512.11325)."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["evaluate", "load_settings", "unlearn"]

if TYPE_CHECKING:
    from fastvkd.evaluation.run import evaluate
    from fastvkd.settings import load_settings
    from fastvkd.unlearning.loop import unlearn

_HOMES = {
    "evaluate": "fastvkd.evaluation.run",
    "load_settings": "fastvkd.settings",
    "unlearn": "fastvkd.unlearning.loop",
}


def __getattr__(name: str) -> Any:  # torch and transformers take seconds to import: only when they are used
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fastvkd' has no attribute {name!r}")
