"""The files that are shipped pass, and every rule is seen to refuse a file that breaks it."""

from __future__ import annotations

import copy
import importlib.metadata
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.autoscaler._private import aws, gcp

from audit.config import ConfigError
from cluster.files.cluster_files import check_cluster_file
from cluster.files.file_checks import Findings, pinned_ray
from cluster.files.launcher_file import MACHINES, PROVIDER_KEYS

ROOT = Path(__file__).resolve().parents[2]
AWS, GCP = "ray_cluster.yaml", "configs/cluster/gcp.yaml"
JOB, POLICY = "configs/cluster/kuberay-rayjob.yaml", "configs/cluster/kuberay-network-policy.yaml"
DOCKERFILE = "configs/cluster/Dockerfile"

Data = dict[str, Any]
Change = Callable[[Data], object]


@pytest.fixture(autouse=True)
def place(home_with_token: Path) -> Path:
    return home_with_token


def changed(place: Path, file: str, change: Change) -> Findings:
    """What the check finds in a copy of a shipped file after a change."""
    data = yaml.safe_load((ROOT / file).read_text())
    before = copy.deepcopy(data)
    change(data)
    assert data != before, "the change changes nothing"
    (place / "copy.yaml").write_text(yaml.safe_dump(data))
    return check_cluster_file(place / "copy.yaml")


def put(path: str | tuple[str, ...], value: object) -> Change:
    """Set the value at ``a/b/0/c``; a missing last key is added."""

    def change(data: Data) -> None:
        *parts, last = _parts(path)
        _at(data, parts)[last] = value

    return change


def drop(path: str | tuple[str, ...]) -> Change:
    def change(data: Data) -> None:
        *parts, last = _parts(path)
        del _at(data, parts)[last]

    return change


def both(first: Change, second: Change) -> Change:
    return lambda data: (first(data), second(data))


def edit(path: str, old: str, new: str) -> Change:
    """Replace a piece of the text at a path."""

    def change(data: Data) -> None:
        text = _at(data, _parts(path))
        assert old in text
        put(path, text.replace(old, new))(data)

    return change


def _parts(path: str | tuple[str, ...]) -> list[Any]:
    parts = path.split("/") if isinstance(path, str) else path
    return [int(part) if part.isdecimal() else part for part in parts]


def _at(data: Any, parts: list[Any]) -> Any:
    for part in parts:
        data = data[part]
    return data


HEAD, WORKER = "head_start_ray_commands/1", "worker_start_ray_commands/1"
NODE = "available_node_types/gpu_worker"
NODE_CONFIG = f"{NODE}/node_config"
WORKERS = "spec/rayClusterSpec/workerGroupSpecs/0"
HEAD_POD = "spec/rayClusterSpec/headGroupSpec/template/spec/containers/0"
WORKER_POD = f"{WORKERS}/template/spec/containers/0"
TOKEN = ("file_mounts", "/home/ray/.ray/auth_token")
BY_LINT: list[tuple[str, Change, str, str, str]] = [
    # file, change, the field that is named, the value that is named, what would be right
    (AWS, put("provider/regoin", "x"), "provider.regoin", "'x'", "availability_zone"),
    (AWS, put("provider/project_id", "x"), "provider.project_id", "'x'", "the keys of aws"),
    (GCP, put("provider/availabilty_zone", "x"), "provider.availabilty_zone", "'x'", "availability_zone"),
    (GCP, put("provider/project_id", None), "provider.project_id", "no value", "needed"),
    (AWS, put("provider/type", "azure"), "provider.type", "'azure'", "aws or gcp"),
    (AWS, drop("provider/region"), "provider.region", "no value", "needed"),
    (AWS, put("provider/cache_stopped_nodes", True), "provider.cache_stopped_nodes", "True", "false"),
    (AWS, drop("provider/cache_stopped_nodes"), "provider.cache_stopped_nodes", "no value", "false"),
    (AWS, drop("provider/security_group"), "provider.security_group", "no value", "needed"),
    (
        AWS,
        put("provider/security_group/IpPermissions", [{"IpProtocol": "tcp", "FromPort": 8265, "ToPort": 8265}]),
        "provider.security_group.IpPermissions.0",
        "8265",
        "port 22 only",
    ),
    (AWS, put("docker/head_image", "rayproject/ray:latest"), "docker.head_image", "latest", ray.__version__),
    (AWS, put("docker/worker_image", "rayproject/ray:2.59.0-gpu"), "docker.worker_image", "2.59.0", ray.__version__),
    (GCP, put("docker/worker_image", "rayproject/ray"), "docker.worker_image", "rayproject/ray", ray.__version__),
    (AWS, put(f"{NODE}/node_config/InstanceMarketOptions", {"MarketType": "Spot"}), "MarketType", "'Spot'", "spot"),
    (
        AWS,
        put("available_node_types/head/node_config/InstanceMarketOptions", {"MarketType": "spot"}),
        "available_node_types.head.node_config",
        "spot",
        "must not be one",
    ),
    (
        GCP,
        put("available_node_types/head/node_config/scheduling", [{"preemptible": True}]),
        "available_node_types.head.node_config",
        "spot",
        "must not be one",
    ),
    (
        GCP,
        drop(f"{NODE}/node_config/scheduling/onHostMaintenance"),
        "scheduling.onHostMaintenance",
        "no value",
        "TERMINATE",
    ),
    (
        GCP,
        edit(f"{NODE}/node_config/serviceAccounts/0/email", "my-project", "another"),
        "gpu_worker.node_config.serviceAccounts.0.email",
        "another",
        "an account of my-project",
    ),
    (AWS, put("available_node_types/head/max_workers", 1), "available_node_types.head.max_workers", "1", "0"),
    (AWS, drop(f"{NODE}/max_workers"), "gpu_worker.max_workers", "no value", "whole number"),
    (AWS, drop(f"{NODE}/min_workers"), "gpu_worker.min_workers", "no value", "whole number"),
    (AWS, put(f"{NODE}/resources/GPU", 8), "gpu_worker.resources.GPU", "8", "g6e.2xlarge has 1"),
    (AWS, put(f"{NODE}/resources/CPU", 48), "gpu_worker.resources.CPU", "48", "g6e.2xlarge has 8"),
    (GCP, put(f"{NODE}/resources", {"CPU": 12}), "gpu_worker.resources.GPU", "0", "a2-highgpu-1g has 1"),
    (AWS, put(f"{NODE}/node_config/InstanceType", "p5.48xlarge"), "gpu_worker.resources.GPU", "1", "has 8"),
    (AWS, drop(f"{NODE}/node_config/InstanceType"), "node_config.InstanceType", "no value", "name of a type"),
    (AWS, drop(f"{NODE}/node_config/ImageId"), "gpu_worker.node_config.ImageId", "no value", "driver too old"),
    (AWS, put(f"{NODE}/node_config/ImageId", "ami-..."), "gpu_worker.node_config.ImageId", "'ami-...'", "resolve:ssm:"),
    (AWS, drop("setup_commands"), "setup_commands", "no value", "nightly"),
    (AWS, put("setup_commands", []), "setup_commands", "[]", "constraints.txt"),
    (
        GCP,
        put("setup_commands/1", "pip install 'ray @ https://x/wheels/latest/ray-3.0.0.dev0.whl'"),
        "setup_commands.1",
        "ray-3.0.0.dev0",
        "no nightly Ray",
    ),
    (AWS, put("setup_commands/0", "pip install 'ray[default]==2.59.0'"), "setup_commands.0", "2.59.0", ray.__version__),
    (
        AWS,
        put("setup_commands/0", "pip install -r /home/ray/requirements.txt"),
        "setup_commands.0",
        "/home/ray/requirements.txt",
        "file_mounts",
    ),
    (AWS, drop("head_start_ray_commands"), "head_start_ray_commands", "no value", "no token"),
    (AWS, drop("worker_start_ray_commands"), "worker_start_ray_commands", "no value", "no token"),
    (AWS, drop("head_start_ray_commands/0"), "head_start_ray_commands.0", "ulimit", "`ray stop`"),
    (AWS, drop("worker_start_ray_commands/0"), "worker_start_ray_commands.0", "ulimit", "`ray stop`"),
    (AWS, drop(HEAD), "head_start_ray_commands", "ray stop", "one `ray start`"),
    (AWS, edit(HEAD, "RAY_AUTH_MODE=token ", ""), "head_start_ray_commands.1: RAY_AUTH_MODE", "no value", "=token"),
    (AWS, edit(WORKER, "RAY_AUTH_MODE=token ", ""), "worker_start_ray_commands.1: RAY_AUTH_MODE", "no value", "=token"),
    (AWS, edit(WORKER, "=token", "=disabled"), "worker_start_ray_commands.1: RAY_AUTH_MODE", "'disabled'", "=token"),
    (AWS, edit(HEAD, "127.0.0.1", "0.0.0.0"), "--dashboard-host", "'0.0.0.0'", "127.0.0.1"),
    (GCP, edit(HEAD, " --dashboard-host=127.0.0.1", ""), "--dashboard-host", "no value", "127.0.0.1"),
    (
        AWS,
        edit(HEAD, " --autoscaling-config=~/ray_bootstrap_config.yaml", ""),
        "--autoscaling-config",
        "no value",
        "~/ray_bootstrap_config.yaml",
    ),
    (AWS, edit(HEAD, " --disable-usage-stats", ""), "--disable-usage-stats", "no value", "--disable-usage-stats"),
    (AWS, edit(HEAD, "--head ", ""), "--head", "no value", "--head"),
    (AWS, edit(HEAD, " --object-manager-port=8076", ""), "--object-manager-port", "no value", "8076"),
    (AWS, edit(WORKER, "8076", "8077"), "worker_start_ray_commands.1: --object-manager-port", "'8077'", "8076"),
    (AWS, edit(WORKER, ":6379", ":6380"), "worker_start_ray_commands.1: --address", "6380", "$RAY_HEAD_IP:6379"),
    (AWS, drop(TOKEN), "file_mounts./home/ray/.ray/auth_token", "no value", "~/.ray/auth_token"),
    (
        AWS,
        put(TOKEN, "~/nothing"),
        "file_mounts./home/ray/.ray/auth_token",
        "~/nothing",
        "ray get-auth-token --generate",
    ),
]


@pytest.mark.parametrize("file", [AWS, GCP, JOB, POLICY])
def test_what_is_shipped_passes_and_needs_no_remark(file: str) -> None:
    found = check_cluster_file(Path(file))
    assert (found.mistakes, found.remarks) == ([], [])


@pytest.mark.parametrize(("file", "change", "name", "value", "right"), BY_LINT)
def test_what_ray_lets_pass_is_refused(
    place: Path, file: str, change: Change, name: str, value: str, right: str
) -> None:
    found = changed(place, file, change)
    assert any(name in m and value in m and right in m for m in found.mistakes), found.mistakes
    assert not any("\n" in m for m in found.mistakes)


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        (AWS, put("max_worker", 3), "max_worker"),
        (AWS, put(f"{NODE}/min_worker", 3), "min_worker"),
        (AWS, put("docker/container", "x"), "container"),
        (AWS, put("provider/security_group/Name", "x"), "Name"),
        (AWS, put("head_node_type", "haed"), "head_node_type"),
        (AWS, put(f"{NODE}/min_workers", 9), "min_workers"),
        (AWS, put(f"{NODE}/resources/GPU", 0.5), "0.5"),
        (GCP, put(f"{NODE}/resources/GPU", "1"), "'1'"),
        (GCP, drop("docker/container_name"), "container"),
        (GCP, put("idle_timeout_minutes", "five"), "five"),
    ],
)
def test_what_ray_itself_refuses_is_told_in_one_line(place: Path, file: str, change: Change, told: str) -> None:
    (mistake,) = changed(place, file, change).mistakes
    assert told in mistake
    assert "\n" not in mistake


@pytest.mark.parametrize(
    ("file", "change", "name"),
    [
        (AWS, drop(f"{NODE_CONFIG}/InstanceMarketOptions"), "gpu_worker.node_config: not spot"),
        (GCP, drop(f"{NODE_CONFIG}/scheduling/provisioningModel"), "gpu_worker.node_config: not spot"),
        (AWS, drop(f"{NODE_CONFIG}/IamInstanceProfile"), "gpu_worker.node_config.IamInstanceProfile"),
        (GCP, drop(f"{NODE_CONFIG}/serviceAccounts"), "gpu_worker.node_config.serviceAccounts"),
        (AWS, put(f"{NODE}/min_workers", 1), "gpu_worker.min_workers: 1 nodes"),
        (AWS, put(f"{NODE_CONFIG}/InstanceType", "trn2.48xlarge"), "gpu_worker.resources: not compared"),
        (JOB, put("spec/shutdownAfterJobFinishes", False), "spec.shutdownAfterJobFinishes"),
        (JOB, edit("spec/entrypoint", "exec ", ""), "spec.entrypoint"),
        (JOB, both(put(f"{WORKERS}/minReplicas", 1), put(f"{WORKERS}/replicas", 1)), "minReplicas: 1 workers"),
    ],
)
def test_what_is_for_somebody_to_decide_is_a_remark(place: Path, file: str, change: Change, name: str) -> None:
    found = changed(place, file, change)
    assert found.mistakes == []
    assert [name in remark for remark in found.remarks] == [True]


def test_a_token_that_others_can_read_is_remarked(place: Path) -> None:
    (place / "home/.ray/auth_token").chmod(0o644)
    assert "chmod 600" in check_cluster_file(Path(AWS)).remarks[0]
    (place / "home/.ray/auth_token").unlink()
    assert "ray get-auth-token --generate" in check_cluster_file(Path(AWS)).mistakes[0]


def test_pins_of_a_mounted_file_are_read(place: Path) -> None:
    pins = (ROOT / "constraints.txt").read_text()
    (place / "old.txt").write_text(re.sub(r"(?m)^ray==.*$", "ray==2.59.0", pins))
    source = ("file_mounts", "/home/ray/moe-audit/constraints.txt")
    mistakes = changed(place, AWS, put(source, str(place / "old.txt"))).mistakes
    assert {m.partition(":")[0] for m in mistakes} == {"setup_commands.0", "head_setup_commands.0"}
    assert all("ray==2.59.0" in m and ray.__version__ in m for m in mistakes)


def test_another_way_to_write_a_start_is_read_the_same(place: Path) -> None:
    written = "export RAY_AUTH_MODE=token && ray start --head --port 6379 --object-manager-port 8076 " \
        "--autoscaling-config ~/ray_bootstrap_config.yaml --dashboard-host localhost --disable-usage-stats"  # fmt: skip
    assert changed(place, AWS, put(HEAD, written)).mistakes == []


@pytest.mark.parametrize("kind", sorted(PROVIDER_KEYS))
def test_every_known_provider_key_is_one_that_ray_reads(kind: str) -> None:
    own = {"aws": aws, "gcp": gcp}[kind]
    shared = Path(ray.__file__).parent / "autoscaler/_private"
    sources = [*Path(own.__path__[0]).rglob("*.py"), *shared.glob("*.py")]
    text = "\n".join(source.read_text() for source in sources)
    for key in PROVIDER_KEYS[kind]:
        assert f'"{key}"' in text, key


def test_known_machines_are_consistent() -> None:
    """Within a family of one size of GPU, CPUs grow with the size; the figures of the shipped files are among them."""
    assert {"g6e.2xlarge", "m6i.2xlarge", "a2-highgpu-1g", "n2-standard-8"} <= MACHINES.keys()
    assert MACHINES["p5.48xlarge"] == (192, 8)
    assert MACHINES["g6e.12xlarge"] == (48, 4)
    assert MACHINES["a3-highgpu-8g"] == (208, 8)


@pytest.mark.parametrize(
    ("change", "name", "value", "right"),
    [
        (put("spec/rayClusterSpec/authOption", {}), "rayClusterSpec.authOption", "unknown key", "authOptions"),
        (put("spec/shutdownAfterJobFinished", True), "spec.shutdownAfterJobFinished", "unknown key", "Finishes"),
        (put(f"{WORKERS}/template/spec/tolerations/0/effekt", "x"), "tolerations.0.effekt", "unknown key", "effect"),
        (put("apiVersion", "ray.io/v1alpha1"), "apiVersion", "v1alpha1", "ray.io/v1"),
        (put("kind", "RayCluster"), "kind", "RayCluster", "RayJob or NetworkPolicy"),
        (put("metadata/name", "MoE_audit"), "metadata.name", "MoE_audit", "lower-case"),
        (drop("spec/rayClusterSpec/authOptions"), "rayClusterSpec.authOptions", "missing", "mode: token"),
        (put("spec/rayClusterSpec/authOptions/mode", "disabled"), "authOptions.mode", "'disabled'", "token"),
        (put("spec/rayClusterSpec/rayVersion", "2.59.0"), "rayClusterSpec.rayVersion", "2.59.0", ray.__version__),
        (put(f"{HEAD_POD}/image", "x/moe-audit:0.1.0"), "headGroupSpec.template", "0.1.0", ray.__version__),
        (put(f"{WORKER_POD}/image", "x/moe-audit:ray2.59.0"), "workerGroupSpecs.0.template", "2.59.0", ray.__version__),
        (put("spec/rayClusterSpec/enableInTreeAutoscaling", False), "enableInTreeAutoscaling", "False", "true"),
        (put("spec/rayClusterSpec/autoscalerOptions/version", "v1"), "autoscalerOptions.version", "'v1'", "v2"),
        (put("spec/rayClusterSpec/headGroupSpec/rayStartParams", {}), "dashboard-host", "no value", "0.0.0.0"),
        (
            put((*HEAD_POD.split("/"), "resources", "limits", "nvidia.com/gpu"), "1"),
            "headGroupSpec.template",
            "'1'",
            "leave it out",
        ),
        (put(f"{WORKER_POD}/resources/limits", {"cpu": "8"}), "limits.nvidia.com/gpu", "no value", "Ray sees none"),
        (put(f"{WORKER_POD}/resources/limits/cpu", 8), "limits", "cannot be used", "quoted"),
        (put(f"{WORKERS}/minReplicas", 9), "workerGroupSpecs.0.minReplicas", "9", "at most maxReplicas, 8"),
        (put(f"{WORKERS}/replicas", 9), "workerGroupSpecs.0.replicas", "9", "0 to 8"),
        (put(f"{WORKERS}/maxReplicas", 0), "workerGroupSpecs.0.maxReplicas", "0", "at least 1"),
        (put("spec/runtimeEnvYAML", "env_vars: {}"), "RAY_JOB_STOP_WAIT_TIME_S", "no value", "60"),
        (edit("spec/runtimeEnvYAML", "120", "3"), "RAY_JOB_STOP_WAIT_TIME_S", "'3'", "60"),
        (edit("spec/runtimeEnvYAML", '"120"', "120"), "RAY_JOB_STOP_WAIT_TIME_S", "120", "quote it"),
        (put("spec/runtimeEnvYAML", "pip: [x]"), "runtimeEnvYAML.pip", "['x']", "env_vars"),
        (put("spec/runtimeEnvYAML", "a: ]"), "runtimeEnvYAML", "", "YAML"),
        (edit("spec/entrypoint", "jobs.run_audit", "jobs.audit_run"), "spec.entrypoint", "audit_run", "jobs.run_audit"),
        (put("spec/entrypoint", "exec python run.py"), "spec.entrypoint", "run.py", "jobs.run_audit"),
        (edit("spec/entrypoint", "--out", "--to"), "spec.entrypoint", "", "--out"),
    ],
)
def test_a_mistaken_job_for_kubernetes_is_refused(
    place: Path, change: Change, name: str, value: str, right: str
) -> None:
    mistakes = changed(place, JOB, change).mistakes
    assert any(name in m and value in m and right in m for m in mistakes), mistakes
    assert not any("\n" in m for m in mistakes)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (drop("spec/ingress/1/ports"), "spec.ingress.1.ports"),
        (put("spec/ingress/1/ports/0/port", 6379), "spec.ingress.1.ports"),
        (put("spec/ingress/0/from/0", {"namespaceSelector": {}}), "spec.ingress.0.ports"),
        (put("spec/ingress/1/ports/0/port", 8080), "spec.ingress.1.ports"),
        (put("spec/podSelector", {}), "spec.podSelector"),
        (put("spec/policyTypes", ["Egress"]), "spec.policyTypes"),
        (put("spec/ingres", []), "spec.ingres"),
    ],
)
def test_a_policy_that_lets_in_more_is_refused(place: Path, change: Change, name: str) -> None:
    assert any(m.startswith(name) for m in changed(place, POLICY, change).mistakes)


def test_the_rule_for_prometheus_of_the_documentation_is_in_order(place: Path) -> None:
    text = (ROOT / "docs/cluster.md").read_text()
    (rule,) = yaml.safe_load(re.findall(r"```yaml\n(    - from:.*?)```", text, re.DOTALL)[0])
    assert changed(place, POLICY, lambda data: data["spec"]["ingress"].append(rule)).mistakes == []


def test_the_policy_is_about_the_pods_of_the_job() -> None:
    policy, job = (yaml.safe_load((ROOT / file).read_text()) for file in (POLICY, JOB))
    selected = policy["spec"]["podSelector"]["matchLabels"]
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group["template"]["metadata"]["labels"] == selected


def test_every_file_starts_the_ray_that_is_pinned_and_installed() -> None:
    pinned = pinned_ray((ROOT / "constraints.txt").read_text().splitlines())
    assert pinned == ray.__version__ == importlib.metadata.version("ray")
    image = f"rayproject/ray:{pinned}-py311"
    dockerfile = (ROOT / DOCKERFILE).read_text()
    assert f"\nFROM {image}-cu128\n" in dockerfile
    for file in (AWS, GCP):
        docker = yaml.safe_load((ROOT / file).read_text())["docker"]
        assert (docker["head_image"], docker["worker_image"]) == (image, f"{image}-cu128")
    for copied in re.findall(r"(?m)^COPY --chown=ray (.*) \S+$", dockerfile):
        assert all((ROOT / name).exists() for name in copied.split()), copied


def test_what_is_no_cluster_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"demo\.yaml' has neither a provider nor a kind; it takes"):
        check_cluster_file(ROOT / "configs/demo.yaml")
    with pytest.raises(ConfigError, match="does not exist"):
        check_cluster_file(tmp_path / "nothing.yaml")
    (tmp_path / "twice.yaml").write_text("max_workers: 1\nmax_workers: 2\n")
    with pytest.raises(ConfigError, match="'max_workers' is there twice"):
        check_cluster_file(tmp_path / "twice.yaml")
