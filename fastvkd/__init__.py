"""Make a multimodal LLM forget faces and logos in images by Visual Knowledge Distillation (arXiv 2512.11325)."""

import logging
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["EvalOptions", "evaluate", "load_settings", "unlearn"]

if TYPE_CHECKING:
    from fastvkd.evaluation.run import evaluate
    from fastvkd.options import EvalOptions
    from fastvkd.settings import load_settings
    from fastvkd.unlearning.loop import unlearn

_HOMES = {
    "EvalOptions": "fastvkd.options",
    "evaluate": "fastvkd.evaluation.run",
    "load_settings": "fastvkd.settings",
    "unlearn": "fastvkd.unlearning.loop",
}


def __getattr__(name: str) -> Any:  # torch and transformers take seconds to import: only when they are used
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fastvkd' has no attribute {name!r}")


def _matters(record: logging.LogRecord) -> bool:
    """Whether a warning of bitsandbytes' CPU part is any other than that the package `kernels` is missing.

    It looks for that package where the CPU has AVX512-BF16, for a product that `models.nf4` never asks for. In this
    repository's root it finds our folder of that name instead, a namespace: an ImportError without a path, too.
    """
    cause = record.args[0] if isinstance(record.args, tuple) and record.args else None
    return not (isinstance(cause, ImportError) and cause.name == "kernels" and cause.path is None)


# Here, since the warning comes when bitsandbytes is imported, which transformers may do before we do.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_matters)
