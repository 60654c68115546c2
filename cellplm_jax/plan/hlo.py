"""Cost of a compiled program per device: computation, memory traffic and communication, read from its HLO text.

The compiler's own cost analysis counts the body of a loop once, and a scatter as if it touched its complete operand.
The HLO text is more precise: it has every instruction with its shapes and memory spaces, the computation of each loop,
and its trip count. This module parses the text and does not use JAX.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from cellplm_jax.errors import InputError

BITS = {"pred": 8, "bf16": 16, "tuple": 0, "token": 0, "opaque": 0}
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Instructions without memory traffic: they name values, or refer to computations that are counted elsewhere.
FREE = frozenset(
    (
        *(
            "parameter",
            "constant",
            "get-tuple-element",
            "tuple",
            "bitcast",
            "domain",
            "opt-barrier",
        ),
        *(
            "while",
            "conditional",
            "call",
            "after-all",
            "add-dependency",
            "partition-id",
            "replica-id",
        ),
        *("copy-done", "slice-done", "async-start", "async-update", "async-done"),
        *("all-reduce-done", "all-gather-done", "collective-permute-done"),
        *("send", "send-done", "recv", "recv-done"),
    )
)
# A gather or scatter of at least this many values at a time moves rows, like a copy; below, single elements.
ROW = 64

_SHAPE = re.compile(r"(\w+)\[([\d,<= ]*)\](\{[^{}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')


@dataclass(frozen=True)
class Shape:
    """One array.

    Attributes:
        kind: Element type, such as ``bf16``.
        extents: Its dimensions.
        space: Memory space: 0 is the device's main memory, others are on the chip or on the host.
    """

    kind: str
    extents: tuple[int, ...]
    space: int = 0

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.extents)

    @property
    def size(self) -> int:
        """Bytes, without the padding of the layout."""
        bits = BITS.get(self.kind)
        if bits is None:
            digits = re.search(r"\d+", self.kind)
            bits = int(digits.group()) if digits else 0
        return -(-self.elements * bits // 8)


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Parse the arrays of a shape: one, or those of a tuple in order."""
    shapes = []
    for kind, extents, layout in _SHAPE.findall(text):
        space = _SPACE.search(layout or "")
        numbers = tuple(int(n.strip().lstrip("<=")) for n in extents.split(",") if n.strip())
        shapes.append(Shape(kind, numbers, int(space.group(1)) if space else 0))
    return tuple(shapes)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: Name of its value.
        opcode: Operation.
        shapes: Output arrays.
        operands: Names of its inputs.
        attributes: The rest of the line.
        literal: Text between its parentheses (the value of a constant, the number of a parameter).
        root: Whether it is the result of its computation.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    literal: str
    root: bool

    def called(self, attribute: str) -> str | None:
        """Return the name of the computation in an attribute."""
        match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return match.group(1) if match else None

    def numbers(self, attribute: str) -> tuple[int, ...]:
        """Return the numbers in braces of an attribute, such as ``dimensions={0,2}``."""
        match = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.attributes)
        return tuple(int(n) for n in match.group(1).split(",") if n) if match else ()


@dataclass
class Program:
    """A compiled program.

    Attributes:
        computations: Instructions of each computation, by its name.
        entry: Name of the entry computation.
        devices: Number of devices.
    """

    computations: dict[str, dict[str, Instruction]] = field(default_factory=dict)
    entry: str = ""
    devices: int = 1


def _closing(text: str, start: int) -> int:
    """Return the index of the parenthesis that closes the one at ``start``."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    return len(text)


def _instruction(line: str) -> Instruction | None:
    match = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if match is None:
        return None
    start = match.end()
    end = _closing(line, start) + 1 if line[start] == "(" else line.find(" ", start)
    shape = line[start:end]
    opcode = re.match(r"\s*([a-z][\w\-]*)\(", line[end:])
    if opcode is None:
        return None
    opening = end + opcode.end() - 1
    closing = _closing(line, opening)
    inside = line[opening + 1 : closing]
    return Instruction(
        name=match.group(2),
        opcode=opcode.group(1),
        shapes=parse_shapes(shape),
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
        attributes=line[closing + 1 :],
        literal=inside,
        root=match.group(1) is not None,
    )


def parse(text: str) -> Program:
    """Parse the text of a compiled program (``compiled.as_text()``).

    Raises:
        InputError: It has no entry computation.
    """
    program = Program()
    current: dict[str, Instruction] | None = None
    for line in text.splitlines():
        if line.startswith("HloModule"):
            count = re.search(r"num_partitions=(\d+)", line)
            program.devices = int(count.group(1)) if count else 1
        elif line.startswith("}"):
            current = None
        elif line.endswith("{") and not line.startswith(" "):
            match = re.match(r"(ENTRY )?%?([\w.\-]+)", line)
            if match:
                current = program.computations.setdefault(match.group(2), {})
                program.entry = match.group(2) if match.group(1) else program.entry
        elif current is not None:
            instruction = _instruction(line)
            if instruction is not None:
                current[instruction.name] = instruction
    if not program.entry:
        raise InputError(
            "the text of a compiled program has no entry computation",
            "the output of compiled.as_text()",
            "Report this: the compiler may have changed its format",
        )
    return program


@dataclass(frozen=True)
class Collective:
    """Communication of one kind among groups of one size, in one run of the program, per device.

    Attributes:
        kind: One of :data:`COLLECTIVES`.
        group: Number of devices per group.
        count: Number of collectives.
        payload: Bytes of their outputs.
        sent: Bytes sent per device in the best case, a ring: ``2 (n - 1) / n`` of the payload of an all-reduce,
            ``(n - 1) / n`` of that of an all-gather or all-to-all, ``n - 1`` times that of a reduce-scatter, all of a
            permutation's.
    """

    kind: str
    group: int
    count: int
    payload: int
    sent: float


@dataclass
class Cost:
    """Cost per device of one run of a program, with loops counted by their trip counts.

    Attributes:
        flops: Operations of matrix products and convolutions (a multiplication and an addition each).
        passes_flops: The same, multiplied by the number of passes of the matrix units for the requested precision
            (3 for "high", 6 for "highest").
        memory_bytes: Bytes that instructions read from and write to main memory.
        elements: Single elements gathered or scattered by the main core.
        sparse_elements: Single elements gathered or scattered by SparseCores, which some generations also have.
        sorted_elements: Elements of sorted arrays.
        cycles: The compiler's estimate of its schedule; without scatters, gathers, sorts and communication, for which
            it gives none, and without work on SparseCores.
        collectives: Communication.
        unknown_loops: Loops with a data-dependent trip count; they are counted once.
        unknown_loop_collectives: Collectives inside such loops.
    """

    flops: float = 0.0
    passes_flops: float = 0.0
    memory_bytes: float = 0.0
    elements: float = 0.0
    sparse_elements: float = 0.0
    sorted_elements: float = 0.0
    cycles: float = 0.0
    collectives: list[Collective] = field(default_factory=list)
    unknown_loops: int = 0
    unknown_loop_collectives: int = 0


def group_size(attributes: str, devices: int) -> int:
    """Return the number of devices per group of a collective.

    Args:
        attributes: The instruction's attributes; ``replica_groups`` may be a list, an iota (``[32,8]<=[256]``), or axes
            of a mesh (``mesh['a'=32,'b'=8] {'b'}``).
        devices: Devices of the program, the default group.
    """
    match = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes)
    if match:
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match.group(1))}
        # Part of an axis may be used, as in 'a':(2)4, a stride and a size.
        total = 1
        for name, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match.group(2)):
            total *= int(part) if part else axes[name]
        return total
    match = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes)
    if match:
        return int(match.group(2))
    match = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if match:
        return len(match.group(1).split(","))
    if "source_target_pairs" in attributes:
        return 2
    return devices


def _sent(kind: str, group: int, payload: float) -> float:
    if group <= 1:
        return 0.0
    # Ring algorithms: a reduce-scatter and an all-gather, each of which sends all but a device's own share.
    if kind == "all-reduce":
        return 2 * (group - 1) / group * payload
    if kind == "reduce-scatter":
        # The payload is the output, a share of what each device has.
        return (group - 1) * payload
    if kind in ("collective-permute", "collective-broadcast"):
        return payload
    return (group - 1) / group * payload


def trip_count(program: Program, loop: Instruction) -> int | None:
    """Return the trip count of a loop; None if it depends on the data.

    Counting loops compare a counter, which starts at 0 and increases by 1, with a constant.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known.group(1))
    condition = program.computations.get(loop.called("condition") or "", {})
    root = next((entry for entry in condition.values() if entry.root), None)
    if root is None:
        return None
    compare, inner = root, condition
    if root.opcode == "fusion":
        # On a CPU the comparison is wrapped; its parameters are the operands, in order.
        inner = program.computations.get(root.called("calls") or "", {})
        compare = next((entry for entry in inner.values() if entry.root), root)
    if compare.opcode != "compare" or len(compare.operands) != 2:
        return None

    def source(name: str) -> Instruction | None:
        entry = inner.get(name)
        while entry is not None and entry.opcode in ("copy", "bitcast", "convert"):
            entry = inner.get(entry.operands[0])
        if entry is not None and entry.opcode == "parameter" and inner is not condition:
            entry = condition.get(root.operands[int(entry.literal)])
        return entry

    counter, limit = (source(name) for name in compare.operands)
    if counter is None or limit is None or counter.opcode != "get-tuple-element":
        return None
    if limit.opcode != "constant" or not limit.literal.lstrip("-").isdigit():
        return None
    if "direction=LT" in compare.attributes:
        return max(0, int(limit.literal))
    if "direction=LE" in compare.attributes:
        # `<=` includes the limit.
        return max(0, int(limit.literal) + 1)
    return None


def _window(instruction: Instruction, spatial: int) -> dict[str, list[int]]:
    match = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    values = dict(re.findall(r"(\w+)=(\S+)", match.group(1))) if match else {}

    def numbers(name: str, default: int) -> list[int]:
        return [int(n) for n in values[name].split("x")] if name in values else [default] * spatial

    low = [0] * spatial
    if "pad" in values:
        low = [int(part.split("_")[0]) for part in values["pad"].split("x")]
    return {
        "size": numbers("size", 1),
        "stride": numbers("stride", 1),
        "low": low,
        "base": numbers("lhs_dilate", 1),
        "dilation": numbers("rhs_dilate", 1),
    }


def product_flops(instruction: Instruction, operands: tuple[Shape, Shape]) -> float:
    """Return the operations of a ``dot`` or ``convolution``.

    A convolution counts the pairs of output and input positions inside the window, as the compiler does:
    batched products are compiled to convolutions over a diluted batch axis, most of whose positions have no input.

    Args:
        instruction: The product.
        operands: Shapes of its two inputs.
    """
    left, right = operands
    out = instruction.shapes[0]
    if instruction.opcode == "dot":
        contracted = math.prod(left.extents[n] for n in instruction.numbers("lhs_contracting_dims"))
        return 2.0 * out.elements * contracted
    match = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if match is None:
        return 0.0
    inputs, kernel, outputs = match.groups()
    spatial = sum(label.isdigit() for label in outputs)
    window = _window(instruction, spatial)
    pairs = 1.0
    for dimension in range(spatial):
        label = str(dimension)
        output = np.arange(out.extents[outputs.index(label)])
        # Pairs of output and kernel position whose input exists: not padding, and not between dilated entries.
        offset = np.arange(window["size"][dimension]) * window["dilation"][dimension]
        extent = left.extents[inputs.index(label)]
        place = output[:, None] * window["stride"][dimension] + offset - window["low"][dimension]
        valid = (place >= 0) & (place % window["base"][dimension] == 0)
        valid &= place // window["base"][dimension] < extent
        pairs *= float(valid.sum())

    def attribute(name: str) -> int:
        found = re.search(rf"\b{name}=(\d+)", instruction.attributes)
        return int(found.group(1)) if found else 1

    # The kernel only has the input features of one group.
    features_in = right.extents[kernel.index("i")]
    features_out = out.extents[outputs.index("f")]
    batch = out.extents[outputs.index("b")] / attribute("batch_group_count")
    return 2.0 * pairs * features_in * features_out * batch


def _passes(instruction: Instruction) -> int:
    """Return the number of passes of the matrix units over a product for its precision."""
    match = re.search(r"operand_precision=\{(\w+)", instruction.attributes)
    return {"high": 3, "highest": 6}.get(match.group(1) if match else "", 1)


@dataclass(frozen=True)
class _Place:
    """Context in which a computation runs.

    Attributes:
        times: Number of executions.
        fused: Inside a fusion, without memory traffic.
        unknown: In a loop with a data-dependent trip count.
        sparse: On a SparseCore.
    """

    times: int = 1
    fused: bool = False
    unknown: bool = False
    sparse: bool = False


class _Reader:
    """Accumulates the cost of a program."""

    def __init__(self, program: Program):
        self.program = program
        self.cost = Cost()
        self.collectives: dict[tuple[str, int], list[float]] = {}

    def shapes(self, computation: dict[str, Instruction], name: str) -> tuple[Shape, ...]:
        entry = computation.get(name)
        return entry.shapes if entry is not None else ()

    def visit(self, name: str, place: _Place) -> None:
        """Add a computation that runs in the given context."""
        computation = self.program.computations.get(name, {})
        for entry in computation.values():
            self.arithmetic(computation, entry, place)
            self.communication(entry, place)
            if not place.fused:
                self.cost.memory_bytes += place.times * self.traffic(computation, entry)
                # SparseCores run next to the matrix units, so their cycles do not add up.
                cycles = None if place.sparse else _CYCLES.search(entry.attributes)
                self.cost.cycles += place.times * int(cycles.group(1)) if cycles else 0
            for called, inner in self.within(entry, place):
                self.visit(called, inner)

    def within(self, entry: Instruction, place: _Place) -> Iterator[tuple[str, _Place]]:
        """Yield the computations that an instruction runs, with their contexts."""
        if entry.opcode == "while":
            rounds = trip_count(self.program, entry)
            # Counted once, and reported: the cost is then a lower bound.
            self.cost.unknown_loops += rounds is None
            inner = replace(
                place,
                times=place.times * (1 if rounds is None else rounds),
                unknown=place.unknown or rounds is None,
            )
            for part in ("body", "condition"):
                yield entry.called(part) or "", inner
        elif entry.opcode == "fusion":
            yield entry.called("calls") or "", replace(place, fused=True)
        elif entry.opcode == "async-start":
            sparse = place.sparse or 'async_execution_thread="sparsecore"' in entry.attributes
            yield entry.called("calls") or "", replace(place, sparse=sparse)
        elif entry.opcode == "call":
            yield entry.called("to_apply") or "", place
        elif entry.opcode in ("conditional", "custom-call"):
            for branch in self.branches(entry):
                yield branch, place

    @staticmethod
    def branches(entry: Instruction) -> Iterator[str]:
        listed = re.search(r"(?:branch|called)_computations=\{([^}]*)\}", entry.attributes)
        if listed:
            yield from re.findall(r"%?([\w.\-]+)", listed.group(1))
        for part in ("true_computation", "false_computation"):
            called = entry.called(part)
            if called:
                yield called

    def arithmetic(
        self,
        computation: dict[str, Instruction],
        entry: Instruction,
        place: _Place,
    ) -> None:
        times = place.times
        if entry.opcode in ("dot", "convolution") and len(entry.operands) >= 2:
            operands = [self.shapes(computation, name) for name in entry.operands[:2]]
            if all(operands):
                flops = product_flops(entry, (operands[0][0], operands[1][0]))
                self.cost.flops += times * flops
                self.cost.passes_flops += times * flops * _passes(entry)
        elif entry.opcode == "sort":
            self.cost.sorted_elements += times * max(shape.elements for shape in entry.shapes)
        elif entry.opcode in ("gather", "scatter"):
            count, width = self.accesses(computation, entry)
            if width < ROW and place.sparse:
                self.cost.sparse_elements += times * count
            elif width < ROW:
                self.cost.elements += times * count

    def accesses(
        self,
        computation: dict[str, Instruction],
        entry: Instruction,
    ) -> tuple[float, float]:
        """Return the number of positions that a gather or scatter accesses, and the number of elements at each."""
        if entry.opcode == "gather":
            match = re.search(r"slice_sizes=\{([\d,]*)\}", entry.attributes)
            width = math.prod(int(n) for n in match.group(1).split(",") if n) if match else 1
            return entry.shapes[0].elements / max(width, 1), width
        # A scatter of n arrays has 2 n + 1 operands: arrays, indices, updates.
        arrays = len(entry.operands) // 2
        updates = self.shapes(computation, entry.operands[-1])
        if not updates:
            return 0.0, 1
        window = entry.numbers("update_window_dims")
        width = math.prod(updates[0].extents[n] for n in window)
        return arrays * updates[0].elements / max(width, 1), width

    def communication(self, entry: Instruction, place: _Place) -> None:
        times = place.times
        kind = entry.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            return
        group = group_size(entry.attributes, self.program.devices)
        shapes = entry.shapes
        if entry.opcode.endswith("-start") and kind != "all-reduce" and len(shapes) >= 2:
            # (operands, results, ...): use the results.
            shapes = shapes[len(entry.operands) : 2 * len(entry.operands)]
        payload = sum(shape.size for shape in shapes)
        total = self.collectives.setdefault((kind, group), [0, 0, 0.0])
        total[0] += times
        total[1] += times * payload
        total[2] += times * _sent(kind, group, payload)
        self.cost.unknown_loop_collectives += place.unknown

    def traffic(self, computation: dict[str, Instruction], entry: Instruction) -> float:
        """Return the bytes that an instruction outside fusions reads from and writes to main memory."""
        if entry.opcode in FREE or "called_computations=" in entry.attributes:
            return 0.0
        made = [shape for shape in entry.shapes]
        if entry.opcode == "copy-start":
            return _main(made[:2])
        if entry.opcode == "slice-start":
            source, result = made[0], made[1]
            # Only the slice moves, whatever the size of its source.
            return result.size * ((source.space == 0) + (result.space == 0))
        if entry.opcode.endswith("-start"):
            return _main(made)
        read = [self.shapes(computation, name) for name in entry.operands]
        if entry.opcode in ("dynamic-slice", "slice", "gather"):
            source = read[0][0] if read and read[0] else None
            inside = _main(made)
            return inside + (entry.shapes[0].size if source and source.space == 0 else 0)
        if entry.opcode == "dynamic-update-slice":
            update = read[1] if len(read) > 1 else ()
            return 2 * _main(update)
        if entry.opcode == "fusion":
            return self.fusion_traffic(entry, read)
        return _main(made) + sum(map(_main, read))

    def fusion_traffic(self, entry: Instruction, read: list[tuple[Shape, ...]]) -> float:
        """Return the traffic of a fusion; of an operand that it only slices or gathers from, the accessed part."""
        body = self.program.computations.get(entry.called("calls") or "", {})
        total = 0.0
        for inner in body.values():
            if inner.opcode != "parameter" or not inner.literal.isdigit():
                continue
            number = int(inner.literal)
            if number >= len(read) or not any(shape.space == 0 for shape in read[number]):
                continue
            whole = _main(read[number])
            part = self.taken(body, inner.name)
            # A value that several instructions read stays on the chip after the first read.
            total += whole if part is None else min(whole, part)
        root = next((inner for inner in body.values() if inner.root), None)
        if root is None:
            return total + _main(entry.shapes)
        results = (
            [body[name] for name in root.operands if name in body]
            if root.opcode == "tuple"
            else [root]
        )
        for shape, result in zip(entry.shapes, results, strict=False):
            if shape.space != 0:
                continue
            while result.opcode == "bitcast" and result.operands[0] in body:
                result = body[result.operands[0]]
            place = {"dynamic-update-slice": 1, "scatter": -1}.get(result.opcode)
            update = body.get(result.operands[place]) if place is not None else None
            if update is not None and update.shapes:
                # In place: the written part, which is also read if it is added to.
                total += 2 * update.shapes[0].size
            else:
                total += shape.size
        return total

    def taken(self, body: dict[str, Instruction], name: str) -> float | None:
        """Return the bytes of a value that the instructions of a fusion access; None: all of it."""
        total = 0.0
        for user in body.values():
            if name not in user.operands:
                continue
            first = user.operands[0] == name
            part: float | None = None
            if user.opcode in ("dynamic-slice", "slice"):
                part = user.shapes[0].size if first else 0.0
            elif user.opcode == "gather" and first:
                part = user.shapes[0].size
            elif user.opcode in ("dynamic-update-slice", "scatter") and first:
                # Updated in place: the write is counted at the root of the fusion.
                part = 0.0
            elif user.opcode in ("bitcast", "reshape"):
                part = self.taken(body, user.name)
            elif user.opcode == "fusion":
                part = self.taken_inside(user, name)
            if part is None:
                return None
            total += part
        return total

    def taken_inside(self, fusion: Instruction, name: str) -> float | None:
        """Return the bytes that a nested fusion accesses of one of its operands; None: all of it."""
        body = self.program.computations.get(fusion.called("calls") or "", {})
        total = 0.0
        for inner in body.values():
            if inner.opcode == "parameter" and inner.literal.isdigit():
                number = int(inner.literal)
                if number < len(fusion.operands) and fusion.operands[number] == name:
                    part = self.taken(body, inner.name)
                    if part is None:
                        return None
                    total += part
        return total


def _main(shapes: Iterable[Shape]) -> float:
    """Return the bytes of those arrays in main memory."""
    return float(sum(shape.size for shape in shapes if shape.space == 0))


def cost(text: str) -> Cost:
    """Compute the cost per device of one run of a compiled program.

    Args:
        text: ``compiled.as_text()``.
    """
    program = parse(text)
    reader = _Reader(program)
    reader.visit(program.entry, _Place())
    reader.cost.collectives = [
        Collective(kind, group, int(count), int(payload), sent)
        for (kind, group), (count, payload, sent) in sorted(reader.collectives.items())
    ]
    return reader.cost
