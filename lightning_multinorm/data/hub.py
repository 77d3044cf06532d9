"""Is the Hugging Face hub there? Asked once, with a short limit, before anything that retries for long."""

from functools import cache

from huggingface_hub import constants
from huggingface_hub.utils import get_session

PROBE_SECONDS = 5.0


@cache
def hub_is_reachable() -> bool:
    """Whether one request to the hub is answered within `PROBE_SECONDS`.

    The hub's own client retries a refused connection five times (25 s here for C4, 50 s for a tokenizer) before it
    gives up. One request through its own session respects `HF_ENDPOINT`, proxies and `HF_HUB_OFFLINE`.

    Returns:
        True if any HTTP answer came back, whatever its status.
    """
    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
    except Exception:  # the session's transport can be replaced by the user, so its exceptions have no common base
        return False
    return True


def reason(error: Exception) -> str:
    """The first line of an exception's message with its class, for use inside one sentence."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
