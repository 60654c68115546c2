"""From what a step does to how long it takes at the least: a roofline over the resources of a chip.

Nothing here was measured on a TPU or a GPU. The floor assumes that everything overlaps and runs at its peak; the
serial time adds the compiler's own schedule, the communication and the accesses to single elements, as if nothing
overlapped. A real step lies above the floor, and a scatter may make it slower than the serial time, because nobody
has measured how fast a chip scatters: one element a cycle is an assumption, and so is a sector of memory an element
for a GPU. What the compiler hands to SparseCores is in neither time but for the memory it moves.
"""

from __future__ import annotations

from dataclasses import dataclass

from cellplm_jax.plan.chips import Topology
from cellplm_jax.plan.hlo import Cost

RESOURCES = {
    "products": "matrix products at their peak",
    "memory": "HBM traffic",
    "interconnect": "communication between chips",
    "elements": "single elements gathered and scattered, at an assumed rate",
}


@dataclass(frozen=True)
class Estimate:
    """Times of one step, in seconds.

    Attributes:
        products, memory, interconnect, elements: Time each resource alone would need; see :data:`RESOURCES`.
        schedule: The compiler's schedule of everything but scatters, gathers, sorts and communication; 0 where it
            gives none.
    """

    products: float
    memory: float
    interconnect: float
    elements: float
    schedule: float

    @property
    def floor(self) -> float:
        """Time of the slowest resource: no step can be faster."""
        return max(getattr(self, name) for name in RESOURCES)

    @property
    def binds(self) -> str:
        """The slowest resource, a key of :data:`RESOURCES`."""
        return max(RESOURCES, key=lambda name: getattr(self, name))

    @property
    def serial(self) -> float:
        """Time of a step in which nothing overlaps."""
        # Without the compiler's schedule, the slower of both.
        on_chip = self.schedule or max(self.products, self.memory)
        return on_chip + self.interconnect + self.elements


def estimate(cost: Cost, topology: Topology) -> Estimate:
    """Return how long the work of one device takes.

    Args:
        cost: What one device does in a step.
        topology: The slice it is part of.
    """
    chip = topology.chip
    return Estimate(
        products=cost.passes_flops / chip.flops,
        memory=cost.memory_bytes / chip.memory_bandwidth,
        interconnect=sum(
            entry.sent / topology.ring_bandwidth(entry.group) for entry in cost.collectives
        ),
        elements=cost.elements / (chip.elements_a_cycle * chip.clock),
        schedule=cost.cycles / chip.clock,
    )
