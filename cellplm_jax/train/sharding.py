"""Which array lies where: the only module that knows meshes and partition specs.

Today the rule is one line: batches are split over devices by their leading ``samples`` axis, everything else is
replicated. Further axes (cells, genes) are rows to add here; no other module names a device.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

SAMPLES_AXIS = "data"


def make_mesh(samples: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh over the most devices that divide the number of samples in a batch.

    Args:
        samples: Sentences in a batch.
        devices: Devices to use; None: all of this process.
    """
    devices = list(jax.local_devices() if devices is None else devices)
    count = max(n for n in range(1, len(devices) + 1) if samples % n == 0)
    return Mesh(np.array(devices[:count]), (SAMPLES_AXIS,), axis_types=(AxisType.Auto,))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of every array of a batch."""
    return NamedSharding(mesh, PartitionSpec(SAMPLES_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
