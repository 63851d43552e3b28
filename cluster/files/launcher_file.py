"""A file for ``ray up``: checked by Ray's own code, then for what Ray lets pass.

The only module that uses Ray's private code for cluster files.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import logging
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import ray
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

from cluster.files.file_checks import Findings, as_mapping, pinned_ray

# The keys of `provider` that Ray 2.60 reads; its schema lets every other one pass. test_cluster_files looks them up in
# Ray's source.
_COMMON_KEYS = (
    "type",
    "region",
    "availability_zone",
    "cache_stopped_nodes",
    "use_internal_ips",
    "use_external_head_ip",
)
PROVIDER_KEYS: Mapping[str, tuple[str, ...]] = {
    "aws": (*_COMMON_KEYS, "security_group", "key_pair", "aws_credentials", "cloudwatch"),
    "gcp": (*_COMMON_KEYS, "project_id", "gcp_credentials"),
}
_REQUIRED_KEYS = {
    "aws": ("region", "availability_zone", "security_group"),
    "gcp": ("region", "availability_zone", "project_id"),
}

# (CPU, GPU) of machine types that audits are likely to run on, from the providers' own lists.
MACHINES: Mapping[str, tuple[int, int]] = {
    # AWS: g4dn has T4 (16 GB), g5 A10G (24 GB), g6 L4 (24 GB), g6e L40S (48 GB), p4d A100 (40 GB), p5 H100 (80 GB)
    **{f"{g}.{size}": (cpus, 1) for g in ("g5", "g6", "g6e") for size, cpus in
       (("xlarge", 4), ("2xlarge", 8), ("4xlarge", 16), ("8xlarge", 32), ("16xlarge", 64))},
    **{f"{g}.{size}": counts for g in ("g5", "g6", "g6e") for size, counts in
       (("12xlarge", (48, 4)), ("24xlarge", (96, 4)), ("48xlarge", (192, 8)))},
    **{f"g4dn.{size}": (cpus, 1) for size, cpus in
       (("xlarge", 4), ("2xlarge", 8), ("4xlarge", 16), ("8xlarge", 32), ("16xlarge", 64))},
    "g4dn.12xlarge": (48, 4),
    "p4d.24xlarge": (96, 8),
    "p4de.24xlarge": (96, 8),
    "p5.4xlarge": (16, 1),
    "p5.48xlarge": (192, 8),
    "p5e.48xlarge": (192, 8),
    "p5en.48xlarge": (192, 8),
    **{f"{m}.{size}": (cpus, 0) for m in ("m6i", "m7i", "r6i", "r7i", "c6i", "c7i") for size, cpus in
       (("xlarge", 4), ("2xlarge", 8), ("4xlarge", 16), ("8xlarge", 32))},
    # Google Cloud: g2 has L4 (24 GB), a2-highgpu A100 (40 GB), a2-ultragpu A100 (80 GB), a3-highgpu H100 (80 GB)
    **{f"g2-standard-{cpus}": (cpus, gpus) for cpus, gpus in
       ((4, 1), (8, 1), (12, 1), (16, 1), (24, 2), (32, 1), (48, 4), (96, 8))},
    **{f"a2-highgpu-{gpus}g": (12 * gpus, gpus) for gpus in (1, 2, 4, 8)},
    "a2-megagpu-16g": (96, 16),
    **{f"a2-ultragpu-{gpus}g": (12 * gpus, gpus) for gpus in (1, 2, 4, 8)},
    **{f"a3-highgpu-{gpus}g": (26 * gpus, gpus) for gpus in (1, 2, 4, 8)},
    **{f"{m}-{kind}-{cpus}": (cpus, 0) for m in ("n1", "n2", "e2") for kind in ("standard", "highmem")
       for cpus in (2, 4, 8, 16)},
}  # fmt: skip

_TOKEN_TARGET = "/home/ray/.ray/auth_token"
_IMAGE_ID = re.compile(r"ami-[0-9a-f]{8,17}|resolve:ssm:/\S+")


@dataclass(frozen=True, slots=True)
class _RayStart:
    """One ``ray start`` of a list of shell commands: where it stands, its environment and its flags."""

    name: str
    environment: Mapping[str, str]
    flags: Mapping[str, str]


def check(data: Mapping[str, Any]) -> Findings:
    """Ray's own checks; where they pass, ours."""
    kind = str(data["provider"].get("type"))
    found = Findings(f"a cluster on {kind}")
    if kind not in PROVIDER_KEYS:
        found.wrong("provider.type", data["provider"].get("type"), f"it takes {' or '.join(PROVIDER_KEYS)}")
        return found
    _check_mounts(found, data)
    if not found.mistakes:
        _check_by_ray(found, data)
    if found.mistakes:
        return found
    with _quiet():
        prepared = prepare_config(copy.deepcopy(dict(data)))
    _check_provider(found, data["provider"], kind)
    _check_docker(found, as_mapping(data.get("docker")))
    for name, node in prepared["available_node_types"].items():
        place = f"available_node_types.{name}"
        if name == prepared["head_node_type"]:
            _check_head(found, place, node, kind)
        else:
            _check_worker(found, place, node, kind, as_mapping(data["available_node_types"][name]))
        _check_machine(found, place, node, kind)
    _check_accounts(found, data)
    _check_setup(found, data, prepared)
    _check_start(found, data)
    return found


def _check_by_ray(found: Findings, data: Mapping[str, Any]) -> None:
    try:
        with _quiet():
            validate_config(prepare_config(copy.deepcopy(dict(data))))
            types = AutoscalingConfig(copy.deepcopy(dict(data))).get_node_type_configs()
    except jsonschema.ValidationError as error:
        place = ".".join(map(str, error.absolute_path)) or "the file"
        found.mistakes.append(f"{place}: {_first_line(error.message)}; see the cluster YAML reference of Ray")
    except (AssertionError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, OSError) as error:
        told = _first_line(error) or "a node type's min_workers is more than its max_workers, or below 0"
        found.mistakes.append(f"refused by Ray {ray.__version__}: {told}")
    else:
        nodes = [
            f"{name} {node.min_worker_nodes}..{node.max_worker_nodes} x {dict(node.resources)}"
            for name, node in types.items()
            if name != data["head_node_type"]
        ]
        found.what += f": {', '.join(nodes)}"


def _first_line(error: object) -> str:
    return next(iter(str(error).strip().splitlines()), "")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ray's checks print warnings of their own."""
    logger = logging.getLogger("ray.autoscaler")
    before = logger.level
    logger.setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            yield
        finally:
            logger.setLevel(before)


def _check_mounts(found: Findings, data: Mapping[str, Any]) -> None:
    mounts = as_mapping(data.get("file_mounts"))
    for target, source in mounts.items():
        if not Path(str(source)).expanduser().exists():
            found.wrong(
                f"file_mounts.{target}",
                source,
                "it does not exist; make a token with `ray get-auth-token --generate` and `chmod 600 ~/.ray/auth_token`"
                if target == _TOKEN_TARGET
                else "it does not exist, seen from here; call from the root of the repository",
            )
    if _TOKEN_TARGET not in mounts:
        found.wrong(f"file_mounts.{_TOKEN_TARGET}", None, "it takes ~/.ray/auth_token, the token every node asks for")
        return
    token = Path(str(mounts[_TOKEN_TARGET])).expanduser()
    if token.is_file() and token.stat().st_mode & 0o077:
        found.remark(f"file_mounts.{_TOKEN_TARGET}", f"others on this machine can read {token}; chmod 600 it")


def _check_provider(found: Findings, provider: Mapping[str, Any], kind: str) -> None:
    for key, value in provider.items():
        right = f"the keys of {kind} are {', '.join(PROVIDER_KEYS[kind])}"
        found.require(key in PROVIDER_KEYS[kind], f"provider.{key}", value, right)
    for key in _REQUIRED_KEYS[kind]:
        found.require(bool(provider.get(key)), f"provider.{key}", provider.get(key), "it is needed")
    found.require(
        provider.get("cache_stopped_nodes") is False,
        "provider.cache_stopped_nodes",
        provider.get("cache_stopped_nodes"),
        "it takes false: nodes that are stopped and not ended keep disks that are paid for",
    )
    group = as_mapping(provider.get("security_group"))
    if group:
        name = group.get("GroupName")
        found.require(bool(name), "provider.security_group.GroupName", name, "it takes the name of a group")
    for number, rule in enumerate(group.get("IpPermissions", [])):
        ports = (rule.get("IpProtocol"), rule.get("FromPort"), rule.get("ToPort"))
        place = f"provider.security_group.IpPermissions.{number}"
        found.require(ports == ("tcp", 22, 22), place, rule, "it takes tcp from port 22 to port 22 only; reach the"
                      " dashboard with `ray dashboard`")  # fmt: skip


def _check_docker(found: Findings, docker: Mapping[str, Any]) -> None:
    if not docker.get("container_name"):
        found.wrong("docker.container_name", docker.get("container_name"), "it takes a name, such as moe-audit")
    for role in ("head_image", "worker_image"):
        name = role if role in docker else "image"
        found.require_image(f"docker.{name}", docker.get(name))


def _check_head(found: Findings, place: str, node: Mapping[str, Any], kind: str) -> None:
    limit = node["max_workers"]
    found.require(limit == 0, f"{place}.max_workers", limit, "it takes 0: the head is one, and works for no group")
    found.require(
        not _is_spot(node["node_config"], kind),
        f"{place}.node_config",
        "a spot instance",
        "the head must not be one: with it goes the driver, and the whole cluster",
    )


def _check_worker(found: Findings, place: str, node: Mapping[str, Any], kind: str, written: Mapping[str, Any]) -> None:
    for key in ("min_workers", "max_workers"):
        found.require(key in written, f"{place}.{key}", None, "it takes a whole number of at least 0")
    least = node["min_workers"]
    if least:
        found.remark(f"{place}.min_workers", f"{least} nodes are there, and paid for, whether anything runs or not")
    settings, gpus = node["node_config"], node.get("resources", {}).get("GPU", 0)
    if kind == "aws" and "InstanceMarketOptions" in settings:
        market = as_mapping(settings["InstanceMarketOptions"]).get("MarketType")
        name = f"{place}.node_config.InstanceMarketOptions.MarketType"
        found.require(market == "spot", name, market, "it takes spot, or InstanceMarketOptions is left out")
    if not _is_spot(settings, kind):
        found.remark(
            f"{place}.node_config", "not spot instances; the groups' work survives losing those, for less money"
        )
    if kind == "gcp" and gpus:
        maintenance = _scheduling(settings).get("onHostMaintenance")
        name = f"{place}.node_config.scheduling.onHostMaintenance"
        found.require(maintenance == "TERMINATE", name, maintenance, "machines with GPUs take TERMINATE")
    access = "IamInstanceProfile" if kind == "aws" else "serviceAccounts"
    if access not in settings:
        found.remark(f"{place}.node_config.{access}", "not given: workers cannot use a bucket unless a job brings keys")


def _check_machine(found: Findings, place: str, node: Mapping[str, Any], kind: str) -> None:
    settings = node["node_config"]
    key = "InstanceType" if kind == "aws" else "machineType"
    machine = settings.get(key)
    found.require(isinstance(machine, str), f"{place}.node_config.{key}", machine, "it takes the name of a type")
    if kind == "aws":
        image = settings.get("ImageId")
        right = "it takes ami-... or resolve:ssm:...; Ray's own choice has a driver too old for torch"
        found.require(bool(_IMAGE_ID.fullmatch(str(image))), f"{place}.node_config.ImageId", image, right)
    if machine not in MACHINES:
        if isinstance(machine, str):
            found.remark(f"{place}.resources", f"not compared, as {machine} is not among the types known here")
        return
    cpus, gpus = MACHINES[machine]
    for accelerator in settings.get("guestAccelerators", []):
        gpus += accelerator.get("acceleratorCount", 0)
    for resource, count in (("CPU", cpus), ("GPU", gpus)):
        said = node.get("resources", {}).get(resource, 0)
        found.require(said == count, f"{place}.resources.{resource}", said, f"{machine} has {count}")


def _check_accounts(found: Findings, data: Mapping[str, Any]) -> None:
    """On Google Cloud a worker's service account is one of the project's."""
    project = data["provider"].get("project_id")
    for name, node in data["available_node_types"].items():
        for number, account in enumerate(node["node_config"].get("serviceAccounts", [])):
            place = f"available_node_types.{name}.node_config.serviceAccounts.{number}.email"
            email, right = account.get("email"), f"it takes an account of {project}, as in provider.project_id"
            found.require(f"@{project}." in str(email), place, email, right)


def _is_spot(settings: Mapping[str, Any], kind: str) -> bool:
    if kind == "aws":
        return as_mapping(settings.get("InstanceMarketOptions")).get("MarketType") == "spot"
    scheduling = _scheduling(settings)
    return scheduling.get("provisioningModel") == "SPOT" or scheduling.get("preemptible") is True


def _scheduling(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Google Cloud takes a mapping; Ray's examples have a list of mappings."""
    written = settings.get("scheduling")
    if isinstance(written, list):
        return {key: value for part in written for key, value in as_mapping(part).items()}
    return as_mapping(written)


def _check_setup(found: Findings, data: Mapping[str, Any], prepared: Mapping[str, Any]) -> None:
    """Every node gets its packages pinned, the Ray of this machine among them."""
    if "setup_commands" not in data:
        found.wrong(
            "setup_commands", None, "without it Ray installs a nightly Ray; it takes what installs the packages"
        )
    pins: dict[str, str] = {}
    for name in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        for number, command in enumerate(data.get(name, [])):
            place = f"{name}.{number}"
            nightly = re.search(r"nightly|wheels/latest|ray-\d[\w.]*\.dev", command)
            found.require(nightly is None, place, command, f"no nightly Ray: it takes ray=={ray.__version__}")
            for version in _versions(found, place, command, as_mapping(prepared["file_mounts"])):
                pins[place] = version
    for place, version in pins.items():
        found.require(version == ray.__version__, place, f"ray=={version}", f"it takes the installed {ray.__version__}")
    if "setup_commands" in data and not any(place.startswith("setup_commands") for place in pins):
        right = (
            "one takes `pip install --requirement` of a mounted constraints.txt, so that every node has the same Ray"
        )
        found.wrong("setup_commands", data["setup_commands"], right)


def _versions(found: Findings, place: str, command: str, mounts: Mapping[str, str]) -> Iterator[str]:
    """The Rays that one command pins, by name or through a mounted requirements file."""
    words = shlex.split(command)
    if version := pinned_ray(words):
        yield version
    for option, value in itertools.pairwise(words):
        if option in ("-r", "--requirement", "-c", "--constraint"):
            if value not in mounts:
                found.wrong(place, value, "it takes a file among the targets of file_mounts")
            elif version := pinned_ray(Path(mounts[value]).expanduser().read_text(encoding="utf-8").splitlines()):
                yield version


def _check_start(found: Findings, data: Mapping[str, Any]) -> None:
    starts: dict[str, _RayStart] = {}
    for role in ("head", "worker"):
        name = f"{role}_start_ray_commands"
        commands = data.get(name)
        if not commands:
            found.wrong(name, commands, "it is needed: Ray's own default asks for no token")
            continue
        found.require(
            commands[0] == "ray stop", f"{name}.0", commands[0], "it takes `ray stop`, which ends an older Ray"
        )
        given = list(_ray_starts(name, commands))
        if len(given) != 1:
            found.wrong(name, commands, "it takes one `ray start`")
            continue
        starts[role] = given[0]
        _check_one_start(found, given[0], head=role == "head")
    if len(starts) == 2:
        _check_both_starts(found, starts["head"], starts["worker"])


def _check_one_start(found: Findings, start: _RayStart, *, head: bool) -> None:
    mode = start.environment.get("RAY_AUTH_MODE")
    found.require(
        mode == "token", f"{start.name}: RAY_AUTH_MODE", mode, "it takes RAY_AUTH_MODE=token before `ray start`"
    )
    wanted = {"disable-usage-stats": ""}
    wanted |= {"autoscaling-config": "~/ray_bootstrap_config.yaml"} if head else {}
    for flag, right in wanted.items():
        value = start.flags.get(flag)
        told = f"it takes --{flag}={right}" if right else f"it takes --{flag}"
        found.require(value == right, f"{start.name}: --{flag}", value, told)
    port = start.flags.get("object-manager-port")
    right = "it takes a fixed port, the same for head and workers, such as 8076"
    found.require(str(port).isdecimal() and port != "0", f"{start.name}: --object-manager-port", port, right)
    if head:
        found.require("head" in start.flags, f"{start.name}: --head", None, "it takes --head")
        host = start.flags.get("dashboard-host")
        right = "it takes 127.0.0.1: the dashboard runs jobs for whoever reaches it; use `ray dashboard`"
        found.require(host in ("127.0.0.1", "localhost"), f"{start.name}: --dashboard-host", host, right)


def _check_both_starts(found: Findings, head: _RayStart, worker: _RayStart) -> None:
    address, port = f"$RAY_HEAD_IP:{head.flags.get('port', '6379')}", "object-manager-port"
    given = worker.flags.get("address")
    found.require(given == address, f"{worker.name}: --address", given, f"it takes {address}, the port of the head")
    value = worker.flags.get(port)
    found.require(
        value == head.flags.get(port), f"{worker.name}: --{port}", value, f"the head has {head.flags.get(port)}"
    )


def _ray_starts(name: str, commands: Sequence[str]) -> Iterator[_RayStart]:
    for number, command in enumerate(commands):
        exported: dict[str, str] = {}
        for part in re.split(r";|&&", command):
            words = shlex.split(part)
            if words[:1] == ["export"]:
                exported |= _assignments(words[1:])
                continue
            own = _assignments(words)
            rest = words[len(own) :]
            if rest[:2] == ["ray", "start"]:
                yield _RayStart(f"{name}.{number}", exported | own, _flags(rest[2:]))


def _assignments(words: Sequence[str]) -> dict[str, str]:
    """The leading NAME=VALUE words."""
    found: dict[str, str] = {}
    for word in words:
        if not re.match(r"[A-Za-z_]\w*=", word):
            break
        key, _, value = word.partition("=")
        found[key] = value
    return found


def _flags(words: Sequence[str]) -> dict[str, str]:
    """``--name=value``, ``--name value`` and ``--name``, the last with an empty value."""
    found: dict[str, str] = {}
    last = ""
    for word in words:
        if word.startswith("--"):
            last, _, value = word[2:].partition("=")
            found[last] = value
        elif last and not found[last]:
            found[last] = word
    return found
