"""The question whether the hub is there: one request, bounded, and any answer counts."""

from collections.abc import Iterator
from typing import Any

import pytest

from lightning_multinorm.data import hub


class Session:
    """Stands in for the hub client's session."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.calls: list[tuple[str, float]] = []

    def head(self, url: str, *, timeout: float) -> None:
        self.calls.append((url, timeout))
        if self.error:
            raise self.error


@pytest.fixture(autouse=True)
def ask_anew() -> Iterator[None]:
    hub.hub_is_reachable.cache_clear()
    yield
    hub.hub_is_reachable.cache_clear()


@pytest.mark.parametrize(("error", "reachable"), [(None, True), (OSError("no route"), False), (RuntimeError(), False)])
def test_one_bounded_request_decides(monkeypatch: pytest.MonkeyPatch, error: Any, reachable: bool) -> None:
    session = Session(error)
    monkeypatch.setattr(hub, "get_session", lambda: session)
    assert [hub.hub_is_reachable(), hub.hub_is_reachable()] == [reachable, reachable]
    assert session.calls == [(hub.constants.ENDPOINT, hub.PROBE_SECONDS)]  # asked once, remembered


def test_offline_mode_is_asked_of_the_real_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    assert not hub.hub_is_reachable()


def test_reason_is_one_line() -> None:
    assert hub.reason(OSError("It broke.\nRead more at ...")) == "OSError: It broke"
    assert hub.reason(KeyError()) == "KeyError"
