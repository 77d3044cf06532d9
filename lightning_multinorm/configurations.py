"""The packaged configuration files, and how a bare name given to ``--config`` finds them."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from lightning_multinorm.errors import UsageError

_PACKAGE = Path(__file__).parent
# In the wheel the files lie in the package, in a checkout beside it.
CONFIGS = next(path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir())


def packaged_configs() -> list[str]:
    """Names such as "llama60m.yaml" and "optimizer/adamw.yaml"."""
    return sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))


def find_config(name: str) -> str:
    """The path of a configuration: the file of that name, or else the packaged one.

    Raises:
        UsageError: listing the packaged ones.
    """
    if Path(name).is_file():
        return name
    packaged = packaged_configs()
    if name in packaged:
        return str(CONFIGS / name)
    close = get_close_matches(name, packaged, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise UsageError(
        f"--config {name}: no such file, and no packaged configuration.{hint} Packaged are: {', '.join(packaged)}"
    )


def resolve_configs(args: Sequence[str]) -> list[str]:
    """Command-line arguments with every ``--config`` (or ``-c``) replaced by the path it stands for."""
    resolved: list[str] = []
    for previous, argument in zip(["", *args], args, strict=False):
        option, equals, value = argument.partition("=")
        if previous in ("--config", "-c"):
            argument = find_config(argument)
        elif option in ("--config", "-c") and equals:
            argument = f"{option}={find_config(value)}"
        resolved.append(argument)
    return resolved
