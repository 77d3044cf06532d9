"""The one exception of this folder."""

from lightning_multinorm.errors import UsageError


class DataError(UsageError):
    """Something about the data that the user can put right; the message is one sentence that names the remedy."""
