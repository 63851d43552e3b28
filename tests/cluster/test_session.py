from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
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
        with pytest.raises(session.StopSignal) as ended:
            os.kill(os.getpid(), signal.SIGTERM)
        assert ended.value.status == 143
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_what_has_nothing_to_finish(number: signal.Signals, status: int) -> None:
    with session.ending_signals(), pytest.raises(session.StopSignal) as ended:
        os.kill(os.getpid(), number)
    assert ended.value.status == status


@pytest.mark.parametrize("mode", [None, pytest.param("disabled", marks=pytest.mark.full)])
def test_a_local_cluster_is_for_its_owner_alone(tmp_path: Path, mode: str | None) -> None:
    here = Path(__file__)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(here.parents[2])}
    environment |= {} if mode is None else {"RAY_AUTH_MODE": mode}
    command = [sys.executable, str(here.parent / "local_session.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("processes") > 4
    assert set(found.pop("listening")) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    assert found == {
        "mode": "drwx------",
        "on a command line": False,
        "in files": "",
        "no token": "AuthenticationError",
        "wrong token": "AuthenticationError",
        "right token": "connected",
        "left": False,
    }
    assert not (tmp_path / ".ray").exists()
