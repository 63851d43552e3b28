"""What identifies a run besides its specification: the weights, the versions of what computes, the code's revision."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

import torch
from torch import Tensor, nn

import audit
from audit.models import ModelError
from audit.models.shards.shard import ModelShard

# Another version of one of these may compute other bits.
BINDING = ("torch", "transformers")
RECORDED = ("numpy", "pyarrow", "ray", "tokenizers")
# Beside the packages of a submitted job, which have neither a distribution nor a checkout around them.
SUBMITTED = "submitted.json"


def weights_digest(module: nn.Module, layers: nn.ModuleList, shard: ModelShard) -> str:
    """SHA-256 over names, types, shapes and values of all parameters and buffers, as they are computed with."""
    prefix = next(name for name, child in module.named_modules() if child is layers) + "."
    lines = [_line(name, tensor) for name, tensor in module.state_dict().items() if not name.startswith(prefix)]
    for number, layer in enumerate(layers):
        with shard.visit(number):
            lines += [_line(name, tensor) for name, tensor in layer.state_dict(prefix=f"{prefix}{number}.").items()]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _line(name: str, tensor: Tensor) -> str:
    state = hashlib.sha256()
    state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"{name} {tensor.dtype} {tuple(tensor.shape)} {state.hexdigest()}"


def require_weights(digest: str, source: str, module: nn.Module, layers: nn.ModuleList, shard: ModelShard) -> None:
    """Raise ModelError where a model's weights are not those of ``digest``."""
    found = weights_digest(module, layers, shard)
    if found != digest:
        raise ModelError(
            f"model.source: the weights of {source} on {platform.node()} have SHA-256 {found[:12]}..., those of the "
            f"run {digest[:12]}...; name a revision, or make the checkpoint the same on every machine"
        )


def versions(names: tuple[str, ...]) -> dict[str, str]:
    """Installed versions by distribution name; what runs from a source tree without being installed is left out."""
    found = {
        distribution.metadata["Name"].lower(): distribution.version
        for distribution in importlib.metadata.distributions()
    }
    return {name: found[name] for name in names if name in found}


def environment() -> dict[str, object]:
    """Versions, platform and the code's git revision."""
    code = code_version()
    found = {"python": platform.python_version(), **versions((*BINDING, *RECORDED)), "moe-audit": code["version"]}
    return {"versions": found, "platform": platform.platform(), "git_revision": code["git_revision"]}


def code_version() -> dict[str, str | None]:
    """The version and git revision of the code that runs, as far as it knows: that of a checkout, of an installed
    package, or the one a job was submitted with."""
    root = Path(audit.__file__).resolve().parents[1]
    if (root / SUBMITTED).is_file():
        return dict(json.loads((root / SUBMITTED).read_text(encoding="utf-8")))
    revision = _git(root, "rev-parse", "HEAD") if (root / ".git").exists() else None
    changed = _git(root, "status", "--porcelain", "--untracked-files=no") if revision else None
    return {
        "version": versions(("moe-audit",)).get("moe-audit"),
        "git_revision": None if revision is None else revision + ("+changes" if changed else ""),
    }


def _git(root: Path, *arguments: str) -> str | None:
    try:
        found = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
