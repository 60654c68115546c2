"""Compilation of a training step for one mesh of a TPU slice or of GPUs, without the devices.

The compiler is ``libtpu``, the same library that runs on TPU machines, or JAX's CUDA plugin, which compiles for a GPU
from its description. It reads its settings from the environment when it is first loaded, writes to standard error, and
ends the process on errors that it cannot handle. Therefore :func:`compile_apart` runs :func:`compile_step` in a
separate process. Without the CUDA plugin the step
is lowered for CUDA and not compiled: :mod:`cellplm_jax.plan.lowered`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cellplm_jax.config import TrainConfig, from_dict, to_dict
from cellplm_jax.errors import CellPLMError, ConfigError, InputError, require
from cellplm_jax.plan import gpus
from cellplm_jax.plan.chips import GIBIBYTE, Topology, parse_topology
from cellplm_jax.plan.hlo import cost
from cellplm_jax.plan.jaxprs import product_flops
from cellplm_jax.plan.roofline import estimate
from cellplm_jax.platforms import has_cuda_plugin
from cellplm_jax.storage import atomic_write_text, scratch_folder

# Settings of libtpu for a machine without a TPU: do not look for a TPU or for the metadata server of a cloud.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def require_compiler(topology: Topology | None = None) -> None:
    """Check that the compiler is installed; GPUs can be planned without one.

    Args:
        topology: The target; None: TPUs.

    Raises:
        MissingDependencyError: It is not installed; the message names the package.
    """
    if topology is None or topology.chip.platform == "tpu":
        require("libtpu", "tpu", "Compiling for a TPU")


def parse_shortage(message: str) -> tuple[float, float] | None:
    """Parse needed and available memory, in bytes, from an error message of the compiler.

    Args:
        message: Text of the exception.

    Returns:
        (needed, available), or None if the message is about something else.
    """
    number = r"([\d.]+)([KMGT]?)i?B?"
    patterns = (
        rf"Used {number} of {number} hbm",
        rf"\({number}\) exceeds available HBM \({number}\)",
        rf"Used {number} of {number}",
        rf"requires {number}.*?(?:available|capacity)[^\d]*{number}",
    )
    for pattern in patterns:
        match = re.search(pattern, message, re.IGNORECASE | re.DOTALL)
        if match:
            needed, unit, available, other = match.groups()
            return (
                float(needed.rstrip(".")) * UNITS.get(unit.upper(), 1),
                float(available.rstrip(".")) * UNITS.get(other.upper(), 1),
            )
    return None


def describe_devices(topology: Topology) -> list[Any]:
    """Return the devices of a slice, as JAX uses them to compile for it.

    Args:
        topology: The slice.

    Raises:
        InputError: The compiler does not know the slice.
    """
    from jax.experimental import topologies

    options: dict[str, Any] = dict(topology.chip.options)
    name = topology.name
    chip = topology.chip
    if chip.platform == "cuda":
        # Hosts, processes per host, GPUs per process.
        options |= {
            "topology": f"1x1x{topology.devices}",
            "target_config": gpus.target_config(chip.name),
        }
        name = ""
    elif topology.devices == 1:
        # By default a host has four chips, and older versions reject a slice smaller than a host.
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        description = topologies.get_topology_desc(
            platform=chip.platform,
            topology_name=name,
            **options,
        )
    except Exception as error:
        raise InputError(
            f"the compiler refuses the topology '{topology.name}' ({str(error).splitlines()[0]})",
            "a shape that exists",
            "Choose another one",
        ) from error
    devices = list(description.devices)
    if len(devices) != topology.devices:
        raise InputError(
            f"the compiler sees {len(devices)} devices in '{topology.name}'",
            f"{topology.devices}",
            "Install another version of the compiler",
        )
    return devices


def compile_step(config: TrainConfig, topology: Topology, nonzeros: int) -> dict[str, Any]:
    """Compile the training step of a run and return its cost; see :mod:`cellplm_jax.plan.search` for the keys.

    Args:
        config: The run, with its mesh and all sizes.
        topology: The slice.
        nonzeros: Maximum number of stored counts per piece of a row.

    Raises:
        ConfigError: The mesh does not fit the slice or the run's sizes.
        InputError: The compiler does not know the slice.
    """
    require_compiler(topology)
    if topology.chip.platform == "cuda" and not has_cuda_plugin():
        from cellplm_jax.plan.lowered import lower_step

        return lower_step(config, topology, nonzeros)
    from cellplm_jax.train.sharding import check_divides, make_mesh
    from cellplm_jax.train.step import abstract_batch, abstract_state, compile_training_step

    mesh = make_mesh(config.mesh, devices=describe_devices(topology))
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
    flops = product_flops(traced.jaxpr)
    lowered = traced.lower()
    traced_at = time.monotonic()
    processor = time.process_time()
    result: dict[str, Any] = {
        "parameters": _size(state.params),
        "step_product_flops": flops,
        "source": "compiled",
        "trace_seconds": traced_at - start,
    }
    dumps = tempfile.TemporaryDirectory(prefix="cellplm-plan-text-")
    try:
        options = {"xla_dump_to": dumps.name, "xla_dump_hlo_as_text": True}
        if topology.chip.platform == "cuda":
            # No dump: for a GPU it adds no text that JAX cannot read itself. No autotuning: it would need a GPU.
            options = {"xla_gpu_autotune_level": 0}
        compiled = lowered.compile(compiler_options=options)
    except Exception as error:
        shortage = parse_shortage(str(error))
        if shortage is None:
            raise
        needed, available = shortage
        return {
            **result,
            "compile_seconds": time.monotonic() - traced_at,
            "compile_processor_seconds": time.process_time() - processor,
            "fits": False,
            "memory": {"total": needed, "available": available},
            "shortage": needed - available,
            "reason": str(error).splitlines()[0],
        }
    result["compile_seconds"] = time.monotonic() - traced_at
    result["compile_processor_seconds"] = time.process_time() - processor
    analysis = compiled.memory_analysis()
    memory = {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes,
        "aliased": analysis.alias_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "code": analysis.generated_code_size_in_bytes,
    }
    total = sum(memory.values()) - 2 * memory["aliased"]
    work = cost(_text(compiled, Path(dumps.name)))
    dumps.cleanup()
    times = estimate(work, topology)
    stated = compiled.cost_analysis() or {}
    return {
        **result,
        "fits": total <= topology.chip.memory,
        "memory": {**memory, "total": total, "available": topology.chip.memory},
        "shortage": max(0.0, total - topology.chip.memory),
        "device": dataclasses.asdict(work),
        "compiler": {
            "flops": stated.get("flops"),
            "bytes_accessed": stated.get("bytes accessed"),
            "optimal_seconds": stated.get("optimal_seconds"),
        },
        "seconds": {
            **dataclasses.asdict(times),
            "floor": times.floor,
            "serial": times.serial,
        },
        "binds": times.binds,
    }


def _text(compiled: Any, dumps: Path) -> str:
    """Return the text of a compiled program, from the compiler's own files if JAX cannot read the program.

    A compiler newer than JAX may use instructions that JAX cannot convert to text.
    """
    try:
        return compiled.as_text()
    except Exception as error:
        files = list(dumps.glob("*.after_codegen.txt"))
        if not files:
            raise InputError(
                f"JAX cannot read what the compiler made ({str(error).splitlines()[0]})",
                "a compiler of the age of JAX",
                "Install the one that belongs to it: pip install 'cellplm-jax[tpu]'",
            ) from error
        return max(files, key=lambda path: path.stat().st_size).read_text(encoding="utf-8")


def _size(tree: Any) -> int:
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def compile_apart(
    config: TrainConfig,
    topology: Topology,
    nonzeros: int,
    *,
    timeout: float | None = None,
) -> dict[str, Any]:
    """Run :func:`compile_step` in a separate process.

    Args:
        config: The run, with its mesh and all sizes.
        topology: The slice.
        nonzeros: Maximum number of stored counts per piece of a row.
        timeout: Seconds after which the compiler is stopped; None: never.

    Raises:
        ConfigError: The mesh does not fit the slice or the run's sizes.
        InputError: The compiler does not know the slice, was stopped, or failed for another reason.
        MissingDependencyError: The compiler is not installed.
    """
    require_compiler(topology)
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment.update(ENVIRONMENT)
    if topology.chip.platform == "cuda":
        # Simulated devices for the mesh when the step is lowered without the plugin.
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={topology.devices}"
    package = str(Path(__file__).resolve().parents[2])
    inherited = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([package, *([inherited] if inherited else [])])
    with scratch_folder("cellplm-plan-") as directory:
        # The compiler's temporary files are deleted with the folder, even if the compiler is stopped.
        environment["TMPDIR"] = str(directory)
        request = directory / "request.json"
        answer = directory / "answer.json"
        request.write_text(
            json.dumps(
                {"config": to_dict(config), "topology": topology.name, "nonzeros": nonzeros}
            ),
            encoding="utf-8",
        )
        command = [sys.executable, "-m", __name__, str(request), str(answer)]
        try:
            done = subprocess.run(
                command,
                env=environment,
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as error:
            raise InputError(
                f"the compiler had not finished after {timeout:.0f} s",
                "an answer by then",
                "Give it more time with --timeout, or a smaller configuration",
            ) from error
        if not answer.exists():
            last = [line for line in done.stderr.splitlines() if line.strip()][-3:]
            raise InputError(
                f"the compiler ended with status {done.returncode} ({' | '.join(last) or 'no message'})",
                "a compiled step",
                "Try another mesh or another version of libtpu; with too little memory on this machine the system "
                "ends it too",
            )
        result = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in result:
        kind = {"ConfigError": ConfigError}.get(result["error"]["kind"], InputError)
        raise kind(result["error"]["message"])
    return result


def main(argv: list[str]) -> int:
    """Answer one request: ``python -m cellplm_jax.plan.compiler REQUEST.json ANSWER.json``."""
    request = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    try:
        result = compile_step(
            from_dict(TrainConfig, request["config"]),
            parse_topology(request["topology"]),
            request["nonzeros"],
        )
    except CellPLMError as error:
        result = {"error": {"kind": type(error).__name__, "message": str(error)}}
    atomic_write_text(argv[1], json.dumps(result))
    return 0


def in_gibibytes(size: float) -> str:
    """Return a number of bytes as text in GiB."""
    return f"{size / GIBIBYTE:.2f} GiB"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
