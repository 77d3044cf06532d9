"""The one exception that is a message to the user: it says what is wrong and what to do, and needs no stack trace."""


class UsageError(ValueError):
    """Something in the configuration, the files or their combination that only the user can mend."""
