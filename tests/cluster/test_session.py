from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from cluster import session


def test_what_killed_drivers_left_is_deleted_and_what_others_use_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_SCRATCH", str(tmp_path / "moe-audit-"))
    dead = tmp_path / "moe-audit-dead"
    dead.mkdir()
    (dead / "owner").touch()
    (tmp_path / "moe-audit-of-somebody").mkdir()  # never ours: no owner
    with session._scratch() as mine:
        assert not dead.exists()
        with session._scratch() as other:
            assert Path(mine).exists()
            assert other != mine
        assert not Path(other).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["moe-audit-of-somebody"]


def test_a_stop_signal_asks_and_the_second_one_insists() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with session.stop_signals() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
        assert stop.signal == signal.SIGTERM
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), signal.SIGTERM)
        assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
