"""Figures of TPU chips and GPUs, and the slices and hosts they are rented in.

Figures are the vendors', for TPUs from the page of each generation under https://docs.cloud.google.com/tpu/docs/
(``v4``, ``v5e``, ``v5p``, ``v6e``, ``tpu7x``), for GPUs see :mod:`cellplm_jax.plan.gpus`; no figure here was measured
by this project. Memory that a program may use is a little less than the chip has: for TPUs it is what the compiler
states when a program does not fit.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from cellplm_jax.errors import InputError, nearest
from cellplm_jax.plan import gpus

GIBIBYTE = 2**30


@dataclass(frozen=True)
class Chip:
    """One generation of TPU, or one GPU; all figures are those of a JAX device.

    Attributes:
        name: As topologies name it.
        flops: Peak of matrix products in bfloat16, operations/s.
        memory: HBM that a program may use, bytes.
        memory_bandwidth: HBM, bytes/s.
        link_bandwidth: Interconnect, bytes/s that all links of the chip together send one way; half of what the vendor
            calls bidirectional bandwidth.
        dimensions: Dimensions of the torus of links: a chip has two links along each.
        wraps: Extent along a dimension from which on the links close to a ring.
        clock: Cycles/s of the matrix units: ``flops`` over operations a cycle.
        cores: Cores of a chip that count in names such as ``v5p-256``; 1 where such names count chips.
        options: What the compiler must be told to see a chip as one device.
        devices: JAX devices of a chip: 2 for ``tpu7x``, whose chips are two halves with their own memory; else 1.
        platform: ``"tpu"`` or ``"cuda"``.
        elements_a_cycle: Single elements gathered or scattered in a cycle: assumed, not measured.
    """

    name: str
    flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float
    dimensions: int
    wraps: int
    clock: float
    cores: int
    options: tuple[tuple[str, str], ...] = ()
    devices: int = 1
    platform: str = "tpu"
    elements_a_cycle: float = 1.0


CHIPS: dict[str, Chip] = {
    # 275 TFLOP/s, 32 GiB at 1200 GB/s; 8 matrix units of 128 x 128; six links, 2400 Gbit/s together.
    "v4": Chip(
        name="v4",
        flops=275e12,
        memory=30.75 * GIBIBYTE,
        memory_bandwidth=1200e9,
        link_bandwidth=300e9,
        dimensions=3,
        wraps=4,
        clock=275e12 / (8 * 2 * 128 * 128),
        cores=2,
        options=(("chip_config_name", "megacore"),),
    ),
    # 197 TFLOP/s, 16 GB at 819 GB/s; 4 matrix units of 128 x 128; four links, 400 GB/s both ways.
    "v5e": Chip(
        name="v5e",
        flops=197e12,
        memory=15.75 * GIBIBYTE,
        memory_bandwidth=819e9,
        link_bandwidth=200e9,
        dimensions=2,
        wraps=16,
        clock=197e12 / (4 * 2 * 128 * 128),
        cores=1,
    ),
    # 459 TFLOP/s, 95 GB at 2765 GB/s; 8 matrix units of 128 x 128; six links, 4800 Gbit/s together.
    "v5p": Chip(
        name="v5p",
        flops=459e12,
        memory=95.73 * GIBIBYTE,
        memory_bandwidth=2765e9,
        link_bandwidth=600e9,
        dimensions=3,
        wraps=4,
        clock=459e12 / (8 * 2 * 128 * 128),
        cores=2,
    ),
    # 918 TFLOP/s, 32 GB at 1638 GB/s; four links, 800 GB/s both ways. The operations a cycle are those that the
    # compiler reckons with for a large product.
    "v6e": Chip(
        name="v6e",
        flops=918e12,
        memory=31.24 * GIBIBYTE,
        memory_bandwidth=1638e9,
        link_bandwidth=400e9,
        dimensions=2,
        wraps=16,
        clock=918e12 / (4 * 2 * 256 * 256),
        cores=1,
    ),
    # Of a device, half a chip. Of the chip: 2307 TFLOP/s, 192 GiB at 7380 GB/s; six links, 1200 GB/s both ways.
    "tpu7x": Chip(
        name="tpu7x",
        flops=2307e12 / 2,
        memory=94.74 * GIBIBYTE,
        memory_bandwidth=7380e9 / 2,
        link_bandwidth=600e9 / 2,
        dimensions=3,
        wraps=4,
        clock=2307e12 / 2 / (4 * 2 * 256 * 256),
        cores=2,
        devices=2,
    ),
}

# Shapes of slices as they are rented, smallest first; the compiler accepts others too.
SHAPES: dict[str, tuple[str, ...]] = {
    "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
    "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
    "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "tpu7x": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
}


def gpu_chip(name: str) -> Chip:
    """Return a GPU of :data:`cellplm_jax.plan.gpus.GPUS`; its links go to a switch, so that every group has all."""
    gpu = gpus.GPUS[name]
    clock = gpu.flops / (gpu.multiprocessors * gpu.products_a_cycle)
    return Chip(
        name=name,
        flops=gpu.flops,
        memory=gpus.MEMORY_SHARE * gpu.memory,
        memory_bandwidth=float(gpu.memory_bandwidth),
        link_bandwidth=gpu.link_bandwidth,
        dimensions=1,
        wraps=1,
        clock=clock,
        cores=1,
        platform="cuda",
        # An element moves a sector of memory.
        elements_a_cycle=gpu.memory_bandwidth / gpus.SECTOR / clock,
    )


@dataclass(frozen=True)
class Topology:
    """A slice of TPUs, wired as a mesh or torus, or the GPUs of one host.

    Attributes:
        chip: The generation.
        shape: Chips along each dimension.
    """

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """The name the compiler knows it by, such as ``v5e:16x16``."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def devices(self) -> int:
        """Number of JAX devices."""
        return math.prod(self.shape) * self.chip.devices

    @property
    def accelerator(self) -> str:
        """The name it is rented by, such as ``v5e-256`` (v4, v5p and tpu7x count cores, two a chip)."""
        return f"{self.chip.name}-{math.prod(self.shape) * self.chip.cores}"

    def ring_bandwidth(self, group: int) -> float:
        """Return the bytes/s that a chip can send in a collective among ``group`` chips.

        A group as large as the slice uses the links of every dimension; a smaller one is taken to lie along one
        dimension. Along a dimension that does not close to a ring, the two ends have one neighbour only and traffic
        goes to and fro: half.

        Args:
            group: Chips that take part.
        """
        each = self.chip.link_bandwidth / self.chip.dimensions
        lines = [extent for extent in self.shape if extent > 1] or [1]

        def along(extent: int) -> float:
            return each if extent % self.chip.wraps == 0 else each / 2

        if group >= self.devices:
            return sum(map(along, lines))
        return along(max(lines))


def known_topologies() -> list[str]:
    """Return the names of all slices and hosts in the tables, those of slices as the compiler writes them."""
    slices = [f"{name}:{shape}" for name, shapes in SHAPES.items() for shape in shapes]
    return [*slices, *gpus.known_hosts()]


def parse_topology(name: str) -> Topology:
    """Read the name of a slice of TPUs, or of a host of GPUs.

    Args:
        name: ``v5e:16x16`` (chips along each dimension), or the name it is rented by, ``v5e-256``. For v4, v5p and
            tpu7x the latter counts cores, two a chip: ``v5p-256`` is 128 chips. Of GPUs: ``h100:8``, eight of one host.

    Raises:
        InputError: There is no such generation or shape; the message lists those that are known.
    """
    host = gpus.parse_host(name)
    if host is not None:
        return Topology(gpu_chip(host[0]), (host[1],))
    match = re.fullmatch(
        r"(?:tpu)?(v\w+?|tpu7x|7x)(?:[:=_](\d+(?:x\d+)*)|-(\d+))", name.strip().lower()
    )
    generation = {
        "v5litepod": "v5e",
        "v5lite": "v5e",
        "v6lite": "v6e",
        "7x": "tpu7x",
        "v7x": "tpu7x",
    }.get(match.group(1) if match else "", match.group(1) if match else "")
    if match is None or generation not in CHIPS:
        raise InputError(
            f"topology '{name}' is not known",
            f"one of {', '.join(known_topologies())}, or a name such as v5e-256 or h100:8",
            nearest(name, known_topologies(), "Choose one of them"),
        )
    chip = CHIPS[generation]
    if match.group(2):
        shape = tuple(map(int, match.group(2).split("x")))
        if chip.dimensions == 3 and len(shape) == 2:
            shape = (*shape, 1)
        possible = len(shape) == chip.dimensions and all(shape)
        if not possible or (math.prod(shape) > 1 and any(n % 2 for n in shape[:2])):
            raise InputError(
                f"topology '{name}' has an impossible shape",
                f"{chip.dimensions} extents, the first two even, such as "
                + ", ".join(f"{generation}:{shape}" for shape in SHAPES[generation]),
                "Choose one of them",
            )
        return Topology(chip, shape)
    sizes = {
        math.prod(map(int, shape.split("x"))) * chip.cores: tuple(map(int, shape.split("x")))
        for shape in SHAPES[generation]
    }
    size = int(match.group(3))
    if size not in sizes:
        raise InputError(
            f"topology '{name}' has an unknown size",
            f"one of {', '.join(f'{generation}-{n}' for n in sizes)}"
            + (" (cores, two a chip)" if chip.cores == 2 else ""),
            "Choose one of them, or give the extents, such as "
            + f"{generation}:{SHAPES[generation][-1]}",
        )
    return Topology(chip, sizes[size])
