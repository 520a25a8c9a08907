"""`learning_rate: auto`: a rule that gives the middle rate, and short trials around it from the original weights."""

import math
import statistics
from collections.abc import Callable, Sequence

from torch import nn

from fastvkd.engines.protocol import Engine
from fastvkd.engines.schedule import Schedule
from fastvkd.errors import TrainingError
from fastvkd.settings import Settings

RATE_TIMES_FAN_IN = 0.256  # 2e-3 at width 128, which the demo's towers take well
AROUND = (3.0, 1.0, 1 / 3)
TRIAL_STEPS = 24
NEARLY = 1.2  # times the lowest cost of a trial; few steps flatter a low rate, so the highest as good as that is taken


def middle_rate(parameters: Sequence[tuple[str, nn.Parameter]]) -> float:
    """`RATE_TIMES_FAN_IN` over the median fan-in of the trained matrices, in two digits.

    An update of Adam is as large as the rate, whatever the gradient, and adds up coherently over a layer's inputs. So
    the change of its output is rate x fan-in, and the rate that suits falls as 1 / fan-in (as in muP, arXiv
    2203.03466).
    """
    shapes = [tuple(getattr(p, "ds_shape", p.shape)) for _, p in parameters]  # ZeRO-3 leaves `shape` empty
    fans = [math.prod(shape[1:]) for shape in shapes if len(shape) >= 2]
    return float(f"{RATE_TIMES_FAN_IN / statistics.median(fans or [1]):.1e}")


def rate_of(settings: Settings, parameters: Sequence[tuple[str, nn.Parameter]]) -> float:
    """The rate that is set; the middle one where trials are to find it."""
    return middle_rate(parameters) if settings.learning_rate == "auto" else settings.learning_rate


def find_rate(
    engine: Engine,
    settings: Settings,
    update: Callable[[int], None],
    cost: Callable[[], float],
    put_back: Callable[[], None],
    report: Callable[[float, float], None],
) -> float:
    """The highest of the rates around the engine's own whose trial ends at nearly the lowest cost.

    A trial does updates 0 ... 23 of the run with a warm-up over a third of them. `put_back` restores weights and
    optimiser. `report(rate, cost)` is called after each. Raises TrainingError where no rate comes below the start.
    """
    middle, steps = engine.base_learning_rate, min(TRIAL_STEPS, settings.max_steps)
    start, costs = cost(), {}
    engine.schedule = Schedule("constant", steps // 3, steps)
    for factor in AROUND:
        engine.base_learning_rate = rate = float(f"{factor * middle:.1e}")
        for step in range(steps):
            update(step)
        found = cost()
        costs[rate] = found if math.isfinite(found) else math.inf
        put_back()
        report(rate, costs[rate])
    lowest = min(costs.values())
    if not lowest < start:
        raise TrainingError(
            f"learning_rate=auto: none of {', '.join(f'{rate:g}' for rate in costs)} came nearer to the targets in "
            f"{steps} updates; set learning_rate lower, or change forget_target"
        )
    return max(rate for rate, found in costs.items() if found <= min(NEARLY * lowest, start))
