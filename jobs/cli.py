"""The command line: ``moe-audit run | plan | status | validate | models``.

What the commands do is in ``jobs.commands``, imported when one is called: help is answered without loading anything.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

EXAMPLES = """examples:
  moe-audit run configs/demo.yaml --out runs/demo
  moe-audit run audit.yaml --out runs/code --set layers=[1,3] --set positions.sample=500
  moe-audit plan audit.yaml --set scope=sequence
  moe-audit status runs/demo

exit status: 0 all done, 1 done but for quarantined tasks or ended by an error, 2 a mistake in what was asked for,
130 or 143 stopped; the run command given again goes on where it was."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its status."""
    given = parser().parse_args(arguments)
    commands = importlib.import_module("jobs.commands")
    sys.exit(commands.call(given.command, given))


def parser() -> argparse.ArgumentParser:
    """The commands and what they take."""
    top = argparse.ArgumentParser(
        prog="moe-audit",
        description="Exact effects of removing experts, token by token, and an audit of the metrics that claim them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="do an audit, or what is missing of it, into a folder")
    plan = commands.add_parser("plan", help="tasks, rows, predicted time and size of an audit, without running it")
    status = commands.add_parser("status", help="how far the run in a folder has come")
    validate = commands.add_parser("validate", help="check a specification against its model and its texts")
    models = commands.add_parser(
        "models", help="what a checkpoint holds: layers, experts, top-k, router, shared experts"
    )
    for command in (run, plan, validate, models):
        command.add_argument("config", metavar="CONFIG", help="the audit's specification, a YAML file")
        command.add_argument(
            "--set",
            metavar="KEY=VALUE",
            action="append",
            default=[],
            help="override one key; may be repeated, the last wins",
        )
    run.add_argument(
        "--out", metavar="DIR", required=True, help="the run's folder: a path, or a URL such as s3://bucket/run1"
    )
    run.add_argument(
        "--display",
        choices=("auto", "bar", "lines", "none"),
        default="auto",
        help="how progress is shown (default: auto)",
    )
    status.add_argument("dir", metavar="DIR", help="a run's folder")
    return top


if __name__ == "__main__":
    main()
