"""Errors of the command line's parser in a line: a wrong name and the nearest right one, a value and what is wanted."""

import pytest

from lightning_multinorm.arguments import one_line

OPTIONS = ["data.batch_size", "data.source", "model.size", "trainer.max_steps"]
NAMESPACE = "Namespace(class_path='lightning_multinorm.SinkGD', init_args=Namespace(lr='fast'))"
CALLABLE = "Type typing.Callable[[collections.abc.Iterable], torch.optim.optimizer.Optimizer] expects a function or a "
CALLABLE += "callable class:"
MESSAGES = {
    "unrecognized arguments: --data.batch_sise 3": "data.batch_sise is not known; did you mean data.batch_size?",
    "unrecognized arguments: --trainr.max_steps=3": "trainr.max_steps is not known; did you mean trainer.max_steps?",
    "Subcommand 'fit' does not accept option 'zzz'": "zzz is not known; --help after the subcommand lists what is",
    f"Parser key \"model.optimizer\":\n  {CALLABLE} Option 'iterationz' is not accepted. Got value: {NAMESPACE}": (
        "model.optimizer.init_args.iterationz is not known; did you mean iterations?"
    ),
    f"Parser key \"model.optimizer\":\n  {CALLABLE} module 'lightning_multinorm' has no attribute 'SinkGDD'. Got": (
        "model.optimizer=lightning_multinorm.SinkGDD is not there; did you mean SinkGD?"
    ),
    f"Parser key \"model.optimizer\":\n  {CALLABLE} No module named 'fira'. Got value: {NAMESPACE}": (
        "model.optimizer needs the Python package fira, which is not installed"
    ),
    f'Parser key "model.optimizer":\n  {CALLABLE} Parser key "lr":\n\n - Expected a path but fast either not '
    "accessible or invalid\n - Does not validate against any of the Union subtypes\n Errors:\n"
    f" - Expected a <class 'float'>\n Given value type: <class 'str'>\n Given value: fast. Got value: {NAMESPACE}": (
        "model.optimizer.init_args.lr=fast is not possible; it must be a number"
    ),
    f'Parser key "model.optimizer":\n  {CALLABLE} the following arguments are required: norms. Got {NAMESPACE}': (
        "model.optimizer.init_args has no norms, which lightning_multinorm.SinkGD needs"
    ),
    "Parser key \"data.batch_size\":\n  Expected a <class 'int'>. Got value: None": (
        "data.batch_size=null is not possible; it must be a whole number"
    ),
    "Parser key \"model.size\":\n  Errors:\n  - Expected a typing.Literal['60m', '130m']\n  - Expected a <class "
    "'NoneType'>\n  Given value type: <class 'str'>\n  Given value: 61m": (
        "model.size=61m is not possible; it must be 60m, 130m or null"
    ),
    'Parser key "model.optimizer":\n - Expected a path but Nope invalid\n - Expected a dot import path string: Nope': (
        "model.optimizer=Nope is no class; give its import path, as package.Class"
    ),
    "the following arguments are required: runs": "runs must be given; --help tells more",
    "ambiguous option:\n--a could match --ab, --ac": "ambiguous option: --a could match --ab, --ac",
}


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_of_the_parser_is_a_sentence(message: str) -> None:
    assert one_line(message, OPTIONS) == MESSAGES[message]


def test_what_is_not_foreseen_is_cut_to_a_line() -> None:
    line = one_line("unforeseen:\n" + "x " * 1000)
    assert line.startswith("unforeseen: x") and line.endswith(" ...") and len(line) < 500
