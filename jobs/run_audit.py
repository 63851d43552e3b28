"""The program a job on a cluster starts: ``python -m jobs.run_audit --config C --out URL [--set KEY=VALUE ...]``.

It is ``moe-audit run`` with progress as plain lines, and ends with the same status. Where RAY_ADDRESS names a cluster,
as it does in a job, the audit runs there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jobs import cli

EXAMPLES = """example, from a checkout on a machine that reaches the cluster's dashboard:
  ray job submit --address http://127.0.0.1:8265 --working-dir . \\
      --runtime-env-json '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}}' -- \\
      python -m jobs.run_audit --config configs/importance.yaml --out s3://bucket/importance

`moe-audit submit` does the same from anywhere, uploads what the configuration names, and can follow the job."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the audit and exit with its status."""
    given = parser().parse_args(arguments)
    changes = [part for change in given.set for part in ("--set", change)]
    try:
        cli.main(["run", given.config, "--out", given.out, "--display", "lines", *changes])
    except ModuleNotFoundError as error:
        print(
            f"moe-audit: {sys.executable} on this node has no module {error.name!r}; the cluster's image needs what "
            "`pip install moe-audit` installs, and `python` has to be the one that has it",
            file=sys.stderr,
        )
        sys.exit(1)


def parser() -> argparse.ArgumentParser:
    """What the program takes."""
    top = argparse.ArgumentParser(
        prog="python -m jobs.run_audit",
        description="Do an audit, or what is missing of it, as a job on a Ray cluster.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--config", metavar="CONFIG", required=True, help="the audit's specification, a YAML file")
    top.add_argument(
        "--out", metavar="URL", required=True, help="the run's folder: a URL such as s3://bucket/run1, or a shared path"
    )
    top.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="override one key; may be repeated"
    )
    return top


if __name__ == "__main__":
    main()
