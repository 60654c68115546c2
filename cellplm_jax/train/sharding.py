"""Mesh construction and sharding rules; the only module that uses meshes and partition specs.

One mesh with three axes - ``data`` (rows per batch), ``cells`` (the cells of a row too large for one device) and
``genes`` (the vocabulary) - and one table, :data:`LOGICAL_AXES`, that maps each array axis to a mesh axis. The compiler
derives the communication: flow attention only sums over the cell axis, and embedder and likelihood only sum over the
gene axis, so devices communicate sums, never cells.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cellplm_jax.batch import CellBatch
from cellplm_jax.config import MeshConfig
from cellplm_jax.errors import ConfigError

MESH_AXES = ("data", "cells", "genes")

# Logical array axis -> mesh axis. All other axes are not sharded.
LOGICAL_AXES: tuple[tuple[str, str], ...] = (
    ("samples", "data"),
    ("cells", "cells"),
    ("genes", "genes"),
)

# Axes of the fields of batches. With several pieces, the CSR arrays have an axis of pieces, which is sharded like
# cells; with several segments, ``measured`` has an axis of segments.
BATCH_AXES: dict[str, tuple[str | None, ...]] = {
    "indptr": ("samples", "cells", None),
    "gene": ("samples", "cells", None),
    "count": ("samples", "cells", None),
    "slot": ("samples", "cells", None),
    "cell_mask": ("samples", "cells"),
    "segment": ("samples", "cells"),
    "coordinates": ("samples", "cells", None),
    "has_coordinates": ("samples", "cells"),
    "eigenvectors": ("samples", "cells", None),
    "measured": ("samples", None, None),
    "batch": ("samples", "cells"),
    "dataset": ("samples", "cells"),
    "platform": ("samples", "cells"),
}

# Parameters with a gene axis, by the end of their path; optimizer moments have the same sharding. All other
# parameters are replicated.
PARAMETER_AXES: dict[tuple[str, ...], tuple[str | None, ...]] = {
    ("embedder", "gene_embedding"): ("genes", None),
    ("decoder", "log_mean", "kernel"): (None, "genes"),
    ("decoder", "log_mean", "bias"): ("genes",),
    ("decoder", "mean", "kernel"): (None, "genes"),
    ("decoder", "mean", "bias"): ("genes",),
    ("decoder", "zero_logits", "kernel"): (None, "genes"),
    ("decoder", "zero_logits", "bias"): ("genes",),
    ("decoder", "log_dispersion"): ("genes",),
}


def make_mesh(
    config: MeshConfig | None = None,
    devices: Sequence[jax.Device] | None = None,
    *,
    rows: int | None = None,
) -> Mesh:
    """Create the device mesh of a run.

    Devices are ordered by process and number, with ``data`` outermost: each process holds neighbouring rows of the
    batch, and the axes with more communication use neighbouring devices.

    Args:
        config: Devices along each axis; None: all along ``data``.
        devices: Devices to use; None: those of all processes.
        rows: Rows per batch. With ``data = 0`` and one process, devices that do not divide them are omitted.

    Raises:
        ConfigError: The axes do not multiply to the number of devices.
    """
    config = MeshConfig() if config is None else config
    devices = sorted(
        jax.devices() if devices is None else devices, key=lambda d: (d.process_index, d.id)
    )
    inner = config.cells * config.genes
    data = config.data or len(devices) // inner
    if rows and not config.data and jax.process_count() == 1:
        # On one machine, fewer devices than there are rather than an error: rows must divide evenly.
        data = max((n for n in range(1, data + 1) if rows % n == 0), default=data)
        devices = devices[: data * inner] if len(devices) % inner == 0 else devices
    if data * inner != len(devices):
        raise ConfigError(
            f"a mesh of {data or 'any number'} (data) x {config.cells} (cells) x {config.genes} (genes) for "
            f"{len(devices)} devices",
            "a product equal to the number of devices",
            "Change config.mesh; mesh.data = 0 uses all devices that the other two axes leave",
        )
    # The inner axes communicate more, between neighbouring devices.
    grid = np.array(devices).reshape(data, config.cells, config.genes)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def check_divides(mesh: Mesh, *, rows: int, genes: int, cells: int) -> None:
    """Check that the mesh divides a run's shapes.

    Args:
        mesh: From :func:`make_mesh`.
        rows: Rows per batch.
        genes: Size of the vocabulary.
        cells: Cells per row.

    Raises:
        ConfigError: An axis is not a multiple of its devices; the message lists valid numbers.
    """
    for what, size, axis in (
        ("data.rows", rows, "data"),
        ("data.cells", cells, "cells"),
        ("the vocabulary's number of genes", genes, "genes"),
    ):
        devices = mesh.shape[axis]
        if size % devices:
            possible = [n for n in range(1, 65) if size % n == 0]
            raise ConfigError(
                f"{what} is {size}, to be split over {devices} devices (mesh.{axis})",
                f"a multiple of {devices}, or a mesh.{axis} that divides it: {', '.join(map(str, possible))}",
                f"Change config.mesh.{axis}"
                if axis == "genes"
                else f"Change {what} or config.mesh",
            )


def one_device_mesh() -> Mesh:
    """Return a mesh of this process's first device; every sharding on it is trivial."""
    return make_mesh(MeshConfig(), jax.local_devices()[:1])


def _spec(axes: Sequence[str | None]) -> PartitionSpec:
    table = dict(LOGICAL_AXES)
    return PartitionSpec(*(table.get(axis) if axis else None for axis in axes))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of replicated arrays."""
    return NamedSharding(mesh, PartitionSpec())


def over_cells(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays [samples, cells, ...] over cells."""
    return NamedSharding(mesh, _spec(("samples", "cells")))


def joined_copies(mesh: Mesh, copies: Sequence[Any]) -> Any:
    """Combine equal arrays on several devices into one tree of replicated arrays, without copying.

    Args:
        mesh: Mesh of the devices of the copies.
        copies: Trees of equal arrays, each on one device.
    """

    def join(*leaves: jax.Array) -> jax.Array:
        return jax.make_array_from_single_device_arrays(
            leaves[0].shape,
            replicated(mesh),
            list(leaves),
        )

    return jax.tree.map(join, *copies)


def batch_shardings(mesh: Mesh, batch: CellBatch, *, accumulated: bool = True) -> CellBatch:
    """Return the shardings of a batch's fields.

    Args:
        mesh: From :func:`make_mesh`.
        batch: Arrays or their shapes; determines which fields are present.
        accumulated: Whether the fields have a leading axis of accumulated batches.

    Returns:
        A batch with a sharding in place of each array.
    """
    lead: tuple[str | None, ...] = (None,) if accumulated else ()

    def of(name: str, leaf: Any) -> NamedSharding | None:
        if leaf is None:
            return None
        axes = BATCH_AXES[name]
        if name in ("indptr", "gene", "count", "slot") and leaf.ndim - len(lead) == 2:
            axes = ("samples", None)
        return NamedSharding(mesh, _spec((*lead, *axes)[: leaf.ndim]))

    return CellBatch(**{name: of(name, getattr(batch, name)) for name in BATCH_AXES})  # type: ignore[arg-type]


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """Return the shardings of a state or of parameters: those with a gene axis are sharded over ``genes``.

    Args:
        mesh: From :func:`make_mesh`.
        state: A tree of arrays or shapes that contains the parameters' paths.
    """

    def of(path: tuple, leaf: Any) -> NamedSharding:
        names = tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
        for end, axes in PARAMETER_AXES.items():
            if names[-len(end) :] == end and np.ndim(leaf) == len(axes):
                return NamedSharding(mesh, _spec(axes))
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(of, state)


def local_rows(mesh: Mesh, rows: int) -> tuple[int, int]:
    """Return the rows of a batch that this process loads.

    Args:
        mesh: From :func:`make_mesh`.
        rows: Rows of the global batch.

    Returns:
        The first row, and the number of rows.
    """
    mine = [
        place
        for place, device in np.ndenumerate(mesh.devices)
        if device.process_index == jax.process_index()
    ]
    each = rows // mesh.shape["data"]
    if not mine:
        return 0, each  # a mesh of other machines' devices, for compilation only
    first = min(place[0] for place in mine)
    last = max(place[0] for place in mine)
    return first * each, (last - first + 1) * each


def to_global(mesh: Mesh, batch: CellBatch, rows: int, *, accumulated: bool = True) -> CellBatch:
    """Create a global batch from this process's rows.

    Args:
        mesh: From :func:`make_mesh`.
        batch: numpy arrays with the rows of :func:`local_rows`.
        rows: Rows of the global batch.
        accumulated: Whether the fields have a leading axis of accumulated batches.

    Returns:
        A batch of global ``jax.Array``.
    """
    shardings = batch_shardings(mesh, batch, accumulated=accumulated)
    first, count = local_rows(mesh, rows)
    axis = 1 if accumulated else 0
    # One process has all rows, so device_put can distribute them.
    if count == rows:
        return jax.device_put(batch, shardings)

    def place(local: np.ndarray, sharding: NamedSharding) -> jax.Array:
        shape = (*local.shape[:axis], rows, *local.shape[axis + 1 :])

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[axis].indices(rows)
            inside = slice(start - first, stop - first)
            return local[(*index[:axis], inside, *index[axis + 1 :])]

        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(place, batch, shardings)


def return_freed_memory() -> None:
    """Return freed memory of this process to the system.

    Compiling a training step for a CPU leaves 800 MiB that the C library would keep but that is too fragmented for the
    larger arrays of the step. Has no effect if the C library lacks this call (any except glibc).
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


class MeshFunction:
    """A jitted function that is traced, lowered and called within its mesh and the table of logical axes.

    Args:
        function: Function to compile.
        mesh: From :func:`make_mesh`.
        options: Passed to ``jax.jit``.
    """

    def __init__(self, function: Callable, mesh: Mesh, **options: Any):
        def with_axes(*arguments):
            # Within the traced function: the rules are needed while it is traced, not while it runs.
            with nn.logical_axis_rules(LOGICAL_AXES):
                return function(*arguments)

        self.mesh = mesh
        self.jitted = jax.jit(with_axes, **options)
        self._compiled = False

    def __call__(self, *arguments: Any) -> Any:
        """Run the function."""
        with jax.set_mesh(self.mesh):
            if not self._compiled:
                # Compiled before the first call, so that freed memory is returned before the arrays of the step are
                # allocated.
                self.jitted.lower(*arguments).compile()
                return_freed_memory()
                self._compiled = True
            return self.jitted(*arguments)

    def lower(self, *arguments: Any) -> Any:
        """Lower the function for arguments or their shapes."""
        with jax.set_mesh(self.mesh):
            return self.jitted.lower(*arguments)

    def trace(self, *arguments: Any) -> Any:
        """Trace the function for arguments or their shapes."""
        with jax.set_mesh(self.mesh):
            return self.jitted.trace(*arguments)
