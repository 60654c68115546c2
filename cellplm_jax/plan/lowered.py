"""A training step lowered for CUDA and not compiled: what its shapes alone say of memory and time.

For machines without the compiler. Known are the arrays a device holds between steps, the operations of all matrix
products, and the stored counts that are scattered; unknown are temporaries, fusions and communication. Memory traffic
is the least that any compiler can reach: parameters and moments once each way, and the operands of products once.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from cellplm_jax.config import TrainConfig
from cellplm_jax.plan.chips import Topology
from cellplm_jax.plan.hlo import Cost
from cellplm_jax.plan.jaxprs import inner_jaxprs, product_flops
from cellplm_jax.plan.roofline import estimate
from cellplm_jax.train.sharding import check_divides, make_mesh
from cellplm_jax.train.step import abstract_batch, abstract_state, compile_training_step


def lower_step(config: TrainConfig, topology: Topology, nonzeros: int) -> dict[str, Any]:
    """Lower the training step of a run for GPUs; keys as of :func:`cellplm_jax.plan.compiler.compile_step`.

    Args:
        config: The run, with its mesh and all sizes.
        topology: The GPUs; this process needs as many devices of any kind.
        nonzeros: Stored counts a piece of a row can hold.

    Raises:
        ConfigError: The mesh does not fit the topology or the run's sizes.
    """
    mesh = make_mesh(config.mesh, devices=jax.devices()[: topology.devices])
    check_divides(
        mesh,
        rows=config.data.rows,
        genes=config.model.genes,
        cells=config.data.cells,
    )
    start = time.monotonic()
    state = abstract_state(config, mesh)
    batch = abstract_batch(config, mesh, nonzeros)
    traced = compile_training_step(config, mesh).trace(state, batch)
    traced_at = time.monotonic()
    processor = time.process_time()
    # Lowering checks that every operation exists for GPUs.
    traced.lower(lowering_platforms=("cuda",))
    flops = product_flops(traced.jaxpr)
    held = _bytes(state)
    given = _bytes(batch)
    products = sum(_operand_bytes(traced.jaxpr)) / topology.devices
    stored = config.accumulate * config.data.rows * config.mesh.cells * nonzeros / topology.devices
    cost = Cost(
        flops=flops / topology.devices,
        passes_flops=flops / topology.devices,
        memory_bytes=2 * held + given + products,
        elements=stored,
    )
    times = estimate(cost, topology)
    total = held + given
    available = topology.chip.memory
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "step_product_flops": flops,
        "source": "lowered",
        "trace_seconds": traced_at - start,
        "compile_seconds": time.monotonic() - traced_at,
        "compile_processor_seconds": time.process_time() - processor,
        "fits": total <= available,
        "memory": {
            "arguments": total,
            "outputs": held,
            "aliased": held,
            "temporaries": 0,
            "code": 0,
            "total": total,
            "available": available,
        },
        "shortage": max(0.0, total - available),
        "device": dataclasses.asdict(cost),
        "compiler": {"flops": None, "bytes_accessed": None, "optimal_seconds": None},
        "seconds": {**dataclasses.asdict(times), "floor": times.floor, "serial": times.serial},
        "binds": times.binds,
    }


def _bytes(tree: Any) -> int:
    """Return the bytes that one device holds of a tree of shapes with shardings."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _operand_bytes(jaxpr: Any, times: int = 1) -> Iterator[float]:
    """Yield the bytes of operands and results of every matrix product, as often as it runs."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name == "dot_general":
            arrays = [part.aval for part in (*equation.invars, *equation.outvars)]
            yield times * float(sum(part.size * part.dtype.itemsize for part in arrays))
            continue
        # Loops of unknown length count once, as in the compiled program.
        rounds = equation.params["length"] if equation.primitive.name == "scan" else 1
        for part in inner_jaxprs(equation.params.values()):
            yield from _operand_bytes(part, times * rounds)
