"""The packaged configuration files, and how a bare name given to ``--config`` finds them."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import yaml

from lightning_multinorm.errors import UsageError

_PACKAGE = Path(__file__).parent
# In the wheel the files lie in the package, in a checkout beside it.
CONFIGS = next(path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir())

_VALUES = ("seed_everything", "ckpt_path", "weights_only", "verbose", "return_predictions")  # that are no sections


def packaged_configs() -> list[str]:
    """Names such as "llama60m.yaml" and "optimizer/adamw.yaml"."""
    return sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))


def find_config(name: str) -> str:
    """The path of a configuration: the file of that name, or else the packaged one.

    Raises:
        UsageError: listing the packaged ones, or if it is no mapping of sections.
    """
    if Path(name).is_file():
        _check(name)
        return name
    packaged = packaged_configs()
    if name in packaged:
        return str(CONFIGS / name)
    close = get_close_matches(name, packaged, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise UsageError(
        f"--config {name}: no such file, and no packaged configuration.{hint} Packaged are: {', '.join(packaged)}"
    )


def _check(name: str) -> None:
    """Refuse what is no configuration, which the parser would not say in a line, nor where."""
    try:
        sections = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"--config {name} is no text: byte {error.start} is not UTF-8; give a YAML file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        raise UsageError(f"--config {name}{where} is no YAML: {getattr(error, 'problem', error)}") from None
    if sections is not None and not isinstance(sections, dict):
        raise UsageError(f"--config {name} is a {type(sections).__name__}; it must be sections, as trainer: and model:")
    for key, value in (sections or {}).items():
        if key not in _VALUES and value is not None and not isinstance(value, dict):
            raise UsageError(
                f"--config {name}: {key} is {value!r}; it must be a section, with its options indented below"
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
