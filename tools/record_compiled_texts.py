"""Record the compiled texts that ``tests/plan`` reads: small programs for a v5e slice of four chips.

Run with libtpu installed (``pip install 'cellplm-jax[tpu]'``)::

    python tools/record_compiled_texts.py tests/plan/recorded

Identifiers, shapes, layouts and cycle estimates are the compiler's; what the tests do not read is cut away.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from cellplm_jax.plan.compiler import ENVIRONMENT, describe_devices

os.environ.update(ENVIRONMENT)

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cellplm_jax.plan.chips import parse_topology


def shorten(text: str) -> str:
    """Cut metadata, tables of source lines and backend settings other than cycles."""
    text = re.sub(r", metadata=\{[^}]*\}", "", text)
    text = re.sub(r", frontend_attributes=\{[^}]*\}", "", text)
    lines = []
    for line in text.splitlines():
        start = line.find(", backend_config={")
        if start >= 0:
            cycles = re.search(r'"estimated_cycles":"\d+"', line[start:])
            line = line[:start] + (f", backend_config={{{cycles.group()}}}" if cycles else "")
        if line.startswith("HloModule"):
            line = re.match(r"HloModule \S+", line).group() + " num_partitions=4"
        if re.match(r"(\d|FileNames|FunctionNames|FileLocations|StackFrames)", line):
            continue
        lines.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def main(folder: Path) -> None:
    """Write every program's text."""
    devices = np.array(describe_devices(parse_topology("v5e:2x2")))
    mesh = Mesh(devices.reshape(2, 2), ("data", "cells"), axis_types=(AxisType.Auto,) * 2)

    def array(shape, kind=jnp.float32, *axes):
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, kind, sharding=sharding)

    whole = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec("data"))

    def loop(weights, x):
        # 5 rounds of [64, 256] x [256, 256] a device, then a sum over all rows.
        step = lambda hidden, weight: (jnp.tanh(hidden @ weight), None)  # noqa: E731
        return jax.lax.scan(step, x, weights)[0].sum(0)

    def heads(query, key):
        # A batched product: 8 heads of [128, 32] x [32, 128] a device.
        return jnp.einsum("hqd,hkd->hqk", query, key)

    def gather(x):
        return jax.lax.with_sharding_constraint(x * 2, whole)

    def elements(cell, gene, values):
        # 3,000 single elements scattered into [100, 500] a device, and 3,000 gathered.
        empty = jnp.zeros((100, 500), jnp.float32)
        dense = jax.vmap(lambda c, g, v: empty.at[c, g].add(v, mode="drop"))(cell, gene, values)
        return jax.vmap(lambda d, c, g: d.at[c, g].get(mode="fill", fill_value=0))(
            jnp.sin(dense), cell, gene
        )

    def unknown(x):
        return jax.lax.while_loop(lambda v: v.sum() > 1, lambda v: v * 0.5, x)

    programs = {
        "loop": (
            jax.jit(loop, out_shardings=whole),
            array((5, 256, 256)),
            array((256, 256), jnp.float32, ("data", "cells")),
        ),
        "heads": (
            jax.jit(heads),
            *(array((32, 128, 32), jnp.float32, ("data", "cells")) for _ in range(2)),
        ),
        "gather": (jax.jit(gather, out_shardings=whole), array((512, 128), jnp.float32, "cells")),
        "elements": (
            jax.jit(elements, out_shardings=rows),
            *(array((2, 3000), kind, "data") for kind in (jnp.int32, jnp.int32, jnp.float32)),
        ),
        "unknown": (jax.jit(unknown), array((256, 128), jnp.float32, ("data", "cells"))),
    }
    for name, (function, *arguments) in programs.items():
        text = function.lower(*arguments).compile().as_text()
        (folder / f"{name}.txt").write_text(shorten(text), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
