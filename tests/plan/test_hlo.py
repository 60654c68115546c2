"""Reading compiled programs: recorded texts of a TPU's compiler, and what this machine's CPU compiler writes."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from cellplm_jax.errors import InputError
from cellplm_jax.plan import hlo

RECORDED = Path(__file__).parent / "recorded"


def recorded(name: str) -> hlo.Cost:
    return hlo.cost((RECORDED / f"{name}.txt").read_text())


def test_shapes_with_layouts_and_memories():
    one, two, scalar = hlo.parse_shapes(
        "(bf16[1433,1024]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/u16[3]{0}, pred[]{:T(512)})"
    )
    assert (one.kind, one.extents, one.space, one.size) == (
        "bf16",
        (1433, 1024),
        1,
        2 * 1433 * 1024,
    )
    assert (two.size, two.space, scalar.size) == (6, 0, 1)
    assert hlo.parse_shapes("s4[10]")[0].size == 5
    assert hlo.parse_shapes("token[]")[0].size == 0


def test_a_loop_counts_as_often_as_it_runs():
    cost = recorded("loop")
    assert cost.flops == 5 * 2 * 64 * 256 * 256
    assert cost.unknown_loops == 0
    [sum_of_rows] = cost.collectives
    assert (sum_of_rows.kind, sum_of_rows.group, sum_of_rows.count) == ("all-reduce", 4, 1)
    assert sum_of_rows.payload == 256 * 4
    assert sum_of_rows.sent == 2 * 3 / 4 * 256 * 4
    # The compiler's own estimates of the loop's body, five times, and of the rest.
    assert cost.cycles > 5000
    # At least the weights, once.
    assert cost.memory_bytes >= 5 * 256 * 256 * 4


def test_a_batched_product_counts_places_that_hold_something():
    # Compiled to a convolution over a diluted axis of 8 heads: 15 window positions, of which one holds an input.
    assert recorded("heads").flops == 8 * 2 * 128 * 128 * 32


def test_a_gather_among_devices():
    [part] = recorded("gather").collectives
    assert (part.kind, part.group) == ("all-gather", 2)
    assert part.payload == 512 * 128 * 4
    assert part.sent == part.payload / 2


def test_single_elements_are_counted():
    cost = recorded("elements")
    assert cost.elements == 6000
    assert cost.flops == 0
    assert cost.collectives == []


def test_a_loop_that_depends_on_the_data_counts_once_and_is_reported():
    cost = recorded("unknown")
    assert cost.unknown_loops == 1
    assert cost.unknown_loop_collectives == 1
    assert cost.collectives[0].count == 1


@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        ("replica_groups={{0,2},{1,3}}, dimensions={0}", 2),
        ("replica_groups=[32,8]<=[256]", 8),
        ("replica_groups=[8,32]<=[32,8]T(1,0)", 32),
        ("replica_groups=mesh['axis_0'=32,'axis_1'=8] {'axis_1'}", 8),
        ("replica_groups=mesh['axis_0'=32,'axis_1'=8] {'axis_0','axis_1'}", 256),
        ("replica_groups=mesh['axis_0'=32] {'axis_0':(2)4}", 4),
        ("replica_groups={}", 256),
        ("source_target_pairs={{0,1},{1,0}}", 2),
    ],
)
def test_forms_of_replica_groups(attributes, size):
    assert hlo.group_size(attributes, 256) == size


EVERY_KIND = """HloModule every, num_partitions=8

ENTRY %main (x: f32[16]) -> f32[16] {
  %x = f32[16]{0} parameter(0)
  %reduce = f32[16]{0} all-reduce(%x), replica_groups=[1,8]<=[8], to_apply=%add
  %scatter = f32[2]{0} reduce-scatter(%x), replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
  %start = (f32[16]{0}, f32[128]{0}) all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={0}
  %done = f32[128]{0} all-gather-done(%start)
  %exchange = f32[16]{0} all-to-all(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %shift = (f32[16]{0}, f32[16]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}
  %shifted = f32[16]{0} collective-permute-done(%shift)
  ROOT %copy = f32[16]{0} copy(%shifted)
}
"""


def test_every_kind_of_communication():
    parts = {part.kind: part for part in hlo.cost(EVERY_KIND).collectives}
    assert {kind: (part.group, part.payload, part.sent) for kind, part in parts.items()} == {
        "all-reduce": (8, 64, 2 * 7 / 8 * 64),
        "reduce-scatter": (8, 8, 7 * 8),
        "all-gather": (8, 512, 7 / 8 * 512),
        "all-to-all": (4, 64, 3 / 4 * 64),
        "collective-permute": (2, 64, 64),
    }


OFFLOADED = """HloModule offloaded

%scattering (p0: f32[900], p1: s32[300], p2: f32[300]) -> f32[900] {
  %p0 = f32[900]{0} parameter(0)
  %p1 = s32[300]{0} parameter(1)
  %p2 = f32[300]{0} parameter(2)
  ROOT %scatter = f32[900]{0} scatter(%p0, %p1, %p2), update_window_dims={}, to_apply=%add
}

%on_sparsecore (q0: f32[900], q1: s32[300], q2: f32[300]) -> f32[900] {
  %q0 = f32[900]{0} parameter(0)
  %q1 = s32[300]{0} parameter(1)
  %q2 = f32[300]{0} parameter(2)
  ROOT %fused = f32[900]{0} fusion(%q0, %q1, %q2), kind=kCustom, calls=%scattering, CYCLES
}

%shell (r0: f32[900], r1: s32[300], r2: f32[300]) -> f32[900] {
  %r0 = f32[900]{0} parameter(0)
  %r1 = s32[300]{0} parameter(1)
  %r2 = f32[300]{0} parameter(2)
  %start = ((f32[900]{0}, s32[300]{0}, f32[300]{0}), f32[900]{0}, u32[]) async-start(%r0, %r1, %r2), THREAD
  ROOT %done = f32[900]{0} async-done(%start)
}

ENTRY %main (x: f32[900], i: s32[300], v: f32[300]) -> f32[900] {
  %x = f32[900]{0} parameter(0)
  %i = s32[300]{0} parameter(1)
  %v = f32[300]{0} parameter(2)
  ROOT %call = f32[900]{0} custom-call(%x, %i, %v), custom_call_target="s", called_computations={%shell}
}
""".replace("THREAD", 'async_execution_thread="sparsecore", calls=%on_sparsecore').replace(
    "CYCLES", 'backend_config={"estimated_cycles":"9223372036854775807"}'
)


def test_elements_that_sparsecores_handle_are_counted_apart():
    cost = hlo.cost(OFFLOADED)
    assert (cost.elements, cost.sparse_elements) == (0, 300)
    assert cost.cycles == 0
    # Indices and updates are read, and what is written is read before; the whole is not touched.
    assert cost.memory_bytes == 4 * (300 + 300 + 2 * 300)


def test_passes_of_precise_products():
    text = """HloModule precise

ENTRY %main (x: f32[8,4]) -> f32[8,8] {
  %x = f32[8,4]{1,0} parameter(0)
  ROOT %dot = f32[8,8]{1,0} dot(%x, %x), CONTRACTED, operand_precision={highest,highest}
}
""".replace("CONTRACTED", "lhs_contracting_dims={1}, rhs_contracting_dims={1}")
    cost = hlo.cost(text)
    assert cost.flops == 2 * 8 * 8 * 4
    assert cost.passes_flops == 6 * cost.flops
    assert cost.memory_bytes == 4 * (2 * 8 * 4 + 8 * 8)


def test_a_fusion_that_slices_reads_only_the_slice():
    text = """HloModule slices

%fused (p0: f32[1000,128], p1: s32[]) -> f32[1,128] {
  %p0 = f32[1000,128]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %slice = f32[1,128]{1,0} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,128}
}

%update (q0: f32[1000,128], q1: f32[1,128], q2: s32[]) -> f32[1000,128] {
  %q0 = f32[1000,128]{1,0} parameter(0)
  %q1 = f32[1,128]{1,0} parameter(1)
  %q2 = s32[] parameter(2)
  ROOT %put = f32[1000,128]{1,0} dynamic-update-slice(%q0, %q1, %q2, %q2)
}

ENTRY %main (x: f32[1000,128], i: s32[]) -> f32[1000,128] {
  %x = f32[1000,128]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %row = f32[1,128]{1,0:T(1,128)S(1)} fusion(%x, %i), kind=kLoop, calls=%fused
  ROOT %new = f32[1000,128]{1,0} fusion(%x, %row, %i), kind=kLoop, calls=%update
}
"""
    # The slice is read from main memory into the chip's own, and the row written back (read before, as in place).
    assert hlo.cost(text).memory_bytes == pytest.approx(512 + 2 * 512, abs=16)


def test_text_without_a_program_is_refused():
    with pytest.raises(InputError, match="no entry computation"):
        hlo.parse("HloModule nothing\n")


def test_the_cpu_compiler_is_read_too():
    """Formats differ: comparisons of loops are wrapped, products stay products."""

    def step(weights, x):
        return jax.lax.scan(lambda h, w: (jnp.sin(h @ w), None), x, weights)[0]

    compiled = jax.jit(step).lower(jnp.ones((7, 16, 16)), jnp.ones((4, 16))).compile()
    cost = hlo.cost(compiled.as_text())
    assert cost.unknown_loops == 0
    assert cost.flops in (7 * 2 * 4 * 16 * 16, 0)  # 0: the product became a call of a library
