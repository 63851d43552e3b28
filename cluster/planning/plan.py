"""The plan: from a specification to a job, with every choice that decides bits made once."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import transformers

from audit.config import AuditConfig, ConfigError, check_against
from audit.corpus import build_corpus
from audit.engine.cost import Sizes, default_memory, working_bytes
from audit.models.memory import weights_of
from audit.models.outline import outline
from audit.models.shards.backends import open_shard
from audit.models.shards.choose import Choice, choose, why_undivided
from audit.models.shards.machine import local_folder, machine_of
from audit.models.shards.shard import TRAITS
from audit.models.sources import read_configuration, resolve_device
from audit.storage import is_url
from cluster.driver.driver import Policy
from cluster.driver.group import Shape
from cluster.driver.scaling import Scale
from cluster.groups.checkpoint_cache import Checkpoint, fetch, find
from cluster.groups.engine_worker import EngineWorker, load_audited, make_engine
from cluster.planning.identity import BINDING, environment, versions, weights_digest
from cluster.planning.planner import Planner
from cluster.run import Job, identity_of
from cluster.session import cores
from cluster.tasks import digest


def prepare(config: AuditConfig, resolved: Mapping[str, Any] | None = None) -> Job:
    """Think a run through; nothing is written. ``resolved``: the choices of the run that is to be resumed.

    The model that it is thought through with is gone afterwards, from a device too, which a rank may need whole.
    Raises ConfigError or ModelError, one sentence, for what cannot be done.
    """
    try:
        return _prepared(config, resolved)
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def _prepared(config: AuditConfig, resolved: Mapping[str, Any] | None) -> Job:
    transformers.utils.logging.disable_progress_bar()
    location = config.model.location(config.folder)
    checkpoint = find(location, allow_pickle=config.model.allow_pickle) if is_url(location) else None
    asked = dict(resolved or _asked(config))
    device = resolve_device(asked["device"])
    choice, memory = _choose(config, asked, checkpoint, device)
    divided = TRAITS[choice.backend].divided
    # Where ranks will divide it, the model is planned with on the CPU: one rank's host must hold it anyway.
    folder = config.model.offload_folder
    shard = None if divided else open_shard(choice.backend, device, offload=choice.offload, folder=folder)
    model = load_audited(config, asked | {"device": "cpu" if divided else str(device)}, checkpoint, shard)
    # A rank sees its own device alone, whatever number it has here.
    weight_bytes = choice.share.beside_rows(device.type)
    computing = {"device": device.type, "weight_bytes": weight_bytes, "memory": memory}
    engine = make_engine(config, asked | computing, model)
    resolved = {
        "method": engine.method,
        "experts": _experts(asked["experts"], choice, model.experts_path),
        "linear": model.linear_path,
        **computing,
        "backend": choice.backend,
        "offload": choice.offload,
        "micro_batch": engine.micro_batch(config.corpus.max_tokens),
    }
    check_against(config, model.description)
    if model.reroute_refused and (number := _first_of_kind(config, "reroute")) is not None:
        raise ConfigError(f"interventions.{number}: reroute is refused for this model, {model.reroute_refused}")
    if config.attribution and engine.method == "oracle" and not TRAITS[choice.backend].resident:
        raise ConfigError(
            f"attribution: True needs all layers' weights at one time with the oracle, and model.backend: "
            f"{choice.backend} has one layer's; use another back end, or attribution: false"
        )
    corpus = build_corpus(config.corpus, model.tokenizer, model.description.context_limit, config.folder)
    planner = Planner(config, engine, corpus)
    stages = planner.stages()
    information = {
        "specification": config.resolved(),
        "environment": environment(),
        "model": asdict(model.description),
        "backend": choice.reason,
        "checkpoint": None if checkpoint is None else checkpoint.record(),
        "corpus": {"counts": corpus.counts, "summary": corpus.summary(), "domains": corpus.domains},
        "seeds": {"split": config.seed, "positions": config.seed, "engine": config.seed},
        "plan": [
            {"stage": s, "tasks": len(t), "rows": sum(x.rows for x in t), "flops": sum(x.flops for x in t)}
            for s, t in stages
        ],
        "predicted": {"bytes": planner.bytes, "group_seconds": planner.seconds(stages)},
    }
    weights = weights_digest(model.module, model.layers, model.shard)
    identity = {
        "specification": identity_of(config.resolved()),
        "model": {"weights": weights},
        "corpus": {"digest": corpus.digest},
        "versions": versions(BINDING),
        "resolved": resolved,
        "plan": {stage: digest(tasks) for stage, tasks in stages},
    }
    on_gpu = device.type == "cuda"
    return Job(
        stages=stages,
        identity=identity,
        information=information,
        make_worker=partial(EngineWorker, config, resolved, tuple(corpus.domains), weights, checkpoint),
        scale=_scale(config, on_gpu, planner.flops_per_second),
        shape=Shape(
            ranks=config.cluster.ranks,
            cpus=config.engine.threads,
            gpus=1 if on_gpu else 0,
            own_tasks=TRAITS[choice.backend].own_tasks,
        ),
        policy=Policy(
            max_attempts=config.cluster.max_attempts,
            hang_seconds=config.cluster.hang_minutes * 60,
            load_seconds=config.cluster.load_minutes * 60,
            commit_results=config.cluster.commit_results,
            commit_bytes=int(config.cluster.commit_bytes),
        ),
    )


def _asked(config: AuditConfig) -> dict[str, Any]:
    """What the specification says of choices that are made once for a run."""
    engine, model = config.engine, config.model
    return {
        "method": engine.method,
        "experts": engine.experts,
        "linear": engine.linear,
        "device": model.device,
        "memory": engine.memory,
        "backend": model.backend,
        "offload": model.offload,
    }


def _experts(asked: str, choice: Choice, found: str) -> str:
    """Which way experts are computed. What transformers divides only its own module can add up."""
    return "module" if choice.backend == "transformers_tp" and asked == "auto" else found


def _choose(
    config: AuditConfig, asked: Mapping[str, Any], checkpoint: Checkpoint | None, device: torch.device
) -> tuple[Choice, int]:
    """The back end and the engine's budget in bytes, before any weights are read.

    Raises ConfigError where the budget is too small for the back end's weights or larger than the device.
    """
    model = config.model
    source = model.location(config.folder)
    files = None if checkpoint is None else str(fetch(checkpoint))
    trust = model.trust_remote_code
    configuration = read_configuration(source, files=files, revision=model.revision, trust_remote_code=trust)
    found = outline(configuration, source=source, dtype=model.dtype, trust_remote_code=trust)
    if model.offload_folder is not None:
        local_folder(model.offload_folder)
    ranks = config.cluster.ranks
    machine = machine_of(device, ranks)
    choice = choose(
        weights_of(found.module, found.layers, found.sites),
        machine,
        backend=asked["backend"],
        ranks=ranks,
        offload=asked["offload"],
        disk=model.offload_folder is not None,
        undivided=why_undivided(found.sites),
    )
    sizes = Sizes(found, choice.share.beside_rows(device.type), device.type)
    memory = default_memory(sizes, machine.memory) if asked["memory"] == "auto" else int(asked["memory"])
    if device.type == "cuda" and memory > machine.memory:
        raise ConfigError(
            f"engine.memory: {memory / 2**20:,.0f} MiB are more than the device's {machine.memory / 2**20:,.0f} MiB; "
            "use auto, or less"
        )
    try:
        working_bytes(sizes, memory)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return choice, memory


def _first_of_kind(config: AuditConfig, kind: str) -> int | None:
    return next((number for number, entry in enumerate(config.interventions) if entry.kind == kind), None)


def _scale(config: AuditConfig, on_gpu: bool, flops_per_second: float) -> Scale:
    """How many groups are wanted; ``auto``: as many as there are devices, or as the cores hold."""
    asked = config.cluster
    ranks = torch.cuda.device_count() if on_gpu else cores() // config.engine.threads
    most = max(1, asked.min_groups, ranks // asked.ranks)
    return Scale(
        min_groups=asked.min_groups,
        max_groups=most if asked.max_groups == "auto" else asked.max_groups,
        target_seconds=None if asked.target_minutes is None else asked.target_minutes * 60,
        flops_per_second=flops_per_second,
    )
