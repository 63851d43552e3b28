"""What is wrong with a run folder."""

from __future__ import annotations


class RunFolderError(ValueError):
    """The folder cannot be used for what was asked; the message names the field, what it holds and what was asked."""
