"""The error for data that a user can put right; the tools print it as one line and exit with status 2."""


class DataError(ValueError):
    """A file, an option or a text breaks a rule: the message says the value, the rule and the cure."""
