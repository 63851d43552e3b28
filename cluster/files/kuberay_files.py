"""Files for KubeRay: the fields that audits use, strictly (an unknown one is a mistake), and what they must say.

The fields are a part of KubeRay's ``ray.io/v1`` and of Kubernetes's ``networking.k8s.io/v1``; the whole definitions are
checked by the Kubernetes cluster itself (``kubectl apply --dry-run=server``).
"""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Mapping
from typing import Any, Literal

import ray
import yaml
from pydantic import ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from audit.config.mistakes import mistake
from audit.config.section import Many, Section
from cluster.files.file_checks import Findings, as_mapping

STOP_SECONDS = 60  # that a stopped job must have at least: a commit takes seconds, an object store may be slow
_NAME = "a name of lower-case letters, digits and -"
_TEXTS = "keys with texts; numbers are quoted"
_GPU = "nvidia.com/gpu"
_DASHBOARD, _METRICS = 8265, 8080  # ports of a pod, as KubeRay sets them


class _Part(Section):
    model_config = ConfigDict(alias_generator=to_camel)


class _Metadata(_Part):
    name: str = Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=47, description=_NAME)
    namespace: str | None = Field(default=None, description=_NAME)
    labels: dict[str, str] = Field(default={}, description=_TEXTS)


class _SecretRef(_Part):
    name: str = Field(description=_NAME)
    optional: bool = Field(default=False, description="true or false")


class _EnvFrom(_Part):
    secret_ref: _SecretRef = Field(description="a section with name")


class _Env(_Part):
    name: str = Field(description="the name of a variable")
    value: str = Field(description="a text; numbers are quoted")


class _Resources(_Part):
    requests: dict[str, str] = Field(description=_TEXTS)
    limits: dict[str, str] = Field(description=_TEXTS)


class _Container(_Part):
    name: str = Field(description=_NAME)
    image: str = Field(description="the name of an image, with its tag")
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    resources: _Resources = Field(description="a section with requests and limits")
    env: Many[_Env] = Field(default=(), description="a list of name and value")
    env_from: Many[_EnvFrom] = Field(default=(), description="a list of secretRef")


class _Toleration(_Part):
    key: str = Field(description="the key of a taint")
    operator: Literal["Exists", "Equal"] = "Equal"
    value: str | None = Field(default=None, description="a text")
    effect: Literal["NoSchedule", "NoExecute", "PreferNoSchedule"]


class _PodSpec(_Part):
    containers: Many[_Container] = Field(min_length=1, max_length=1, description="a list of one container")
    service_account_name: str | None = Field(default=None, description=_NAME)
    node_selector: dict[str, str] = Field(default={}, description=_TEXTS)
    tolerations: Many[_Toleration] = Field(default=(), description="a list of key, operator, value and effect")
    termination_grace_period_seconds: int = Field(default=30, ge=0, description="a whole number of seconds")


class _PodMetadata(_Part):
    labels: dict[str, str] = Field(default={}, description=_TEXTS)
    annotations: dict[str, str] = Field(default={}, description=_TEXTS)


class _Template(_Part):
    metadata: _PodMetadata = _PodMetadata()
    spec: _PodSpec = Field(description="a section with containers")


class _HeadGroup(_Part):
    ray_start_params: dict[str, str] = Field(description=_TEXTS)
    template: _Template = Field(description="a section with spec")


class _WorkerGroup(_Part):
    group_name: str = Field(description=_NAME)
    replicas: int = Field(ge=0, description="a whole number of at least 0")
    min_replicas: int = Field(ge=0, description="a whole number of at least 0")
    max_replicas: int = Field(ge=1, description="a whole number of at least 1")
    idle_timeout_seconds: int | None = Field(default=None, ge=1, description="a whole number of seconds")
    ray_start_params: dict[str, str] = Field(description=_TEXTS)
    template: _Template = Field(description="a section with spec")


class _AuthOptions(_Part):
    mode: Literal["token", "disabled"]


class _AutoscalerOptions(_Part):
    version: Literal["v1", "v2"]
    idle_timeout_seconds: int = Field(ge=1, description="a whole number of seconds")
    upscaling_mode: Literal["Default", "Aggressive", "Conservative"] = "Default"


class _RayClusterSpec(_Part):
    ray_version: str = Field(description="a version of Ray")
    auth_options: _AuthOptions = Field(description="a section with mode: token")
    enable_in_tree_autoscaling: bool = Field(description="true or false")
    autoscaler_options: _AutoscalerOptions = Field(description="a section with version: v2 and idleTimeoutSeconds")
    head_group_spec: _HeadGroup = Field(description="a section with rayStartParams and template")
    worker_group_specs: Many[_WorkerGroup] = Field(min_length=1, description="a list of groups of workers")


class _RayJobSpec(_Part):
    entrypoint: str = Field(description="a command")
    submission_mode: Literal["K8sJobMode", "HTTPMode", "SidecarMode"] = "K8sJobMode"
    shutdown_after_job_finishes: bool = Field(description="true or false")
    ttl_seconds_after_finished: int = Field(default=0, ge=0, description="a whole number of seconds")
    active_deadline_seconds: int | None = Field(default=None, ge=1, description="a whole number of seconds")
    backoff_limit: int = Field(default=0, ge=0, description="a whole number of at least 0")
    suspend: bool = Field(default=False, description="true or false")
    runtime_env_yaml: str = Field(alias="runtimeEnvYAML", description="a runtime environment, as a text of YAML")
    ray_cluster_spec: _RayClusterSpec = Field(description="a section that says the cluster")


class _RayJob(_Part):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: _Metadata = Field(description="a section with name")
    spec: _RayJobSpec = Field(description="a section that says the job")


class _Selector(_Part):
    match_labels: dict[str, str] = Field(default={}, description=_TEXTS)


class _Peer(_Part):
    pod_selector: _Selector | None = None
    namespace_selector: _Selector | None = None


class _Port(_Part):
    protocol: Literal["TCP", "UDP"]
    port: int = Field(ge=1, le=65535, description="a port")


class _Ingress(_Part):
    peers: Many[_Peer] = Field(alias="from", min_length=1, description="a list of podSelector and namespaceSelector")
    ports: Many[_Port] = Field(default=(), description="a list of protocol and port; without it every port")


class _PolicySpec(_Part):
    pod_selector: _Selector = Field(description="a section with matchLabels")
    policy_types: Many[Literal["Ingress", "Egress"]] = Field(description="a list of Ingress and Egress")
    ingress: Many[_Ingress] = Field(description="a list of from and ports")


class _NetworkPolicy(_Part):
    api_version: Literal["networking.k8s.io/v1"]
    kind: Literal["NetworkPolicy"]
    metadata: _Metadata = Field(description="a section with name")
    spec: _PolicySpec = Field(description="a section with podSelector, policyTypes and ingress")


def check(data: Mapping[str, Any]) -> Findings:
    """The fields first; where they are right, what they say."""
    kind = data.get("kind")
    found = Findings(f"a {kind} for Kubernetes")
    try:
        if kind == "RayJob":
            _check_job(found, _RayJob.model_validate(dict(data)).spec)
        elif kind == "NetworkPolicy":
            _check_policy(found, _NetworkPolicy.model_validate(dict(data)).spec)
        else:
            found.wrong("kind", kind, "it takes RayJob or NetworkPolicy")
    except ValidationError as error:
        found.mistakes.append(str(mistake(error, _RayJob if kind == "RayJob" else _NetworkPolicy, data)))
    return found


def _check_job(found: Findings, job: _RayJobSpec) -> None:
    cluster, place = job.ray_cluster_spec, "spec.rayClusterSpec"
    groups = [f"{g.group_name} {g.min_replicas}..{g.max_replicas} x {_gpus(g)} GPU" for g in cluster.worker_group_specs]
    found.what += f": {', '.join(groups)}"
    _check_entrypoint(found, job.entrypoint)
    _check_stop(found, job.runtime_env_yaml)
    if not job.shutdown_after_job_finishes:
        found.remark("spec.shutdownAfterJobFinishes", "the cluster stays when the audit is done, and is paid for")
    version = cluster.ray_version
    found.require(
        version == ray.__version__, f"{place}.rayVersion", version, f"it takes {ray.__version__}, the installed"
    )
    mode = cluster.auth_options.mode
    found.require(mode == "token", f"{place}.authOptions.mode", mode, "it takes token: Kubernetes reaches every pod")
    scaling = cluster.enable_in_tree_autoscaling
    found.require(scaling, f"{place}.enableInTreeAutoscaling", scaling, "it takes true, or no worker is ever started")
    scaler = cluster.autoscaler_options.version
    found.require(scaler == "v2", f"{place}.autoscalerOptions.version", scaler, "it takes v2: v1 keeps idle workers")
    _check_head(found, f"{place}.headGroupSpec", cluster.head_group_spec)
    for number, group in enumerate(cluster.worker_group_specs):
        _check_group(found, f"{place}.workerGroupSpecs.{number}", group)


def _check_entrypoint(found: Findings, entrypoint: str) -> None:
    words = shlex.split(entrypoint)
    words = words[1:] if words[:1] == ["exec"] else words
    module = words[2] if words[:2] == ["python", "-m"] and len(words) > 2 else ""
    right = "it takes `python -m` and a module of this package, such as jobs.run_audit"
    found.require(bool(module) and _exists(module), "spec.entrypoint", entrypoint, right)
    for option in ("--config", "--out"):
        found.require(option in words, "spec.entrypoint", entrypoint, f"it takes {option}")
    if not entrypoint.startswith("exec "):
        found.remark("spec.entrypoint", "without `exec` a shell stands between a stop signal and the audit")


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):
        return False


def _check_stop(found: Findings, text: str) -> None:
    place = "spec.runtimeEnvYAML"
    try:
        environment = yaml.safe_load(text)
    except yaml.YAMLError as error:
        found.wrong(place, text, f"it takes a text of YAML ({' '.join(str(error).split())})")
        return
    for key in as_mapping(environment):
        found.require(
            key == "env_vars", f"{place}.{key}", environment[key], "it takes env_vars; the image holds the code"
        )
    variables = as_mapping(as_mapping(environment).get("env_vars"))
    for name, value in variables.items():
        found.require(isinstance(value, str), f"{place}.env_vars.{name}", value, "it takes a text: quote it")
    seconds = variables.get("RAY_JOB_STOP_WAIT_TIME_S")
    right = (
        f'it takes at least "{STOP_SECONDS}": seconds in which a stopped audit commits what is finished; Ray gives 3'
    )
    enough = str(seconds).isdecimal() and int(str(seconds)) >= STOP_SECONDS
    found.require(enough, f"{place}.env_vars.RAY_JOB_STOP_WAIT_TIME_S", seconds, right)


def _check_head(found: Findings, place: str, head: _HeadGroup) -> None:
    container = head.template.spec.containers[0]
    host = head.ray_start_params.get("dashboard-host")
    right = "it takes 0.0.0.0: a Service reaches no loopback, and authOptions guards it"
    found.require(host == "0.0.0.0", f"{place}.rayStartParams.dashboard-host", host, right)
    found.require_image(f"{place}.template.spec.containers.0.image", container.image)
    gpus = container.resources.limits.get(_GPU)
    place = f"{place}.template.spec.containers.0.resources.limits.{_GPU}"
    found.require(gpus is None, place, gpus, "the head works for no group; leave it out")


def _check_group(found: Findings, place: str, group: _WorkerGroup) -> None:
    least, most, now = group.min_replicas, group.max_replicas, group.replicas
    found.require(least <= most, f"{place}.minReplicas", least, f"it takes at most maxReplicas, {most}")
    found.require(least <= now <= most, f"{place}.replicas", now, f"it takes {least} to {most}")
    if least:
        found.remark(f"{place}.minReplicas", f"{least} workers are there, and paid for, whether anything runs or not")
    container = group.template.spec.containers[0]
    found.require_image(f"{place}.template.spec.containers.0.image", container.image)
    wanted, limit = (kind.get(_GPU) for kind in (container.resources.requests, container.resources.limits))
    name = f"{place}.template.spec.containers.0.resources"
    found.require(limit is not None, f"{name}.limits.{_GPU}", limit, "it takes the GPUs of a worker, or Ray sees none")
    found.require(wanted == limit, f"{name}.requests.{_GPU}", wanted, f"it takes what limits has, {limit}")


def _gpus(group: _WorkerGroup) -> str:
    return group.template.spec.containers[0].resources.limits.get(_GPU, "0")


def _check_policy(found: Findings, policy: _PolicySpec) -> None:
    place = "spec.ingress"
    found.require("Ingress" in policy.policy_types, "spec.policyTypes", policy.policy_types, "it takes Ingress")
    found.require(
        bool(policy.pod_selector.match_labels), "spec.podSelector", {}, "it takes the label of the audit's pods"
    )
    for number, rule in enumerate(policy.ingress):
        own = all(p.pod_selector == policy.pod_selector and p.namespace_selector is None for p in rule.peers)
        named = all(_labels(peer.pod_selector) or _labels(peer.namespace_selector) for peer in rule.peers)
        ports = {port.port for port in rule.ports}
        right = (
            f"others than the audit's own pods may reach port {_DASHBOARD}, where the token is asked for, and those "
            f"that labels name port {_METRICS} besides"
        )
        allowed = {_DASHBOARD, _METRICS} if named else {_DASHBOARD}
        found.require(own or (bool(ports) and ports <= allowed), f"{place}.{number}.ports", sorted(ports), right)


def _labels(selector: _Selector | None) -> bool:
    return selector is not None and bool(selector.match_labels)
