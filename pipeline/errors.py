"""The errors a user may meet, and the exit code each one means."""

from collections.abc import Sequence
from difflib import get_close_matches


class RegrowError(Exception):
    """A failure that is explained in one message and needs no traceback. Exit code 1: a stage failed."""

    exit_code = 1


class ConfigError(RegrowError):
    """A config, a source or a command line that cannot be used. Raised before any work. Exit code 2."""

    exit_code = 2


class SourceError(ConfigError):
    """A model or data source that cannot be resolved, fetched or read."""


class StageError(RegrowError):
    """A stage that began and could not finish."""


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """` (did you mean 'x'?)` for the nearest known word, or an empty string."""
    nearest = get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""
