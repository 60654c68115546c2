"""Times from work: each resource, which one binds, and how they add up."""

from __future__ import annotations

import pytest

from cellplm_jax.plan.chips import parse_topology
from cellplm_jax.plan.hlo import Collective, Cost
from cellplm_jax.plan.roofline import RESOURCES, estimate

V5E = parse_topology("v5e:16x16")


def test_each_resource_by_itself():
    chip = V5E.chip
    cost = Cost(
        passes_flops=chip.flops * 0.002,
        memory_bytes=chip.memory_bandwidth * 0.005,
        elements=chip.clock * 0.003,
        cycles=chip.clock * 0.007,
        collectives=[
            Collective("all-reduce", 256, 3, 100, chip.link_bandwidth * 0.001),
            Collective("all-to-all", 16, 3, 100, chip.link_bandwidth * 0.001),
        ],
    )
    times = estimate(cost, V5E)
    assert times.products == pytest.approx(0.002)
    assert times.memory == pytest.approx(0.005)
    assert times.elements == pytest.approx(0.003)
    # The smaller group has the links of one dimension only.
    assert times.interconnect == pytest.approx(0.001 + 0.002)
    assert times.binds == "memory"
    assert times.floor == pytest.approx(0.005)
    assert times.serial == pytest.approx(0.007 + 0.003 + 0.003)


@pytest.mark.parametrize(
    ("cost", "binds"),
    [
        (Cost(passes_flops=1e15), "products"),
        (Cost(memory_bytes=1e12), "memory"),
        (Cost(elements=1e10), "elements"),
        (Cost(collectives=[Collective("all-gather", 256, 1, 0, 1e12)]), "interconnect"),
    ],
)
def test_what_binds(cost, binds):
    assert binds in RESOURCES
    assert estimate(cost, V5E).binds == binds


def test_without_a_schedule_the_slower_of_arithmetic_and_memory_counts():
    times = estimate(Cost(passes_flops=V5E.chip.flops, memory_bytes=1.0), V5E)
    assert times.serial == pytest.approx(1.0)
