"""One thread, no network, and the long grid only on request."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from shared_ray import SharedRay

torch.set_num_threads(1)

_TESTS = Path(__file__).parent
_SHARED = {"ray_cluster", "studied"}  # fixtures of who uses the Ray that a test process has open


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run the whole grid of sizes, seeds and families")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    shared = {item.path for item in items if _SHARED & set(getattr(item, "fixturenames", ()))}
    # The long ones first, so that the others fill what is left; of these, those one after another that share a Ray.
    items.sort(key=lambda item: (not _starts_processes(item), item.path not in shared))
    if config.getoption("--full"):
        return
    full = [item for item in items if item.get_closest_marker("full")]
    config.hook.pytest_deselected(items=full)
    items[:] = [item for item in items if item not in set(full)]


def _starts_processes(item: pytest.Item) -> bool:
    """Whether it starts a cluster or ranks."""
    clusters = item.path.is_relative_to(_TESTS / "cluster") or item.path.is_relative_to(_TESTS / "jobs")
    return clusters or item.path.name.startswith(("test_shards_", "test_back_end_table"))


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[SharedRay]:
    shared = SharedRay()
    yield shared
    shared.close()


@pytest.fixture(scope="module")
def ray_cluster(shared_ray: SharedRay) -> None:
    """A Ray of this machine for two groups, with whatever earlier tests have left idle in it."""
    shared_ray.open()


@pytest.fixture(scope="module")
def no_ray(shared_ray: SharedRay) -> None:
    """This process is connected to no Ray: the module starts its own."""
    shared_ray.close()


@pytest.fixture
def home_with_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory is the root of the repository, the home one that holds a token of a cluster."""
    token = tmp_path / "home/.ray/auth_token"
    token.parent.mkdir(parents=True)
    token.touch(mode=0o600)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(_TESTS.parent)
    return tmp_path
