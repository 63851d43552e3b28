"""Checks of the files that start a cluster, offline: Ray's launcher (``ray up``) on AWS and Google Cloud, and KubeRay.

What Ray checks itself is checked by Ray; what it lets pass, and what would cost money, open a port or fail on a machine
that is already paid for, is checked here. Nothing is contacted.
"""

from __future__ import annotations

from pathlib import Path

from audit.config import ConfigError
from audit.config.files import read_yaml
from cluster.files import kuberay_files, launcher_file
from cluster.files.file_checks import Findings


def check_cluster_file(path: Path) -> Findings:
    """Check one file; paths in it are relative to the working directory, as for ``ray up``.

    Raises ConfigError where it is no YAML, or of no kind that is known.
    """
    data = read_yaml(path)
    if isinstance(data.get("provider"), dict):
        return launcher_file.check(data)
    if "kind" in data:
        return kuberay_files.check(data)
    raise ConfigError(
        f"{str(path)!r} has neither a provider nor a kind; it takes a file for `ray up`, such as ray_cluster.yaml, or"
        " one for KubeRay, such as configs/cluster/kuberay-rayjob.yaml"
    )
