"""The `regrow` command: configuration, sources, the cached stages, plans and reports."""

__version__ = "0.1.0"
