"""Run the stub's job in a process of its own and end it by SIGKILL: killed_driver.py FOLDER MOMENT COUNT.

MOMENT ``manifest``: when the files of commit COUNT are written and its manifest is not. ``answer``: when COUNT tasks
have an answer.
"""

from __future__ import annotations

import os
import signal
import sys

from stub_job import make_job

from audit.runfolder import Manifest, RunFolder
from cluster.display import NoDisplay, Status
from cluster.run import execute


class Folder(RunFolder):
    commits = 0

    def commit(self, manifest: Manifest) -> None:
        self.commits += 1
        if sys.argv[2] == "manifest" and self.commits == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        super().commit(manifest)


class Watch(NoDisplay):
    def show(self, status: Status) -> None:
        if sys.argv[2] == "answer" and status.stage == "effects" and status.tasks_done >= int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    execute(make_job(calibration=2, seconds=0.05), Folder(sys.argv[1]), Watch())
