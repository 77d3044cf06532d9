"""The parser of the command line, whose errors are one line that names the option and the nearest one there is."""

import importlib
import inspect
import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

_LONGEST = 400  # characters of a message that is passed on as it is


class OneLineParser(LightningArgumentParser):
    """jsonargparse's, without its page of usage in front of an error, and its tree of types after it."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a parser inside another's attempt at a value
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        options = {option.lstrip("-") for action in parser._actions for option in action.option_strings}
        self.exit(2, f"error: {one_line(message, options)}\n")


def one_line(message: str, options: Iterable[str] = ()) -> str:
    """An error of jsonargparse in a sentence.

    Args:
        message: its own.
        options: the names that there are.
    """
    text = " ".join(message.split())
    keys: list[str] = re.findall(r'Parser key "([^"]+)"', text)
    key = ".init_args.".join(keys)
    if unknown := re.search(r"Option '(\S+)' is not accepted", text):
        return f"{key}.init_args.{unknown[1]} is not known{_hint(unknown[1], _arguments(text))}"
    if unknown := re.search(r"unrecognized arguments: (\S+?)(?:=| |$)|does not accept option '(\S+)'", text):
        name = (unknown[1] or unknown[2]).lstrip("-")
        return f"{name} is not known{_hint(name, options)}"
    if missing := re.search(r"No module named '(\S+)'", text):
        return f"{key} needs the Python package {missing[1]}, which is not installed"
    if missing := re.search(r"module '(\S+)' has no attribute '(\w+)'", text):
        names = [name for name in dir(importlib.import_module(missing[1])) if not name.startswith("_")]
        return f"{key}={missing[1]}.{missing[2]} is not there{_hint(missing[2], names)}"
    if required := re.search(r"arguments are required: ([\w, ]+)", text):
        if not key:
            return f"{required[1]} must be given; --help tells more"
        return f"{key}.init_args has no {required[1]}, which {_class_path(text)} needs"
    value = re.search(r"(?:Given value|Got value): (.+?)(?:\. Got value: |$)", text)
    if key and value and (wanted := _expected(text)):
        return f"{key}={_plain(value[1])} is not possible; it must be {wanted}"
    if path := re.search(r"Expected a dot import path string: (\S+)", text):
        return f"{key}={path[1]} is no class; give its import path, as package.Class"
    text = re.sub(r"Type typing\.Callable.*? callable class: |Parser key ", "", text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _hint(name: str, names: Iterable[str]) -> str:
    names = sorted(names)
    # A mistake is rarely in the section, so that names of the same one come first.
    section = [other for other in names if other.rpartition(".")[0] == name.rpartition(".")[0]]
    close = get_close_matches(name, section, n=1) or get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]}?" if close else "; --help after the subcommand lists what is"


def _arguments(text: str) -> list[str]:
    """Of the class that a message speaks of."""
    module, _, name = _class_path(text).rpartition(".")
    if not module:
        return []
    return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)


def _class_path(text: str) -> str:
    path = re.search(r"class_path='([\w.]+)'", text)
    return path[1] if path else "the class"


def _expected(text: str) -> str:
    """The types that a message lists, in words."""
    wanted: list[str] = []
    for kind, names in re.findall(r"Expected an? (?:<class '([\w.]+)'>|typing\.Literal\[([^\]]*)\])", text):
        wanted += re.findall(r"[^', ]+", names) if names else [_WORDS.get(kind, kind)]
    wanted += ["a class"] * ("Expected a dot import path string" in text or "Not a valid subclass" in text)
    wanted = list(dict.fromkeys(wanted))
    return " or ".join([", ".join(wanted[:-1]), wanted[-1]] if len(wanted) > 1 else wanted)


_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "NoneType": "null",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "collections.abc.Mapping": "a mapping",
}


def _plain(value: str) -> str:
    return "null" if value == "None" else value if len(value) <= _LONGEST else f"{value[:_LONGEST]} ..."
