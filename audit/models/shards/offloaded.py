"""One process whose model is larger than its device: layers stay in host memory or on disk until they are visited.

The weights are moved by accelerate, a whole decoder layer at a time, without its hooks: those move one submodule at a
time, at every forward, and empty the device's cache after every tensor.
"""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import PrefixedDataset, set_module_tensor_to_device
from safetensors import safe_open
from torch import Tensor, nn

from audit.models.discovery import decoder_layers, find_sites
from audit.models.memory import Offload
from audit.models.shards.machine import local_folder
from audit.models.shards.shard import Inspect, ModelShard
from audit.models.sources import Reading


class Offloaded(ModelShard):
    """Back end ``accelerate``: at most the visited layers are on the device.

    ``offload``: ``cpu`` keeps layers in host memory, as the loader put them there (memory-mapped where the checkpoint's
    tensors are the model's); ``nvme`` keeps the experts in files within ``folder``, and the rest of the layers in host
    memory. The files have no name once they are written: they go with the process, however it ends.
    """

    backend = "accelerate"

    def __init__(self, offload: Offload, folder: str | None = None) -> None:
        super().__init__()
        self.folder = local_folder(folder) if offload == "nvme" else None
        self._device = torch.device("cpu")
        self._layers: list[nn.Module] = []
        self._kept: list[Mapping[str, Tensor]] = []  # per layer, by the parameter's name in it
        self._visits: dict[int, int] = {}  # layer: visits that are open, one within the other

    def hold(self, module: Any, kept: Mapping[str, Tensor], device: torch.device) -> None:
        """Put ``module`` on the device but for its decoder layers' weights, which ``kept`` has by full name."""
        layers = decoder_layers(module)
        prefix = next(name for name, child in module.named_modules() if child is layers) + "."
        self._device, self._layers = device, list(layers)
        self._kept = [PrefixedDataset(kept, f"{prefix}{number}.") for number in range(len(layers))]
        for layer in self._layers:
            self._release(layer)
        inside = {id(p) for p in layers.parameters()}
        for name, tensor in [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]:
            if id(tensor) not in inside:
                set_module_tensor_to_device(module, name, device, clear_cache=False)
        module.tie_weights()  # what was tied was placed twice

    @contextmanager
    def visit(self, layer: int) -> Iterator[None]:
        self._visits[layer] = self._visits.get(layer, 0) + 1
        try:
            if self._visits[layer] == 1:
                self._bring(layer)
            yield
        finally:
            self._visits[layer] -= 1
            if not self._visits[layer]:
                self._release(self._layers[layer])

    def weight_bytes(self, layers: nn.ModuleList, module: nn.Module) -> int:
        sizes = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in layers]
        return super().weight_bytes(layers, module) - sum(sizes) + max(sizes)

    def notes(self) -> list[str]:
        where = "layers are kept in host memory" if self.folder is None else f"experts are kept in {self.folder}"
        return [f"{where}; layers are brought to the device one at a time, once per layer and sweep"]

    def _bring(self, layer: int) -> None:
        self.gathers[layer] = self.gathers.get(layer, 0) + 1
        module, kept = self._layers[layer], self._kept[layer]
        # A sweep has gradients switched off for all it makes, but attribution takes some through these weights.
        with torch.inference_mode(False), torch.no_grad():
            for name, _ in list(module.named_parameters()):
                set_module_tensor_to_device(module, name, self._device, value=kept[name], clear_cache=False)

    @staticmethod
    def _release(module: nn.Module) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for name, _ in list(module.named_parameters()):
                set_module_tensor_to_device(module, name, "meta", clear_cache=False)


def load_offloaded(reading: Reading, shard: Offloaded, inspect: Inspect | None = None) -> tuple[Any, Any]:
    """The model of a checkpoint, its decoder layers kept by ``shard``, and its tokenizer.

    With a folder, experts go there as they are read, so that host memory for one layer's is enough. ``inspect`` is
    called with the model. Raises ModelError.
    """
    place, chosen = reading.place, dict[str, Any]()
    # As long as the files are open, their folder is not needed.
    with contextlib.ExitStack() as until_read:
        if shard.folder is not None:
            written = until_read.enter_context(tempfile.TemporaryDirectory(prefix="moe-audit-", dir=shard.folder))
            empty = reading.skeleton()
            experts = {site.experts for site in find_sites(decoder_layers(empty)).values()}
            chosen |= {"device_map": _device_map(empty, experts), "offload_folder": written}
            # accelerate wants to be told of every buffer, and then calls it unknown.
            until_read.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "The following device_map keys do not match", UserWarning)
        module = reading.module(**chosen)
        keep(module.eval().requires_grad_(False), shard, place)
    if inspect is not None:
        inspect(module, decoder_layers(module), shard)
    return module, reading.tokenizer()


def keep(module: Any, shard: Offloaded, device: torch.device) -> None:
    """Give the layers of a model that was just read to ``shard``, and the rest to the device."""
    on_disk = _on_disk(module)
    remove_hook_from_submodules(module)  # the library's own, which would fetch what the shard has fetched
    inside = {name: tensor for name, tensor in module.state_dict().items() if tensor.device.type != "meta"}
    shard.hold(module, _Kept(inside, on_disk), device)


class _Kept(Mapping[str, Tensor]):
    """Tensors in memory or in safetensors files, by full name.

    The files are mapped from now on, so that they may be unlinked. ``index``: file, name in it and type by full name.
    """

    def __init__(self, inside: Mapping[str, Tensor], index: Mapping[str, Mapping[str, str]]) -> None:
        self._inside, self._index = inside, index
        paths = {place["safetensors_file"] for place in index.values()}
        self._files: dict[str, Any] = {path: safe_open(path, framework="pt", device="cpu") for path in paths}

    def __getitem__(self, name: str) -> Tensor:
        if name in self._inside:
            return self._inside[name]
        place = self._index[name]
        found: Tensor = self._files[place["safetensors_file"]].get_tensor(place["weight_name"])
        return found.to(getattr(torch, place["dtype"]))

    def __iter__(self) -> Iterator[str]:
        return iter({**self._inside, **self._index})

    def __len__(self) -> int:
        return len({**self._inside, **self._index})


def _device_map(module: nn.Module, experts: set[nn.Module], prefix: str = "") -> dict[str, str]:
    """For the library's loader: experts to disk, all that is not around them to the host.

    Only experts, because what the loader leaves on disk it forgets to keep in float32, as some families keep biases of
    routers and norms.
    """
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    places = {f"{prefix}{name}": "cpu" for name, _ in own}
    for name, child in module.named_children():
        if child in experts:
            places[f"{prefix}{name}"] = "disk"
        elif experts.isdisjoint(child.modules()):
            places[f"{prefix}{name}"] = "cpu"
        else:
            places |= _device_map(child, experts, f"{prefix}{name}.")
    return places


def _on_disk(module: nn.Module) -> dict[str, dict[str, str]]:
    """Where the weights are that the library did not keep: file, name in it and type, by full name."""
    for child in module.modules():
        kept = getattr(getattr(child, "_hf_hook", None), "weights_map", None)
        if isinstance(kept, PrefixedDataset):
            index: dict[str, dict[str, str]] = kept.dataset.index
            return index
    return {}
