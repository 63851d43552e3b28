"""The command that checks cluster files: every mistake on a line of its own, and a status that scripts can use."""

from __future__ import annotations

from pathlib import Path

import pytest
from shapes import Call

ROOT = Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.usefixtures("home_with_token")


def test_files_in_order_are_told_and_so_is_what_they_start(call: Call) -> None:
    status, out, err = call("cluster-check", "ray_cluster.yaml", "configs/cluster/kuberay-rayjob.yaml")
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "ray_cluster.yaml is in order: a cluster on aws: gpu_worker 0..8 x {'CPU': 8, 'GPU': 1}",
        "configs/cluster/kuberay-rayjob.yaml is in order: a RayJob for Kubernetes: gpu 0..8 x 1 GPU",
    ]


def test_every_mistake_of_a_file_is_a_line_and_the_status_is_2(tmp_path: Path, call: Call) -> None:
    mistaken = (ROOT / "ray_cluster.yaml").read_text().replace("127.0.0.1", "0.0.0.0").replace("=token ", "=disabled ")
    (tmp_path / "open.yaml").write_text(mistaken)
    status, out, err = call("cluster-check", tmp_path / "open.yaml", "ray_cluster.yaml")
    assert status == 2
    assert out.startswith("ray_cluster.yaml is in order")
    assert [line.split(": ")[2:4] for line in err.splitlines()] == [
        ["head_start_ray_commands.1", "RAY_AUTH_MODE"],
        ["head_start_ray_commands.1", "--dashboard-host"],
        ["worker_start_ray_commands.1", "RAY_AUTH_MODE"],
    ]
    assert all(line.startswith(f"moe-audit: {tmp_path / 'open.yaml'}: ") for line in err.splitlines())


def test_what_is_no_cluster_file_is_one_sentence(call: Call) -> None:
    status, out, err = call("cluster-check", "configs/demo.yaml")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "neither a provider nor a kind" in err
