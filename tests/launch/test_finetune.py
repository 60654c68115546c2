"""The fine-tuning program, started as users start it, and the configurations it reads."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("ml_collections")

from cellplm_jax.config import FinetuneConfig, to_dict
from cellplm_jax.errors import ConfigError
from cellplm_jax.tasks.annotate import CellTypeAnnotator
from configs import finetune_annotate, finetune_denoise, finetune_impute, finetune_perturb
from launch.estimators import TASKS, arguments_of, config_keys, config_of
from tests.conftest import ROOT, make_labelled


def launch(*arguments):
    # One device; the test session simulates eight.
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "finetune.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
        check=False,
    )


CONFIG = "--config=configs/finetune_annotate.py"


def test_a_fit_is_written_whole_and_not_made_again(tiny_run, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra 'eval'")
    make_labelled(60).write_h5ad(tmp_path / "labelled.h5ad")
    make_labelled(20, seed=3).write_h5ad(tmp_path / "others.h5ad")
    workdir = tmp_path / "runs" / "annotate"
    command = [
        CONFIG, f"--data={tmp_path / 'labelled.h5ad'}", f"--test={tmp_path / 'others.h5ad'}",
        f"--workdir={workdir}", f"--config.model={tiny_run}", "--config.label_key=kind",
        "--config.training.epochs=2", "--config.training.learning_rate=0.01",
    ]  # fmt: skip
    result = launch(*command)
    assert result.returncode == 0, result.stderr
    assert re.match(r"annotate: fitted in \d+ s, epoch [012] of 2 kept\n", result.stdout)
    assert "test accuracy: " in result.stdout
    assert f"open: cellplm_jax.CellTypeAnnotator.load('{workdir / 'estimator'}')" in result.stdout
    assert [path.name for path in workdir.parent.iterdir()] == ["annotate"]
    assert {path.name for path in workdir.iterdir()} == {
        "config.json", "estimator", "history.json", "history.png", "metrics.json",
    }  # fmt: skip
    annotator = CellTypeAnnotator.load(workdir / "estimator", quiet=True)
    assert annotator.labels == ["alpha", "beta", "gamma"]
    assert annotator.training.learning_rate == 0.01
    assert annotator.history == json.loads((workdir / "history.json").read_text())
    metrics = json.loads((workdir / "metrics.json").read_text())
    assert (metrics["fit"]["epochs"], metrics["test"]["cells"]) == (2, 20)
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    again = launch(*command)
    assert again.returncode == 0, again.stderr
    assert f"annotate: '{workdir}' is finished, nothing was fitted again\n" in again.stdout
    other = launch(*command, "--config.training.epochs=3")
    assert other.returncode == 2
    assert "differs in config.training.epochs: 2 there, 3 now" in other.stderr
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            [CONFIG, "--data=D", "--config.training.learning_rat=1"],
            "Did you mean '--config.training.learning_rate'?",
        ),
        ([CONFIG, "--data=D", "--config.labelkey=x"], "Did you mean '--config.label_key'?"),
        ([CONFIG, "--data=D", "--config.training.freeze=encodr"], "Did you mean 'encoder'?"),
        ([CONFIG, "--data=absent.h5ad"], "there is no file 'absent.h5ad'"),
        (["--config=configs/absent.py", "--data=D"], "configs/absent.py"),
        ([CONFIG, "--data=D"], "obs has no column 'cell_type'"),
    ],
)
def test_bad_input_is_one_message_and_status_2(tmp_path, arguments, said):
    path = tmp_path / "in.h5ad"
    make_labelled(8).write_h5ad(path)
    given = [argument.replace("=D", f"={path}", 1) for argument in arguments]
    result = launch(*given, f"--workdir={tmp_path / 'run'}", "--config.model=none")
    assert result.returncode == 2, result.stderr
    assert said in result.stderr
    assert result.stderr.startswith("finetune: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["in.h5ad"]


def test_configurations_hold_what_the_estimators_take():
    for task in TASKS:
        config = config_of(task)
        kind, made, _ = arguments_of_set(config)
        assert kind.__name__ == TASKS[task]
        assert config.training.to_dict() == to_dict(kind.recipe)
        assert set(made) - {"model"} <= set(config_keys(config))
    annotate = finetune_annotate.get_config()
    assert {"label_key", "method", "batch_key", "training.masking.gene_fraction"} <= set(
        config_keys(annotate)
    )
    _, made, fitted = arguments_of(annotate)
    assert (made["model"], made["genes"], fitted["label_key"]) == ("small", "default", "cell_type")
    assert finetune_denoise.get_config().task == "denoise"
    assert finetune_perturb.get_config().method == "finetune"


def arguments_of_set(config):
    """What a configuration says once every key that has to be set is."""
    for key in ("label_key", "sample_key", "perturbation_key", "control"):
        if key in config:
            config[key] = "x"
    return arguments_of(config)


def test_values_become_arguments():
    config = finetune_impute.get_config()
    config.model, config.genes, config.impute = "none", "50", "A,B"
    config.spatial_key = "none"
    config.training.epochs = 7
    kind, made, fitted = arguments_of(config)
    assert (made["model"], made["genes"], made["epochs"]) == (None, 50, 7)
    assert (fitted["genes"], fitted["spatial_key"], fitted["reference"]) == (["A", "B"], None, None)
    assert set(made) & set(to_dict(FinetuneConfig())) == {"epochs"}
    assert kind.__name__ == "GeneImputer"
    config.genes = "some"
    with pytest.raises(ConfigError, match="genes = 'some'; expected 'default', 'none' or a number"):
        arguments_of(config)
    with pytest.raises(ConfigError, match="sample_key is not set"):
        arguments_of(config_of("samples"))
    with pytest.raises(ConfigError, match="task = 'paint'; expected one of 'annotate'"):
        config_of("paint")
    with pytest.raises(KeyError, match="labels"):
        config_of("annotate", labels="x")
