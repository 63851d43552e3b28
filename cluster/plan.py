"""The plan: from a specification to a job, with every choice that decides bits made once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import transformers

from audit.config import AuditConfig, ConfigError, check_against
from audit.corpus import build_corpus
from cluster.driver import Policy
from cluster.engine_worker import EngineWorker, load_engine
from cluster.identity import BINDING, environment, versions, weights_digest
from cluster.planner import Planner
from cluster.run import Job, identity_of
from cluster.session import cores
from cluster.tasks import digest


def prepare(config: AuditConfig, resolved: Mapping[str, Any] | None = None) -> Job:
    """Think a run through; nothing is written. ``resolved``: the choices of the run that is to be resumed.

    Raises ConfigError or ModelError, one sentence, for what cannot be done.
    """
    transformers.utils.logging.disable_progress_bar()
    model, engine = load_engine(config, resolved)
    resolved = {
        "method": engine.method,
        "experts": model.experts_path,
        "linear": model.linear_path,
        "device": str(model.device),
        "micro_batch": engine.micro_batch(config.corpus.max_tokens),
    }
    check_against(config, model.description)
    if model.reroute_refused and (number := _first_of_kind(config, "reroute")) is not None:
        raise ConfigError(f"interventions.{number}: reroute is refused for this model, {model.reroute_refused}")
    corpus = build_corpus(config.corpus, model.tokenizer, model.description.context_limit, config.folder)
    planner = Planner(config, engine, corpus)
    stages = planner.stages()
    information = {
        "specification": config.resolved(),
        "environment": environment(),
        "model": asdict(model.description),
        "corpus": {"counts": corpus.counts, "summary": corpus.summary(), "domains": corpus.domains},
        "seeds": {"split": config.seed, "positions": config.seed, "engine": config.seed},
        "plan": [
            {"stage": s, "tasks": len(t), "rows": sum(x.rows for x in t), "flops": sum(x.flops for x in t)}
            for s, t in stages
        ],
        "predicted": {"bytes": planner.bytes, "replica_seconds": planner.seconds(stages)},
    }
    identity = {
        "specification": identity_of(config.resolved()),
        "model": {"weights": weights_digest(model.module)},
        "corpus": {"digest": corpus.digest},
        "versions": versions(BINDING),
        "resolved": resolved,
        "plan": {stage: digest(tasks) for stage, tasks in stages},
    }
    on_gpu = model.device.type == "cuda"
    return Job(
        stages=stages,
        identity=identity,
        information=information,
        make_worker=partial(EngineWorker, config, resolved, tuple(corpus.domains)),
        replicas=_replicas(config, on_gpu),
        cpus_per_replica=config.engine.threads,
        gpus_per_replica=1 if on_gpu else 0,
        policy=Policy(max_attempts=config.cluster.max_attempts, hang_seconds=config.cluster.hang_minutes * 60),
    )


def _first_of_kind(config: AuditConfig, kind: str) -> int | None:
    return next((number for number, entry in enumerate(config.interventions) if entry.kind == kind), None)


def _replicas(config: AuditConfig, on_gpu: bool) -> int:
    """How many replicas are wanted: as many as there are devices, or as many as the cores hold."""
    if config.cluster.replicas != "auto":
        return config.cluster.replicas
    return torch.cuda.device_count() if on_gpu else max(1, cores() // config.engine.threads)
