"""Figures of GPUs, and what XLA must be told to compile for one that is not there.

Matrix products, memory and NVLink are the vendor's figures for the SXM parts, dense: nobody measured them here. The
compiler plans its kernels from the number of multiprocessors, their clock, caches and limits; XLA keeps the same
figures under ``xla/backends/gpu/target_config``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cellplm_jax.errors import InputError

HOSTS = (1, 2, 4, 8)
"""GPUs of one host, connected by NVLink."""

MEMORY_SHARE = 0.9
"""Part of the memory that a program may use, with ``XLA_PYTHON_CLIENT_MEM_FRACTION=.9``; JAX's own default is .75."""

SECTOR = 32
"""Bytes that one access to memory moves at the least."""


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        title: What the driver calls it.
        flops: Peak of matrix products in bfloat16, operations/s, without sparsity.
        memory: Bytes.
        memory_bandwidth: Bytes/s.
        link_bandwidth: NVLink, bytes/s one way.
        capability: Major compute capability.
        multiprocessors: Their number.
        clock: Hertz of the multiprocessors.
        products_a_cycle: Operations of matrix products a multiprocessor does in a cycle.
        cache: Bytes of the L2 cache.
    """

    title: str
    flops: float
    memory: int
    memory_bandwidth: int
    link_bandwidth: float
    capability: int
    multiprocessors: int
    clock: float
    products_a_cycle: int
    cache: int


GPUS: dict[str, Gpu] = {
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", 989e12, 84_942_979_072, 3_352_320_000_000, 450e9,
        capability=9, multiprocessors=132, clock=1.98e9, products_a_cycle=4096, cache=50 * 2**20,
    ),
    "h200": Gpu(
        "NVIDIA H200", 989e12, 151_397_597_184, 4_800_000_000_000, 450e9,
        capability=9, multiprocessors=132, clock=1.98e9, products_a_cycle=4096, cache=50 * 2**20,
    ),
    "b200": Gpu(
        "NVIDIA B200", 2250e12, 191_514_411_008, 7_672_320_000_000, 900e9,
        capability=10, multiprocessors=148, clock=1.965e9, products_a_cycle=8192, cache=132_644_864,
    ),
}  # fmt: skip


def known_hosts() -> list[str]:
    """Return the names of the hosts that :func:`parse_host` reads."""
    return [f"{name}:{number}" for name in GPUS for number in HOSTS]


def parse_host(name: str) -> tuple[str, int] | None:
    """Read the name of a host of GPUs, such as ``h100:8``, ``H100-8`` or ``h100`` (one).

    Returns:
        Name of the GPU and their number; None if it is no name of a GPU.

    Raises:
        InputError: There is no host with that many.
    """
    match = re.fullmatch(r"([a-z]+\d+)(?:[:x-](\d+))?", name.strip().lower())
    if match is None or match.group(1) not in GPUS:
        return None
    gpu = match.group(1)
    number = int(match.group(2) or 1)
    if number not in HOSTS:
        raise InputError(
            f"topology '{name}' has {number} GPUs",
            f"the GPUs of one host: {', '.join(f'{gpu}:{n}' for n in HOSTS)}",
            "Choose one of them; more hosts add devices along data",
        )
    return gpu, number


def target_config(name: str) -> str:
    """Return the target configuration of XLA for a GPU, a protocol buffer as text."""
    gpu = GPUS[name]
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 2**10,
        "shared_memory_per_block_optin": 227 * 2**10,
        "shared_memory_per_core": 228 * 2**10,
        "threads_per_core_limit": 2048,
        "core_count": gpu.multiprocessors,
        "fpus_per_core": 128,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "memory_bandwidth": gpu.memory_bandwidth,
        "l2_cache_size": gpu.cache,
        "clock_rate_ghz": gpu.clock / 1e9,
        "device_memory_size": gpu.memory,
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
    }
    lines = [f"  {key}: {value}" for key, value in device.items()]
    return "\n".join(
        [
            "gpu_device_info {",
            *lines,
            f"  cuda_compute_capability {{ major: {gpu.capability} }}",
            "}",
            'platform_name: "CUDA"',
            "dnn_version_info { major: 9 minor: 10 }",
            "runtime_version { major: 13 }",
            f'device_description_str: "{gpu.title}"',
        ]
    )
