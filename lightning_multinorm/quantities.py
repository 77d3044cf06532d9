"""Large numbers in three digits, and times in words."""


def quantity(number: float) -> str:
    """A number in three digits or so: 1.23 M."""
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """A time in words: 2 h 05 min, or 1 min 07 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
