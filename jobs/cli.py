"""The command line: ``moe-audit run | plan | status | reduce | cells | prune | compare | validate | models``.

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
  moe-audit reduce runs/demo
  moe-audit cells contrasts.csv --out cells/
  moe-audit prune runs/importance --metric reap --keep 12 --out pruned/
  moe-audit compare runs/published_olmoe --published OLMoE-1B-7B-0924

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
    reduce = commands.add_parser("reduce", help="recompute every result of a run from its tables")
    cells = commands.add_parser("cells", help="statistics and verdicts of a contrast table, whoever measured it")
    prune = commands.add_parser("prune", help="write a smaller checkpoint without the experts a metric ranks lowest")
    compare = commands.add_parser("compare", help="a run beside the figures of arXiv 2606.10703")
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
    for command in (status, reduce, prune, compare):
        command.add_argument("dir", metavar="DIR", help="a run's folder")
    cells.add_argument("contrasts", metavar="CONTRASTS", help="a CSV or Parquet file; docs/tables.md has its columns")
    cells.add_argument("--out", metavar="DIR", required=True, help="where cells.parquet and cells.csv are written")
    cells.add_argument("--alpha", type=float, default=0.05, help="of a family of cells (default: 0.05)")
    cells.add_argument("--margin", type=float, default=0.1, help="|d| that is practically nothing (default: 0.1)")
    cells.add_argument("--draws", type=int, default=10_000, help="of the bootstrap (default: 10000)")
    cells.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    cells.add_argument(
        "--confirmatory",
        metavar="OUTCOME",
        nargs="+",
        default=["delta_loss", "kl"],
        help="outcomes named before the data were seen (default: delta_loss kl)",
    )
    prune.add_argument("--metric", required=True, help="a metric of results/metrics.parquet, such as reap")
    prune.add_argument("--keep", type=int, required=True, help="experts that every MoE layer keeps")
    prune.add_argument("--out", metavar="CKPT", required=True, help="the new checkpoint's folder, new or empty")
    compare.add_argument(
        "--published", metavar="MODEL", required=True, help="its published name, such as OLMoE-1B-7B-0924"
    )
    return top


if __name__ == "__main__":
    main()
