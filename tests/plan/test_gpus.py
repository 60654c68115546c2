"""Names and figures of GPUs, the description the compiler gets, and a step lowered or compiled for a host of them."""

from __future__ import annotations

import json

import pytest

from cellplm_jax import cli
from cellplm_jax.errors import InputError
from cellplm_jax.plan import gpus
from cellplm_jax.plan.chips import gpu_chip, known_topologies, parse_topology
from cellplm_jax.platforms import has_cuda_plugin
from tests.plan.test_compiler import plain

SMALL = ["--mesh", "data=8", "--genes", "512", "--nonzeros-per-cell", "100", "--batches", "20",
         "--datasets", "5", "--json", "--quiet"]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "canonical", "devices"),
    [("h100:8", "h100:8", 8), ("H200-4", "h200:4", 4), ("b200", "b200:1", 1)],
)
def test_hosts_are_understood(name, canonical, devices):
    topology = parse_topology(name)
    assert (topology.name, topology.devices, topology.chip.platform) == (canonical, devices, "cuda")
    assert canonical in known_topologies()


def test_a_host_has_so_many_gpus_and_no_more():
    with pytest.raises(InputError, match=r"3 GPUs.*h100:1, h100:2, h100:4, h100:8"):
        parse_topology("h100:3")
    with pytest.raises(InputError, match=r"'v100:8' is not known.*h100:8"):
        parse_topology("v100:8")


@pytest.mark.parametrize("name", gpus.GPUS)
def test_figures_of_a_gpu_belong_together(name):
    gpu, chip = gpus.GPUS[name], gpu_chip(name)
    # The clock that the peak of the vendor implies is one that the multiprocessors reach.
    assert 0.8 * gpu.clock < chip.clock <= gpu.clock
    assert chip.memory < gpu.memory
    # Every group of GPUs has all links to the switch.
    host = parse_topology(f"{name}:8")
    assert host.ring_bandwidth(8) == host.ring_bandwidth(2) == gpu.link_bandwidth
    text = gpus.target_config(name)
    assert f"core_count: {gpu.multiprocessors}" in text
    assert f'device_description_str: "{gpu.title}"' in text
    assert text.count("{") == text.count("}")


def test_without_the_plugin_the_lowered_step_gives_a_bound(capsys, monkeypatch):
    if has_cuda_plugin():
        pytest.skip("the CUDA plugin is installed")
    arguments = ["plan", "--config", "configs/pretrain.py:debug", "--topology", "h100:8"]
    assert cli.main([*arguments, *plain(), *SMALL]) == 0
    report = json.loads(capsys.readouterr().out)
    [entry] = report["tried"]
    assert entry["source"] == "lowered"
    assert report["devices"] == 8
    # Parameters and both moments, whole on every device.
    assert entry["memory"]["aliased"] >= 3 * 4 * entry["parameters"]
    assert entry["device"]["flops"] == entry["step_product_flops"] / 8 > 0
    assert entry["device"]["memory_bytes"] > 2 * entry["memory"]["aliased"]
    assert 0 < entry["seconds"]["floor"] <= entry["seconds"]["serial"]
    assert cli.main([*arguments, *plain(), *SMALL[:-2]]) == 0
    text = capsys.readouterr().out
    assert "Not compiled, because JAX's CUDA plugin is not installed" in text
    assert "at least: at most" in text
    assert "nothing was run on a GPU" in text


@pytest.mark.skipif(
    not has_cuda_plugin(),
    reason="JAX's CUDA plugin is not installed: pip install 'cellplm-jax[cuda13]'",
)
def test_with_the_plugin_the_step_compiles_without_a_gpu(capsys):
    arguments = ["plan", "--config", "configs/pretrain.py:debug", "--topology", "h100:8"]
    assert cli.main([*arguments, *plain(), *SMALL]) == 0
    [entry] = json.loads(capsys.readouterr().out)["tried"]
    assert entry["source"] == "compiled"
    eighth = entry["step_product_flops"] / 8
    # The compiler makes sums of the smallest products; of a large model they are nothing.
    assert 0.7 * eighth <= entry["device"]["flops"] <= 1.5 * eighth
    assert entry["memory"]["temporaries"] > 0
    assert {part["kind"] for part in entry["device"]["collectives"]} == {"all-reduce"}


def test_ironwood_has_two_devices_a_chip_and_counts_cores():
    topology = parse_topology("tpu7x:2x2x1")
    assert (topology.name, topology.devices, topology.accelerator) == ("tpu7x:2x2x1", 8, "tpu7x-8")
    assert parse_topology("tpu7x-128") == parse_topology("tpu7x:4x4x4")
    # Vendor's figures of a chip, halved.
    assert topology.chip.flops * 2 == 2307e12
    assert topology.chip.memory < 96 * 2**30
