"""What is held in memory, measured: bytes of a model by role, of an optimizer, of a cache, and the peak of a process.

Bytes are those of unique storages: tied weights, views and adapters on one base count once. A quantised weight counts
with its state (bitsandbytes' absmax, code, nested statistics), which `get_memory_footprint` leaves out.
"""

import os
import re
import threading
import time
from collections.abc import Iterable, Iterator

import psutil
import torch
from torch import nn

from .roles import CRITIC, REWARD


HEADS = (f"{CRITIC}_head", f"{REWARD}_head")


def unique_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each storage once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({(str(s.device), s.data_ptr()): s.nbytes() for s in storages}.values())


def role_of(name: str) -> str:
    """Who owns a parameter: `base`, `adapter default`, `adapter critic`, `heads`, `critic`, ..."""
    parts = name.split(".")
    if any(head in parts for head in HEADS):
        return "heads"
    if CRITIC in parts and "lora_A" not in parts and "lora_B" not in parts:
        return CRITIC  # a critic of its own, whatever stands in it
    for kind in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"):
        if kind in parts:
            first = parts.index(kind)
            return CRITIC if CRITIC in parts[:first] else f"adapter {parts[first + 1]}"
    return "base"


def model_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes that a model holds, by owner, each storage once.

    Returns:
        `dict[str, int]`: `base`, `adapter NAME`, `heads`, `critic` (a model of its own); only what is there.
    """
    owners: dict[str, dict[tuple[str, int], int]] = {}
    seen: set[tuple[str, int]] = set()
    for name, tensor in _named_tensors(model):
        storage = tensor.untyped_storage()
        key = (str(storage.device), storage.data_ptr())
        if key not in seen:
            seen.add(key)
            owners.setdefault(role_of(name), {})[key] = storage.nbytes()
    return {owner: sum(storages.values()) for owner, storages in owners.items()}


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        yield name, parameter
        for tensor in _quantization_state(parameter):
            yield name, tensor
    yield from model.named_buffers()
    for name, module in model.named_modules():
        # bitsandbytes keeps the 8-bit weight and its scales in the layer once it has run.
        state = getattr(module, "state", None)
        for key in ("CB", "SCB"):
            if isinstance(getattr(state, key, None), torch.Tensor):
                yield f"{name}.{key}", getattr(state, key)


def _quantization_state(parameter: torch.Tensor) -> Iterator[torch.Tensor]:
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        for key in ("absmax", "code", "offset"):
            if isinstance(getattr(state, key, None), torch.Tensor):
                yield getattr(state, key)
        state = getattr(state, "state2", None)
    for key in ("CB", "SCB"):
        if isinstance(getattr(parameter, key, None), torch.Tensor):
            yield getattr(parameter, key)


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of the gradients that are there now."""
    return unique_bytes(p.grad for p in model.parameters() if p.grad is not None)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's state. A wrapper (accelerate's) passes its optimizer on."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    states = [state for state in optimizer.state.values() if isinstance(state, dict)]
    return unique_bytes(t for state in states for t in state.values() if isinstance(t, torch.Tensor))


def cache_bytes(cache: object) -> int:
    """Bytes of the keys and values of a [`~transformers.Cache`], 0 for anything else."""
    tensors = [getattr(layer, key, None) for layer in getattr(cache, "layers", []) for key in ("keys", "values")]
    return unique_bytes(t for t in tensors if isinstance(t, torch.Tensor))


class PeakMemory:
    """Peak of this process on `device` since the last `reset`, in bytes.

    On CUDA it is torch's own count of allocated bytes. On a CPU it is the process's resident memory: the kernel's high
    water mark where it can be reset (Linux, `/proc/self/clear_refs`), else samples every 2 ms, which miss shorter
    peaks. Resident memory has what torch does not know of (libraries, thread stacks, freed blocks that the allocator
    keeps), so take differences.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self._process = psutil.Process()
        self._sampled: int | None = None
        self.reset()

    def now(self) -> int:
        """Bytes held at this moment."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return self._process.memory_info().rss

    def reset(self) -> None:
        """Forget the peak so far."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self._sampled is not None or not self._reset_high_water():
            if self._sampled is None:
                threading.Thread(target=self._sample, daemon=True).start()
            self._sampled = self.now()

    def peak(self) -> int:
        """Highest number of bytes since the last reset."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if self._sampled is not None:
            return max(self._sampled, self.now())
        with open("/proc/self/status") as status:
            return int(re.search(r"VmHWM:\s+(\d+) kB", status.read())[1]) * 1024  # type: ignore[index]

    def _sample(self) -> None:
        while True:
            self._sampled = max(self._sampled or 0, self.now())
            time.sleep(0.002)

    @staticmethod
    def _reset_high_water() -> bool:
        if not os.path.exists("/proc/self/clear_refs"):
            return False
        try:
            with open("/proc/self/clear_refs", "w") as refs:
                refs.write("5")
        except OSError:
            return False
        return True


def gib(size: float) -> str:
    """Bytes as text: `1.50 GiB` from a tenth of a GiB on, else `12.3 MiB`."""
    return f"{size / 2**30:.2f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.1f} MiB"
