"""What commands share: reading tables, printing lines and tables, complaining on standard error."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from audit.runfolder import RunFolder


def say(text: str) -> None:
    print(text)


def complain(text: str) -> None:
    print(f"moe-audit: {text}", file=sys.stderr)


def print_table(
    title: str, rows: Sequence[Mapping[str, Any]], caption: str | None = None, *, left: Sequence[str] = ()
) -> None:
    """A row per mapping, a column per key of the first; columns are set to the right but for those named.

    Where the table is too wide, lines are broken in the last column.
    """
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    names = list(rows[0]) if rows else []
    for name in names:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=name != names[-1])
    for row in rows:
        table.add_row(*map(str, row.values()))
    console().print(table)


def rows_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def read_table(folder: RunFolder, name: str) -> pd.DataFrame | None:
    """A table of results/, None where the run has not got there."""
    try:
        frame: pd.DataFrame = folder.read_table(name).to_pandas()
    except FileNotFoundError:
        return None
    return frame


def console() -> Console:
    """As wide as the terminal; 120 columns where there is none."""
    found = Console()
    return found if found.is_terminal else Console(width=120)
