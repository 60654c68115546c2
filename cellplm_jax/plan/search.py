"""Mesh search for ``cellplm plan``: compile the training step for several meshes and report the costs."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cellplm_jax.config import MeshConfig, TrainConfig, from_config_dict, from_dict, to_dict
from cellplm_jax.errors import ConfigError, InputError, nearest
from cellplm_jax.plan.chips import Topology, parse_topology
from cellplm_jax.plan.compiler import compile_apart, in_gibibytes, require_compiler
from cellplm_jax.plan.roofline import RESOURCES
from cellplm_jax.presets import PRESETS, preset
from cellplm_jax.untrusted import parse_json, read_text

# Defaults for the data: the vocabulary and the sample tables of the published checkpoint, and stored counts per cell
# as in its training atlases.
GENES = 19_374
BATCHES = 12_596
DATASETS = 484
PLATFORMS = 8
NONZEROS_PER_CELL = 1_500

AXES = ("data", "cells", "genes")
# Minimum number of cells of a row per device, and maximum number of devices along the vocabulary.
FEWEST_CELLS = 64
MOST_GENE_DEVICES = 16


def load_config(source: str) -> TrainConfig:
    """Read a training configuration.

    Args:
        source: ``FILE.py:variant`` with a ``get_config(variant)`` as for the launch programs, a ``.json`` file with
            a configuration (such as that of a work directory), or the name of a preset.

    Raises:
        ConfigError: The file or variant does not exist, or is not a valid configuration.
    """
    name, _, variant = source.partition(":")
    path = Path(name)
    if not name or (not path.suffix and not path.exists()):
        return preset(name or variant)
    if not path.is_file():
        raise ConfigError(
            f"there is no configuration file '{name}'",
            f"a Python or JSON file, or a preset: {', '.join(PRESETS)}",
            "Check the path",
        )
    if path.suffix == ".json":
        try:
            values = parse_json(read_text(path))
        except ValueError as error:
            raise ConfigError(
                f"'{name}' is not JSON ({error})", "a configuration", "Check the file"
            ) from error
        # The file of a work directory contains more than the configuration.
        for key in ("train", "config"):
            if isinstance(values, Mapping) and isinstance(values.get(key), Mapping):
                values = values[key]
        return from_dict(TrainConfig, values)
    specification = importlib.util.spec_from_file_location("_cellplm_plan_config", path)
    get_config = None
    if specification is not None and specification.loader is not None:
        module = importlib.util.module_from_spec(specification)
        try:
            specification.loader.exec_module(module)
        except Exception as error:
            raise ConfigError(
                f"'{name}' cannot be run as Python ({type(error).__name__}: {error})",
                "a file with get_config(variant)",
                "Check the file",
            ) from error
        get_config = getattr(module, "get_config", None)
    if get_config is None:
        raise ConfigError(
            f"'{name}' has no get_config",
            "a function get_config(variant) that returns a ConfigDict",
            "Use a file such as configs/pretrain.py",
        )
    values = get_config(variant) if variant else get_config()
    return from_config_dict(TrainConfig, values)


def change(config: TrainConfig, settings: Sequence[str]) -> TrainConfig:
    """Change values of a configuration by their dotted names.

    Args:
        config: The configuration.
        settings: ``name=value``, such as ``data.rows=512`` or ``precision=bfloat16``; values are parsed as JSON if
            possible, otherwise they are text.

    Raises:
        ConfigError: A name is unknown or a value is invalid.
    """
    values = to_dict(config)
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator or not name:
            raise ConfigError(
                f"--set was given '{setting}'", "name=value", "Write for example data.rows=512"
            )
        try:
            value = parse_json(text.lower() if text in ("True", "False") else text)
        except ValueError:
            value = text
        place = values
        *parents, last = name.split(".")
        for parent in parents:
            # An unknown name is created here, and from_dict rejects it with the nearest one.
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ConfigError(
                    f"--set was given '{name}', where '{parent}' is a value",
                    "the dotted name of a value",
                    "Check the name",
                )
        place[last] = value
    return from_dict(TrainConfig, values)


def complete(
    config: TrainConfig,
    *,
    genes: int | None = None,
    batches: int | None = None,
    datasets: int | None = None,
    platforms: int | None = None,
) -> TrainConfig:
    """Complete a configuration with sizes that a run takes from its data: vocabulary and covariate rows.

    Args:
        config: The configuration; its values are kept if no other is given here.
        genes, batches, datasets, platforms: Sizes; None: the configuration's, or else those of the published model.
    """
    decoder = config.model.decoder
    decoder = dataclasses.replace(
        decoder,
        batches=decoder.batches or BATCHES if batches is None else batches,
        datasets=decoder.datasets or DATASETS if datasets is None else datasets,
        platforms=decoder.platforms or PLATFORMS if platforms is None else platforms,
    )
    if genes is None:
        genes = config.model.genes if config.model.genes > 1 else GENES
    model = dataclasses.replace(config.model, genes=genes, decoder=decoder)
    return dataclasses.replace(config, model=model)


def parse_mesh(text: str, devices: int) -> MeshConfig:
    """Parse a mesh such as ``data=64,cells=4``; other axes have one device, ``data`` by default all remaining ones.

    Raises:
        InputError: An axis is unknown, or the axes do not multiply to the number of devices.
    """
    sizes: dict[str, int] = {}
    for part in text.replace(" ", "").split(","):
        name, _, number = part.partition("=")
        if name not in AXES:
            raise InputError(
                f"--mesh names an axis '{name}'",
                f"one of {', '.join(AXES)}",
                nearest(name, AXES, "Write for example data=64,cells=4"),
            )
        if not number.isdigit() or int(number) < 1 or name in sizes:
            raise InputError(
                f"--mesh was given '{part}'",
                "each axis once, with a positive integer",
                "Write for example data=64,cells=4",
            )
        sizes[name] = int(number)
    inner = sizes.get("cells", 1) * sizes.get("genes", 1)
    data = sizes.get("data", max(1, devices // inner))
    if data * inner != devices:
        raise InputError(
            f"--mesh {text} makes {data} x {sizes.get('cells', 1)} x {sizes.get('genes', 1)} = {data * inner} devices",
            f"the {devices} of the topology",
            "Change one of the axes",
        )
    return MeshConfig(
        data=data,
        cells=sizes.get("cells", 1),
        genes=sizes.get("genes", 1),
    )


def with_mesh(config: TrainConfig, mesh: MeshConfig, rows: int | None) -> TrainConfig:
    """Return the configuration on a mesh, with a divisible number of rows.

    Args:
        config: The configuration.
        mesh: The mesh.
        rows: Rows per batch; None: the configuration's, raised to the next multiple of ``mesh.data``.

    Raises:
        ConfigError: The mesh does not divide the given rows, or the cells per row.
    """
    wanted = rows or -(-config.data.rows // mesh.data) * mesh.data
    data = dataclasses.replace(config.data, rows=wanted)
    return dataclasses.replace(config, data=data, mesh=mesh)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A candidate mesh, with rough estimates for sorting; reported numbers come from the compiler.

    Attributes:
        config: The configuration on the mesh.
        memory: Approximate bytes per device.
        cells_per_second: Approximate cells per second.
    """

    config: TrainConfig
    memory: float
    cells_per_second: float


def _guess(config: TrainConfig, topology: Topology, nonzeros_per_cell: int) -> Candidate:
    """Estimate the cost of a mesh roughly, from the sizes of the large arrays."""
    model = config.model
    mesh = config.mesh
    data = config.data
    rows = data.rows / mesh.data
    cells = data.cells * (1 - config.masking.drop_cells) / mesh.cells
    genes = model.genes / mesh.genes
    hidden = model.hidden
    # Per gene: its row of the embedding, its column of the output layer, and a few single parameters.
    by_gene = genes * (hidden + model.decoder.bottleneck + 3)
    layer = (4 + 2 * model.encoder.feedforward) * hidden**2
    tables = model.decoder.hidden * (
        model.decoder.batches + model.decoder.datasets + model.decoder.platforms
    )
    others = model.encoder.layers * layer + tables + 2 * hidden * model.latent.size
    dense = rows * cells * genes
    width = 1.0 if config.rematerialize else model.encoder.layers
    activations = rows * cells * hidden * 4 * (12 * width + 20)
    wire = rows * data.cells / mesh.cells * nonzeros_per_cell * (4 * config.accumulate + 16)
    # 16 bytes per parameter: itself, its gradient and both moments, in float32.
    memory = 16 * (by_gene + others) + 10 * dense + activations + wire
    flops = 6 * rows * cells * (by_gene + model.encoder.layers * layer)
    # One more forward pass on top of one forward and two backward.
    flops *= 4 / 3 if config.rematerialize else 1
    sent = 8 * (by_gene + others) + 16 * rows * cells * hidden * (mesh.genes > 1)
    chip = topology.chip
    # Elementwise operations on dense arrays and single-element accesses outweigh the products.
    seconds = config.accumulate * (flops / chip.flops + 30 * dense * 4 / chip.memory_bandwidth)
    seconds += config.accumulate * 12 * rows * cells * nonzeros_per_cell / mesh.genes / chip.clock
    seconds += sent / chip.link_bandwidth
    seconds += 0.0005 * (mesh.cells > 1) + 0.0005 * (mesh.genes > 1)
    return Candidate(config, memory, config.accumulate * data.rows * data.cells / seconds)


def candidates(
    config: TrainConfig,
    topology: Topology,
    nonzeros_per_cell: int,
    *,
    rows: int | None = None,
) -> list[Candidate]:
    """Return candidate meshes, the most promising first.

    Args:
        config: The configuration; its own mesh is one of them.
        topology: The slice.
        nonzeros_per_cell: Stored counts per cell.
        rows: Rows per batch; None: at least the configuration's, see :func:`with_mesh`.

    Returns:
        All factorisations of the number of devices as data x cells x genes that divide rows, cells and vocabulary
        and leave each device enough cells: those that seem to fit by decreasing speed, then the others by
        increasing memory.
    """
    found = []
    devices = topology.devices
    # All factorisations of the number of devices into three axes.
    for cells in (n for n in range(1, devices + 1) if devices % n == 0):
        if config.data.cells % cells or (cells > 1 and config.data.cells // cells < FEWEST_CELLS):
            continue
        for genes in (n for n in range(1, devices // cells + 1) if (devices // cells) % n == 0):
            if config.model.genes % genes or genes > MOST_GENE_DEVICES:
                continue
            mesh = MeshConfig(data=devices // cells // genes, cells=cells, genes=genes)
            if rows is not None and rows % mesh.data:
                continue
            found.append(_guess(with_mesh(config, mesh, rows), topology, nonzeros_per_cell))
    fits = [entry for entry in found if entry.memory <= topology.chip.memory]
    rest = [entry for entry in found if entry.memory > topology.chip.memory]
    return sorted(fits, key=lambda entry: -entry.cells_per_second) + sorted(
        rest, key=lambda entry: entry.memory
    )


def plan(
    config: TrainConfig,
    topology: str,
    *,
    mesh: str | None = None,
    rows: int | None = None,
    nonzeros_per_cell: int = NONZEROS_PER_CELL,
    tries: int = 3,
    timeout: float | None = None,
    say: Callable[[str], None] | None = None,
    compile_with: Callable[..., dict[str, Any]] = compile_apart,
) -> dict[str, Any]:
    """Compile a run's training step for a slice, on a given mesh or on several, and return the costs.

    Args:
        config: The run, with all sizes filled in (:func:`complete`).
        topology: Name of the slice.
        mesh: Such as ``data=64,cells=4``; None: the most promising ones are compiled.
        rows: Rows per batch; None: the configuration's, raised to a multiple of the devices along ``data``.
        nonzeros_per_cell: Stored counts per cell; they determine the size of the input of the devices.
        tries: Maximum number of meshes to compile; if none fits, one more: the one with the lowest estimated memory.
        timeout: Timeout of each compilation in seconds; None: no timeout.
        say: Called with a message before and after each compilation.
        compile_with: Function that compiles one step; tests replace it.

    Returns:
        Plain values, ready for JSON: ``topology``, ``accelerator``, ``devices``, ``chip``, ``tried`` (one dictionary
        per
        mesh: ``mesh``, ``rows``, ``fits``, ``memory`` and ``shortage`` in bytes per device, ``device`` (its work per
        step), ``compiler`` (its own figures), ``seconds``, ``binds``, ``cells_per_second`` and so on), ``best``
        (position in ``tried`` of the fastest that fits, or None) and ``reason`` (why there is none).

    Raises:
        InputError: The topology or the mesh is invalid, or the compiler failed.
        ConfigError: The mesh does not divide rows, cells or vocabulary.
    """
    place = parse_topology(topology)
    require_compiler(place)
    if mesh is not None:
        chosen = [
            _guess(
                with_mesh(config, parse_mesh(mesh, place.devices), rows),
                place,
                nonzeros_per_cell,
            )
        ]
        spare: list[Candidate] = []
    else:
        possible = candidates(config, place, nonzeros_per_cell, rows=rows)
        if not possible:
            raise ConfigError(
                f"no mesh of {place.devices} devices splits {rows or config.data.rows} rows of {config.data.cells} "
                f"cells evenly",
                "rows or cells with enough factors in common with the number of devices",
                "Change --rows, or data.cells",
            )
        chosen = possible[:tries]
        # The smallest of the rest is compiled only if nothing fits, to answer whether anything can.
        spare = sorted(possible[tries:], key=lambda entry: entry.memory)[:1]
    tried: list[dict[str, Any]] = []
    for number, candidate in enumerate([*chosen, *spare], start=1):
        if number > len(chosen) and any(entry["fits"] for entry in tried):
            break
        run = candidate.config
        name = mesh_text(run.mesh)
        if say is not None:
            say(f"{number}/{len(chosen)} {name}, {run.data.rows} rows: compiling for {place.name}")
        pieces = run.mesh.cells
        nonzeros = math.ceil(run.data.cells / pieces * nonzeros_per_cell)
        result = compile_with(run, place, nonzeros, timeout=timeout)
        entry = {
            "mesh": {axis: getattr(run.mesh, axis) for axis in AXES},
            "rows": run.data.rows,
            "rows_of_configuration": config.data.rows,
            "nonzeros": nonzeros,
            **result,
        }
        if entry["fits"]:
            cells = run.accumulate * run.data.rows * run.data.cells
            entry["cells_per_step"] = cells
            entry["cells_per_second"] = {
                "floor": cells / entry["seconds"]["floor"],
                "serial": cells / entry["seconds"]["serial"],
            }
        tried.append(entry)
        if say is not None:
            say(f"{number}/{len(chosen)} {name}: {_verdict(entry)}")
    best = max(
        (n for n, entry in enumerate(tried) if entry["fits"]),
        key=lambda n: tried[n]["cells_per_second"]["serial"],
        default=None,
    )
    report: dict[str, Any] = {
        "topology": place.name,
        "accelerator": place.accelerator,
        "devices": place.devices,
        "chip": dataclasses.asdict(place.chip),
        "config": to_dict(config),
        "nonzeros_per_cell": nonzeros_per_cell,
        "tried": tried,
        "best": best,
        "reason": None,
    }
    if best is None:
        nearest = min(tried, key=lambda entry: entry["shortage"])
        report["reason"] = (
            f"{'it does not fit' if len(tried) == 1 else f'none of {len(tried)} meshes fits'}: "
            f"{mesh_text(nearest['mesh'])} needs {in_gibibytes(nearest['memory']['total'])} a device of "
            f"{in_gibibytes(nearest['memory']['available'])}, {in_gibibytes(nearest['shortage'])} too much"
        )
    return report


def mesh_text(mesh: MeshConfig | Mapping[str, int]) -> str:
    """Return a mesh in the format of ``--mesh``."""
    sizes = mesh if isinstance(mesh, Mapping) else {axis: getattr(mesh, axis) for axis in AXES}
    return ",".join(f"{axis}={sizes[axis]}" for axis in AXES if axis == "data" or sizes[axis] > 1)


def _verdict(entry: Mapping[str, Any]) -> str:
    if not entry["fits"]:
        return f"does not fit, {in_gibibytes(entry['shortage'])} too much ({entry['compile_seconds']:.0f} s)"
    rate = f"{entry['cells_per_second']['serial']:,.0f} cells/s"
    if entry.get("source") == "lowered":
        rate = f"at most {entry['cells_per_second']['floor']:,.0f} cells/s"
    return (
        f"fits, {in_gibibytes(entry['memory']['total'])} a device, {rate} "
        f"({entry['compile_seconds']:.0f} s)"
    )


def _amount(value: float, unit: str = "") -> str:
    """Return a number with three digits and a prefix, such as ``2.35 GB``."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f} ms"


def plan_text(report: Mapping[str, Any]) -> str:
    """Return a report of :func:`plan` as text for a terminal."""
    chip = report["chip"]
    lines = [
        f"{report['topology']} ({report['accelerator']}): {report['devices']} devices, each "
        f"{chip['flops'] / 1e12:.0f} TFLOP/s (bf16), {in_gibibytes(chip['memory'])} usable HBM at "
        f"{chip['memory_bandwidth'] / 1e9:,.0f} GB/s, links {chip['link_bandwidth'] / 1e9:.0f} GB/s one way",
        f"Estimates of a compiler and of arithmetic; nothing was run on a {_hardware(chip)}.",
    ]
    if any(entry.get("source") == "lowered" for entry in report["tried"]):
        lines.append(
            "Not compiled, because JAX's CUDA plugin is not installed (pip install 'cellplm-jax[cuda13]'): from the "
            "lowered program, whose temporaries, fusions and communication are not known."
        )
    for number, entry in enumerate(report["tried"]):
        mark = " <- best" if number == report["best"] else ""
        lines += ["", f"mesh {mesh_text(entry['mesh'])}{mark}", *_entry_lines(entry)]
    if report["best"] is None:
        lines += ["", report["reason"]]
    return "\n".join(lines)


def _hardware(chip: Mapping[str, Any]) -> str:
    return "GPU" if chip.get("platform") == "cuda" else "TPU"


def _entry_lines(entry: Mapping[str, Any]) -> list[str]:
    rows = f"{entry['rows']} ({entry['rows'] // entry['mesh']['data']} along each of data)"
    if entry["rows"] != entry["rows_of_configuration"]:
        rows += f"; the configuration has {entry['rows_of_configuration']}: set data.rows"
    memory = entry["memory"]
    lines = [
        f"  rows a batch      {rows}",
        f"  parameters        {entry['parameters'] / 1e6:,.1f} M",
    ]
    if not entry["fits"] and "device" not in entry:
        return [
            *lines,
            f"  does not fit      {in_gibibytes(memory['total'])} of {in_gibibytes(memory['available'])}: "
            f"{in_gibibytes(entry['shortage'])} too much",
            _compilation(entry),
        ]
    device = entry["device"]
    seconds = entry["seconds"]
    parts = ("arguments", "outputs", "aliased", "temporaries", "code")
    sizes = ", ".join(f"{part} {_amount(memory[part], 'B')}" for part in parts)
    lines += [
        f"  memory a device   {in_gibibytes(memory['total'])} of {in_gibibytes(memory['available'])} "
        f"({100 * memory['total'] / memory['available']:.0f} %): {sizes}",
    ]
    if not entry["fits"]:
        lines.append(f"  does not fit      {in_gibibytes(entry['shortage'])} too much")
    stated = entry["compiler"]["flops"]
    sparse = device["sparse_elements"]
    lines += [
        f"  FLOPs a device    {_amount(device['flops'])} in products, loops counted as often as they run"
        + (f"; {_amount(stated)} in all by the compiler, loops once" if stated else ""),
        f"  FLOPs a step      {_amount(entry['step_product_flops'])} in products, all devices",
        f"  HBM traffic       {_amount(device['memory_bytes'], 'B')} a device",
        f"  single elements   {_amount(device['elements'])} gathered or scattered, "
        f"{_amount(device['sorted_elements'])} sorted a device"
        + (f"; {_amount(sparse)} more by SparseCores" if sparse else ""),
    ]
    for part in device["collectives"]:
        lines.append(
            f"  {part['kind']:<17} {part['count']:,} among {part['group']}: {_amount(part['payload'], 'B')}, "
            f"{_amount(part['sent'], 'B')} sent a device"
        )
    if device["unknown_loop_collectives"]:
        lines.append(
            f"  in loops whose rounds depend on the data: {device['unknown_loop_collectives']} of these, counted once"
        )
    lines.append("  time a step, if each resource were alone:")
    for name, meaning in RESOURCES.items():
        binds = "  <- binds" if name == entry["binds"] else ""
        lines.append(f"    {_milliseconds(seconds[name]):>14}  {meaning}{binds}")
    lines.append(
        f"    {_milliseconds(seconds['schedule']):>14}  the compiler's schedule, without elements, sorts, communication"
    )
    rate = entry.get("cells_per_second")
    if rate and entry.get("source") == "lowered":
        lines.append(
            f"  step              {_milliseconds(seconds['floor'])} at least: at most {rate['floor']:,.0f} cells/s"
        )
    elif rate:
        lines.append(
            f"  step              {_milliseconds(seconds['floor'])} (everything overlaps) to "
            f"{_milliseconds(seconds['serial'])} (nothing does): {rate['serial']:,.0f} to {rate['floor']:,.0f} cells/s"
        )
    return [*lines, _compilation(entry)]


def _compilation(entry: Mapping[str, Any]) -> str:
    return (
        f"  compiled in       {entry['compile_seconds']:.0f} s "
        f"({entry['compile_processor_seconds']:.0f} s of processor time), traced in {entry['trace_seconds']:.0f} s"
    )
