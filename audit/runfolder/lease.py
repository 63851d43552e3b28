"""The lease: one driver at a time in a run folder on an object store, which knows no locks.

``lease/000001.json`` names its owner and is put again every ten seconds. Taking the folder over is making the next
number, which one of many can do; the highest number holds the folder, and numbers are never used again. So an owner
that was taken for dead finds out, and what it still writes to its own number means nothing.

An owner on this machine is asked for by its process. One elsewhere is watched: it is dead when its lease did not
change for 45 seconds. No clock is compared with another, but for a lease older than 15 minutes, further off than
clocks may be for S3.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import uuid
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import psutil

from audit.runfolder.errors import RunFolderError
from audit.storage import Storage, StorageError

FOLDER = "lease"
_ABANDONED_SECONDS = 900.0


@dataclass(frozen=True, slots=True)
class Owner:
    """Who holds a lease. ``started`` tells a process from a later one of the same number; times are seconds."""

    id: str
    host: str
    machine: str
    process: int
    started: float
    time: float
    released: bool = False

    @classmethod
    def here(cls) -> Owner:
        own = psutil.Process()
        return cls(uuid.uuid4().hex, platform.node(), machine(), own.pid, own.create_time(), time.time())

    @classmethod
    def decoded(cls, content: bytes) -> Owner:
        """Of what is no lease, because a crash cut it off, nothing is known but when it is looked at."""
        try:
            return cls(**json.loads(content))
        except (ValueError, TypeError):
            return cls("", "an unknown machine", "", 0, time.time(), time.time())

    def encoded(self) -> bytes:
        return (json.dumps(asdict(self), sort_keys=True) + "\n").encode()


@dataclass(slots=True, eq=False)
class Lease:
    """The lease of one run folder; take, then release. Seconds are those of the module's text."""

    storage: Storage
    refresh_seconds: float = 10.0
    stale_seconds: float = 45.0
    _owner: Owner = field(default_factory=Owner.here)
    _name: str = ""
    _lost: bool = False
    _renewed: float = 0.0
    _ended: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _writing: threading.Lock = field(default_factory=threading.Lock)

    def take(self) -> None:
        """Hold the folder from here on. Raises RunFolderError while a live driver holds it, and StorageError."""
        while not self._name:
            names = self.storage.list(FOLDER)
            if names:
                self._require_free(names[-1])
            self._try_to_take(names)
        self._thread = threading.Thread(target=self._refresh, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let go. The object stays, because its number must not come again."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if not self._lost:
            self.storage.write(self._name, replace(self._owner, time=time.time(), released=True).encoded())

    def require_held(self) -> None:
        """Raises StorageError where another driver has the folder now, or where that cannot be found out."""
        if time.monotonic() - self._renewed > 2 * self.refresh_seconds:
            self._renew()
        if self._lost:
            raise StorageError(
                f"{self.storage.url} was taken over by another driver, because this one was not heard of for "
                f"{self.stale_seconds:g} s; leave the run to that one"
            )

    def _require_free(self, name: str) -> None:
        before = self.storage.read(name)
        if before is None:
            return
        owner = Owner.decoded(before)
        if owner.released or time.time() - owner.time > _ABANDONED_SECONDS:
            return
        lives = _lives(owner) if owner.machine == machine() else self._changes(name, before, owner)
        if lives:
            since = f"since {time.strftime('%Y-%m-%d %H:%M', time.localtime(owner.started))}"
            raise RunFolderError(
                f"--out: {self.storage.url} is in use by process {owner.process} on {owner.host} {since}; wait for it "
                "or end it"
            )
        self.storage.say(f"process {owner.process} on {owner.host} ended without letting go; its run is taken over")

    def _changes(self, name: str, before: bytes, owner: Owner) -> bool:
        """Watch a lease for as long as its owner may be silent."""
        self.storage.say(
            f"process {owner.process} on {owner.host} may still hold {self.storage.url}; watching its lease for up to "
            f"{self.stale_seconds:g} s"
        )
        end = time.monotonic() + self.stale_seconds
        while time.monotonic() < end:
            time.sleep(min(2.0, self.refresh_seconds))
            now = self.storage.read(name)
            if now != before:
                return now is not None and not Owner.decoded(now).released
        return False

    def _try_to_take(self, names: list[str]) -> None:
        number = int(Path(names[-1]).stem) + 1 if names else 1
        name, content = f"{FOLDER}/{number:06d}.json", replace(self._owner, time=time.time()).encoded()
        if self.storage.create(name, content) and self.storage.list(FOLDER)[-1] == name:
            self._name, self._renewed = name, time.monotonic()
            self.storage.delete(names)

    def _refresh(self) -> None:
        while not self._ended.wait(self.refresh_seconds) and not self._lost:
            try:
                self._renew()
            except StorageError:  # the next commit says it, if it lasts so long
                continue

    def _renew(self) -> None:
        with self._writing:
            if self.storage.list(FOLDER)[-1:] != [self._name]:
                self._lost = True
                return
            self.storage.write(self._name, replace(self._owner, time=time.time()).encoded())
            self._renewed = time.monotonic()


def machine() -> str:
    """What two processes have in common that see each other's process ids."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return f"{platform.node()} {uuid.getnode()}"


def _lives(owner: Owner) -> bool:
    try:
        started: float = psutil.Process(owner.process).create_time()
        return abs(started - owner.started) < 1.0
    except psutil.NoSuchProcess:
        return False
