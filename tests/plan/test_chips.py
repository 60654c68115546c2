"""Names and shapes of TPU slices."""

from __future__ import annotations

import pytest

from cellplm_jax.errors import InputError
from cellplm_jax.plan.chips import CHIPS, known_topologies, parse_topology


@pytest.mark.parametrize(
    ("name", "canonical", "devices"),
    [
        ("v5e:16x16", "v5e:16x16", 256),
        ("v5e-256", "v5e:16x16", 256),
        ("v5litepod-16", "v5e:4x4", 16),
        ("V6E-256", "v6e:16x16", 256),
        ("v5p:8x8x4", "v5p:8x8x4", 256),
        ("v5p:2x2", "v5p:2x2x1", 4),
        # v4 and v5p count cores: two a chip.
        ("v5p-256", "v5p:4x4x8", 128),
        ("v4-8", "v4:2x2x1", 4),
    ],
)
def test_names_are_understood(name, canonical, devices):
    topology = parse_topology(name)
    assert (topology.name, topology.devices) == (canonical, devices)


def test_the_rented_name_leads_back():
    for name in known_topologies():
        topology = parse_topology(name)
        assert parse_topology(topology.accelerator) == topology


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(InputError, match=r"topology 'v9z:4x4' is not known.*v5e:1x1"):
        parse_topology("v9z:4x4")
    with pytest.raises(InputError, match=r"Did you mean 'v5e:16x16'\?$"):
        parse_topology("v5e:16x16x")


@pytest.mark.parametrize("name", ["v5e:3x3", "v5e:2x2x2", "v5p:4", "v5e:0x2"])
def test_impossible_shapes_are_refused(name):
    with pytest.raises(InputError, match="impossible shape"):
        parse_topology(name)


def test_an_unknown_size_lists_the_sizes():
    with pytest.raises(InputError, match=r"v5p-8, v5p-16.*two a chip"):
        parse_topology("v5p-250")


def test_bandwidth_of_a_group_depends_on_its_links():
    torus, corner = parse_topology("v5e:16x16"), parse_topology("v5e:4x4")
    links = CHIPS["v5e"].link_bandwidth
    assert torus.ring_bandwidth(256) == links
    assert torus.ring_bandwidth(16) == links / 2
    # Four chips in a line do not close to a ring.
    assert corner.ring_bandwidth(16) == links / 2
    cube = parse_topology("v5p:4x4x8")
    assert cube.ring_bandwidth(128) == CHIPS["v5p"].link_bandwidth
    assert parse_topology("v5e:1x1").ring_bandwidth(1) > 0


def test_the_table_is_consistent():
    for name, chip in CHIPS.items():
        assert chip.name == name
        assert 0.9e9 < chip.clock < 2.5e9
        # Operations a byte of HBM: every generation is between 150 and 600.
        assert 150 < chip.flops / chip.memory_bandwidth < 600
