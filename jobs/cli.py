"""The command line: ``moe-audit run | submit | plan | status | reduce | cells | prune | compare | validate | ...``.

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
  moe-audit plan --model deepseek_v3 --ranks 8 --device-memory 80GiB
  moe-audit status runs/demo
  moe-audit submit audit.yaml --out s3://bucket/run1 --address http://127.0.0.1:8265 --follow
  moe-audit stop JOB --address http://127.0.0.1:8265
  moe-audit reduce runs/demo
  moe-audit cells contrasts.csv --out cells/
  moe-audit prune runs/importance --metric reap --keep 12 --out pruned/
  moe-audit compare runs/published_olmoe --published OLMoE-1B-7B-0924

exit status: 0 all done, 1 done but for quarantined tasks or ended by an error, 2 a mistake in what was asked for,
130 or 143 stopped; the run command given again goes on where it was."""


SUBMIT_EXAMPLES = """examples:
  moe-audit submit configs/demo.yaml --out s3://bucket/demo --address http://127.0.0.1:8265 --follow
  moe-audit submit audit.yaml --out s3://bucket/run1 --address http://127.0.0.1:8265 \\
      --env AWS_ACCESS_KEY_ID --env AWS_SECRET_ACCESS_KEY
  moe-audit submit audit.yaml --out /nfs/run1 --on-cluster /nfs --set model.source=/nfs/OLMoE-1B-7B-0924 \\
      --address http://head:8265

uploaded are the code, the configuration, and the local texts and the small checkpoint it names: 100 MiB at most, and
nothing else. The same command again, under another job id, goes on where the run folder is. With --follow the exit
status is the audit's own; Ctrl-C leaves the job running."""


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
    plan = commands.add_parser(
        "plan", help="tasks, rows, predicted time and size of an audit, or what a model takes, without running it"
    )
    status = commands.add_parser("status", help="how far the run in a folder, or a job on a cluster, has come")
    submit = commands.add_parser(
        "submit",
        help="do an audit as a job on a Ray cluster",
        epilog=SUBMIT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    follow = commands.add_parser("follow", help="show what a job prints, and exit with its audit's status")
    stop = commands.add_parser("stop", help="end a job; what is finished is committed")
    reduce = commands.add_parser("reduce", help="recompute every result of a run from its tables")
    cells = commands.add_parser("cells", help="statistics and verdicts of a contrast table, whoever measured it")
    prune = commands.add_parser("prune", help="write a smaller checkpoint without the experts a metric ranks lowest")
    compare = commands.add_parser("compare", help="a run beside the figures of arXiv 2606.10703")
    validate = commands.add_parser("validate", help="check a specification against its model and its texts")
    cluster_check = commands.add_parser(
        "cluster-check", help="check files that start a cluster, without contacting any"
    )
    models = commands.add_parser(
        "models", help="what a checkpoint holds: layers, experts, top-k, router, shared experts"
    )
    for command in (run, submit, plan, validate, models):
        command.add_argument(
            "config",
            metavar="CONFIG",
            nargs="?" if command is plan else None,
            help="the audit's specification, a YAML file",
        )
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
    plan.add_argument(
        "--model",
        metavar="NAME",
        help="instead of CONFIG: memory and back ends of a model of configs/models, a folder or a hub model",
    )
    plan.add_argument("--ranks", type=int, metavar="N", help="processes that hold the model together")
    plan.add_argument("--device-memory", metavar="SIZE", help="of each rank's device, such as 80GiB")
    plan.add_argument("--host-memory", metavar="SIZE", help="of the host of all ranks (default: as much as is needed)")
    plan.add_argument(
        "--disk", action="store_true", default=None, help="layers may be kept on a local disk (model.offload_folder)"
    )
    for command in (reduce, prune, compare):
        command.add_argument("dir", metavar="DIR", help="a run's folder")
    _add_jobs(submit, status, follow, stop)
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
    cluster_check.add_argument(
        "files",
        metavar="FILE",
        nargs="+",
        help="for `ray up` or KubeRay: ray_cluster.yaml, configs/cluster/*.yaml",
    )
    prune.add_argument("--metric", required=True, help="a metric of results/metrics.parquet, such as reap")
    prune.add_argument("--keep", type=int, required=True, help="experts that every MoE layer keeps")
    prune.add_argument("--out", metavar="CKPT", required=True, help="the new checkpoint's folder, new or empty")
    compare.add_argument(
        "--published", metavar="MODEL", required=True, help="its published name, such as OLMoE-1B-7B-0924"
    )
    return top


def _add_jobs(
    submit: argparse.ArgumentParser,
    status: argparse.ArgumentParser,
    follow: argparse.ArgumentParser,
    stop: argparse.ArgumentParser,
) -> None:
    submit.add_argument("--out", metavar="URL", required=True, help="the run's folder, as the cluster reaches it")
    submit.add_argument("--follow", action="store_true", help="show what the job prints, and exit with its status")
    submit.add_argument("--job-id", metavar="JOB", help="the job's name (default: of the audit's name and the time)")
    submit.add_argument(
        "--env",
        metavar="NAME",
        action="append",
        default=[],
        help="forward a variable of this environment, such as AWS_ACCESS_KEY_ID; may be repeated. "
        "Whoever may use the cluster can read it",
    )
    submit.add_argument(
        "--on-cluster",
        metavar="PATH",
        action="append",
        default=[],
        help="every node has this absolute path and all below it: nothing of it is uploaded; may be repeated",
    )
    submit.add_argument("--python", default="python", help="the cluster's Python that has moe-audit's dependencies")
    status.add_argument("dir", metavar="DIR_OR_JOB", help="a run's folder; with --address, a job")
    for command in (follow, stop):
        command.add_argument("job", metavar="JOB", help="as `moe-audit submit` printed it")
    for command in (submit, status, follow, stop):
        command.add_argument(
            "--address",
            metavar="URL",
            required=command is not status,
            help="the dashboard of the cluster, such as http://127.0.0.1:8265; its token is RAY_AUTH_TOKEN",
        )


if __name__ == "__main__":
    main()
