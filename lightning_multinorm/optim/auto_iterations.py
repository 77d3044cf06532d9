"""``iterations="auto"``: for each parameter as many alternations as the residuals of its own gradients ask for.

Every `PERIOD`-th step makes ``max_iterations`` and looks at the residual after each; the steps until the next take the
fewest that brought every norm within ``tolerance``. In between nothing is measured and nothing waits for the device.
What is chosen lies in the parameter group, so a checkpoint has it.
"""

from typing import Any, Literal

Iterations = int | Literal["auto"]

PERIOD = 32
"""Steps from one measurement to the next: gradients change their shape over hundreds of steps."""

STATE = ("chosen_iterations", "steps_to_measure")
"""What it keeps in a parameter group."""


def check_iterations(owner: str, iterations: Any, tolerance: float, most: int) -> None:
    """Raises ValueError for a value out of range."""
    if iterations != "auto" and not (type(iterations) is int and iterations >= 1):
        raise ValueError(f"{owner}: iterations={iterations!r} must be at least 1, or 'auto'")
    if not tolerance > 0:
        raise ValueError(f"{owner}: tolerance={tolerance} must be positive, 0.01 for example")
    if not (type(most) is int and most >= 1):
        raise ValueError(f"{owner}: max_iterations={most!r} must be at least 1")


def is_measuring(group: dict[str, Any]) -> bool:
    """Whether the step that is being made chooses anew."""
    return group.get("iterations") == "auto" and group.get("steps_to_measure", 0) == 0


def iterations_of(group: dict[str, Any], index: int) -> int:
    """How many the ``index``-th parameter of a group takes in this step; 1 in a scheme that has none."""
    iterations = group.get("iterations", 1)
    if iterations != "auto":
        return int(iterations)
    if is_measuring(group):
        return int(group["max_iterations"])
    return chosen(group, index)


def chosen(group: dict[str, Any], index: int) -> int:
    """What is chosen for the ``index``-th parameter; ``max_iterations`` while its gradients have not been seen."""
    found = group.get("chosen_iterations")
    return int(found[index] if found else group["max_iterations"])


def choose(group: dict[str, Any], index: int, residuals: list[float]) -> int:
    """The fewest iterations after which the largest residual is within the tolerance; all if none is."""
    within = [k for k, residual in enumerate(residuals, 1) if residual <= group["tolerance"]]
    count = len(group["params"])
    group.setdefault("chosen_iterations", [int(group["max_iterations"])] * count)
    group["chosen_iterations"][index] = within[0] if within else len(residuals)
    return int(group["chosen_iterations"][index])


def end_step(group: dict[str, Any]) -> None:
    """Count a step."""
    if group.get("iterations") == "auto" and group["rule"] == "multinorm":
        group["steps_to_measure"] = (group.get("steps_to_measure", 0) - 1) % PERIOD
