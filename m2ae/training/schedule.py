"""Numbers that change with the step: learning rate and decay of the target encoder."""

import math


def cosine_with_warmup(step: int, steps: int, warmup_steps: int, final: float) -> float:
    """Factor on the learning rate: linear from 0 to 1, then half a cosine down to `final`.

    Args:
        step: 0 <= step < steps; the first step already has a factor above 0.
        steps: of the whole run.
        warmup_steps: length of the linear part, below `steps`.
        final: factor at the last step, in [0, 1].

    Returns:
        The factor, in (0, 1].

    Loshchilov & Hutter 2017, "SGDR", eq. 5, without restarts.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def linear(step: int, steps: int, start: float, end: float) -> float:
    """From `start` at step 0 to `end` at the last step, as I-JEPA moves the decay of its target.

    Args:
        step: 0 <= step < steps.
        steps: of the whole run.
        start: value at the first step.
        end: value at the last step.

    Returns:
        The value at this step.
    """
    return start + (end - start) * step / max(1, steps - 1)
