from __future__ import annotations

import io

import pytest
from rich.console import Console

from cluster.display import BarDisplay, LineDisplay, NoDisplay, Status, duration, make_display


def status(done: int, total: int = 10) -> Status:
    return Status(
        stage="effects",
        tasks=total,
        waiting=total - done,
        running=0,
        answered=0,
        committed=done,
        quarantined=0,
        share=done / total,
        rows=done * 100,
        rows_per_second=1234.4,
        seconds_left=61.0,
        group_seconds_left=122.0,
        groups_ready=2,
        groups_starting=0,
        groups_waiting=0,
        losses=0,
    )


CLOCK = [(0.4, "0s"), (59.6, "1m00s"), (125, "2m05s"), (3600, "1h00m"), (93600, "1d02h")]


@pytest.mark.parametrize(("seconds", "said"), CLOCK)
def test_durations_read_like_a_clock(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_lines_are_few_and_the_end_is_said_once() -> None:
    out = io.StringIO()
    display = LineDisplay(out, seconds=1e9)
    for done in (0, 1, 5, 10, 10, 10):
        display.show(status(done))
    assert out.getvalue().splitlines() == [
        "effects: 0/10 tasks (0%), 1,234 rows/s, 1m01s left",
        "effects: 10/10 tasks (100%), 1,234 rows/s, 1m01s left",
    ]


def test_the_bar_shows_share_rate_and_time_left() -> None:
    out = io.StringIO()
    display = BarDisplay(Console(file=out, force_terminal=True, width=120))
    display.show(status(5))
    display.say("a [group] was lost")
    display.close()
    assert "a [group] was lost" in out.getvalue()  # not taken for markup
    assert " 50%" in out.getvalue()
    assert "5/10 tasks, 1,234 rows/s, 1m01s left" in out.getvalue()


def test_a_log_gets_lines_and_none_gets_none() -> None:
    out = io.StringIO()
    assert isinstance(make_display("auto", out), LineDisplay)
    assert isinstance(make_display("none", out), NoDisplay)
