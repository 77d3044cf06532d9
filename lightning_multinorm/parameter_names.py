"""What a parameter's dotted name tells of its place: the layer it lies in, and what kind of matrix it is."""


def layer_of(name: str) -> int | None:
    """The first whole number in a dotted name; None if there is none."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def kind_of(name: str) -> str:
    """The module that owns a weight, without its path ("q_proj"); the parameter's own name if that is no "weight"."""
    parts = name.split(".")
    return parts[-2] if len(parts) > 1 and parts[-1] == "weight" else parts[-1]
