"""Figures are drawn in a process of its own, whose end does not end the run that asks for them."""

import resource
from collections.abc import Iterator

import pytest

from lightning_multinorm.report.drawing import draw

SPEC = {
    "data": {"values": [{"x": 1, "y": 2}, {"x": 2, "y": 3}]},
    "mark": "line",
    "encoding": {"x": {"field": "x", "type": "quantitative"}, "y": {"field": "y", "type": "quantitative"}},
}


@pytest.fixture
def limited() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_a_figure_of_each_kind_and_the_library() -> None:
    drawn = draw({"één": SPEC})
    assert drawn.svg["één"].startswith("<svg")
    assert drawn.png["één"].startswith(b"\x89PNG")
    assert "vegaEmbed" in drawn.libraries


@pytest.mark.usefixtures("limited")
def test_where_address_space_is_limited_it_is_an_error_that_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"vl-convert ended with status -?\d+ .*ulimit -v"):
        draw({})
