"""Joint figures of questions that exist in two forms, about the photo and about the text alone (UMU-Bench).

They say whether both forms were forgotten, or both kept.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastvkd.evaluation.statistics import with_interval


def joint_figures(samples: Sequence[Mapping[str, Any]], seed: int) -> dict[str, dict[str, Any]]:
    """`{cell: figures}` from logged samples. Questions without a partner do not count.

    - `choice` and `cloze`, u and m being right or wrong about text and photo: `<task>_acc_r` = mean(u and m),
      `<task>_acc_f` = mean(neither).
    - `generation`, a and b being ROUGE-L F1 about photo and text: `rl_f` = mean((a^2 + b^2) / (a + b)), `rl_r` =
      mean(2ab / (a + b)); both 0 where a + b = 0.

    Each has its `_ci95` (a bootstrap over pairs). `n_pairs` counts the pairs by task.
    """
    formulas: dict[str, dict[str, Callable[[float, float], float]]] = {
        task: {f"{task}_acc_r": lambda m, u: m * u, f"{task}_acc_f": lambda m, u: (1 - m) * (1 - u)}
        for task in ("choice", "cloze")
    }
    formulas["generation"] = {
        "rl_f": lambda a, b: (a * a + b * b) / (a + b) if a + b else 0.0,
        "rl_r": lambda a, b: 2 * a * b / (a + b) if a + b else 0.0,
    }
    figures: dict[str, dict[str, Any]] = {}
    for cell in dict.fromkeys(sample["cell"] for sample in samples):
        figures[cell] = {"n_pairs": {}}
        for task, by_name in formulas.items():
            value = "rouge_l" if task == "generation" else "correct"
            photo, text = (
                {
                    (sample["entity"], sample["pair"]): float(sample[value])
                    for sample in samples
                    if sample.get("pair") and (sample["cell"], sample["task"], sample["kind"]) == (cell, task, kind)
                }
                for kind in ("vqa", "qa")
            )
            pairs = [(photo[key], text[key]) for key in photo if key in text]
            figures[cell]["n_pairs"][task] = len(pairs)
            for name, formula in by_name.items():
                figures[cell] |= with_interval(name, [formula(one, other) for one, other in pairs], seed)
    return figures
