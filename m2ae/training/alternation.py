"""Which direction a step trains: alternating gradient descent over one-way tasks.

At step s the objective is that of one direction alone. Parameters of the others get no gradient,
not one of 0: AdamW then passes them by, with their moments, and does not decay them either.

Source: Lei et al. 2025, "M3-JEPA", equations 8 and 11; of its three schedules, the sequential one
was best.
"""

from collections.abc import Iterable, Sequence

from m2ae.dataclass_io import hint

Direction = tuple[str, str]  # source and target modality


def sequential(step: int, directions: Sequence[Direction]) -> Direction:
    """The direction of a step: one after the other, from the first.

    Args:
        step: from 0.
        directions: at least one.

    Returns:
        Source and target.
    """
    return directions[step % len(directions)]


def check_directions(directions: Sequence[Direction], modalities: Iterable[str]) -> None:
    """Refuse directions that a connector does not have.

    Args:
        directions: of a recipe.
        modalities: of the connector.

    Raises:
        ValueError: there is none, a modality is unknown, a source is its target, or a direction
            comes twice.
    """
    if not directions:
        raise ValueError("directions: expected at least one pair of modalities, got none")
    modalities = list(modalities)
    for direction in directions:
        for name in direction:
            if name not in modalities:
                known = hint(name, modalities)
                raise ValueError(f"directions: expected known modalities, got {name!r}; {known}")
        if direction[0] == direction[1]:
            raise ValueError(
                f"directions: expected two modalities, got {direction[0]!r} and itself"
            )
        if directions.count(direction) > 1:
            raise ValueError(
                f"directions: expected each pair once, got {list(direction)} twice; steps go to"
                " directions in turn"
            )
