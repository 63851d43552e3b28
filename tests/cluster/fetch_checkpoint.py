"""Fetch a checkpoint in a process of its own: fetch_checkpoint.py RECORD; prints the folder."""

from __future__ import annotations

import json
import sys

from cluster.groups.checkpoint_cache import Checkpoint, CheckpointFile, fetch

if __name__ == "__main__":
    record = json.loads(sys.argv[1])
    print(fetch(Checkpoint(record["url"], tuple(CheckpointFile(**file) for file in record["files"]))))
