"""One fault at a time: what is lost of an audit's rows, and how long until work goes on.

    python -m benchmarks.recovery --markdown benchmarks/2026-01-01_recovery.md

The cases are those of tests/cluster/test_faults.py: an audit of twelve tasks of 0.2 seconds on a cluster of a head and
two nodes on this machine. Seconds are from the fault until a task is begun by a process that had begun none, or begun
once more; where no group was disturbed, until the next commit is through. Noticing, replacing and loading (of a worker
without a model) are in them. A dead node is known as such after 1.5 seconds here; Ray's default is 15.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path

import pandas as pd

from benchmarks.faults.cases import CASES, UNDISTURBED, run_case
from benchmarks.faults.nodes import Nodes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="", help="only the cases whose name this regular expression finds")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    rows = []
    with Nodes() as nodes, tempfile.TemporaryDirectory(prefix="recovery-") as place:
        undisturbed = run_case(UNDISTURBED, nodes, Path(place, "undisturbed"))
        for number, case in enumerate(case for case in CASES if re.search(arguments.case, case.name)):
            finding = run_case(case, nodes, Path(place, str(number)))
            row = {
                "what happened": case.name,
                "rows lost": finding.losses.lost,
                "rows twice": finding.losses.twice,
                "tables identical": "yes" if finding.results == undisturbed.results else "NO",
                "quarantined": len(finding.quarantined),
                "exit status": finding.status,
                "seconds until work went on": "" if finding.seconds is None else f"{finding.seconds:.1f}",
            }
            print(row, *finding.said, sep="\n", flush=True)
            rows.append(row)
    command = f" --case '{arguments.case}'" if arguments.case else ""
    text = f"`python -m benchmarks.recovery{command}`\n\n```\n{pd.DataFrame(rows).to_string(index=False)}\n```\n"
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
