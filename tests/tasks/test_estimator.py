"""What all estimators share: reading, contexts, examples, the start of a task, saving and loading."""

from __future__ import annotations

import dataclasses
import inspect
import json

import numpy as np
import pytest
import scipy.sparse as sparse

import cellplm_jax
from cellplm_jax.config import FinetuneConfig, HeadConfig
from cellplm_jax.errors import CheckpointError, ConfigError, InputError
from cellplm_jax.tasks.adapt import start_model
from cellplm_jax.tasks.contexts import (
    contexts_of,
    deal,
    gather,
    labels_of,
    make_examples,
    read_cells,
    variable_genes,
)
from cellplm_jax.tasks.estimator import Estimator, Reading
from cellplm_jax.tasks.estimator_files import read_estimator
from cellplm_jax.tasks.recipe import Recipe
from cellplm_jax.tasks.splits import split_cells
from cellplm_jax.train.checkpoint import restore_item
from tests.conftest import VOCABULARY, make_adata, make_labelled

RECIPE = {"epochs": 2, "warmup_epochs": 1}


class Minimal(Estimator):
    """The smallest estimator: nothing but what the base class does."""

    task = "minimal"

    def fit(self, adata, **keys):
        table = self._read(adata, Reading(**keys))
        config = self._architecture()
        start = self._begin(table, config)
        self.model = start
        return self

    def predict(self, adata, **keys):
        z, _, _ = self._embed(adata, self.reading)
        table = read_cells(adata, self.model.genes, batch_key=self.reading.batch_key)
        parts = [(piece, out.mean) for piece, out in self._decode(z, batch=table.batch)]
        return np.concatenate([mean for _, mean in parts])

    def score(self, adata, **keys):
        return {}

    def _state(self):
        return {"answer": 42}, {"numbers": np.arange(3.0)}

    def _restore(self, state, arrays):
        self.answer, self.numbers = state["answer"], arrays["numbers"]


# Cells, contexts, examples


def test_cells_are_read_over_the_vocabulary():
    adata = make_adata(20)
    table = read_cells(adata, VOCABULARY, batch_key="batch")
    assert (len(table), table.genes) == (20, VOCABULARY)
    assert table.batch.tolist() == [f"b{n % 2}" for n in range(20)]
    wanted = adata[:, VOCABULARY].X.toarray()
    np.testing.assert_array_equal(table.counts.toarray(), wanted)
    few = table.restrict(np.array([3, 1]))
    assert few.genes == [VOCABULARY[3], VOCABULARY[1]]
    np.testing.assert_array_equal(few.counts.toarray(), wanted[:, [3, 1]])
    assert (read_cells(adata, VOCABULARY).batch == "all cells").all()


def test_without_a_vocabulary_the_data_names_its_genes():
    adata = make_adata(20)
    found = read_cells(adata, None)  # none of these names is a human gene
    assert found.genes == list(adata.var_names)
    human = adata[:, VOCABULARY[:3]].copy()
    human.var_names = ["CD3E", "ENSG00000010610", "nonsense"]
    found = read_cells(human, None)
    assert sorted(found.genes) == ["ENSG00000010610", "ENSG00000198851"]  # CD4 and CD3E
    mouse = adata.copy()
    mouse.var["symbol"] = [f"Gene{n}a" for n in range(mouse.n_vars)]
    found = read_cells(mouse, None, gene_key="symbol")
    assert found.genes == list(mouse.var["symbol"])


def test_contexts():
    batch = np.array(["b", "a", "b", "a", "b", "b"], object)
    some = [c.tolist() for c in contexts_of(batch, np.array([0, 1, 2, 4, 5]))]
    assert some == [[0, 2, 4, 5], [1]]
    some = [c.tolist() for c in contexts_of(batch, np.arange(6), limit=3)]
    assert some == [[0, 4], [2, 5], [1, 3]]
    part = np.array(["x", "x", "y", "y", "x", "x"], object)
    some = [c.tolist() for c in contexts_of(batch, np.arange(6), part=part)]
    assert some == [[0, 4, 5], [1], [2], [3]]
    assert deal(np.zeros(0, int), 3) == []


def test_examples_hold_every_cell_once_in_few_shapes(tiny_model):
    table = read_cells(make_adata(150), VOCABULARY)
    contexts = [np.arange(100), np.arange(100, 120), np.arange(120, 148), np.zeros(0, int)]
    numbers = np.arange(150)
    layouts = make_examples(
        table,
        contexts,
        tiny_model.config,
        targets={"number": numbers, "vector": np.ones((150, 2), np.float32)},
        context_targets={"context": np.arange(4)},
        cells_per_step=64,
    )
    shapes = [layout.example.batch.cell_mask.shape for layout in layouts]
    assert shapes == [(1, 128), (2, 32)]
    held = np.concatenate([layout.cells[layout.cells >= 0] for layout in layouts])
    assert sorted(held) == list(range(148))
    for layout in layouts:
        batch, targets = layout.example.batch, layout.example.targets
        np.testing.assert_array_equal(targets["number"], layout.cells)
        np.testing.assert_array_equal(batch.cell_mask, layout.cells >= 0)
        assert (np.asarray(targets["vector"])[layout.cells < 0] == 0).all()
        dense = np.asarray(batch.dense_counts(len(VOCABULARY)))
        np.testing.assert_array_equal(
            dense[batch.cell_mask], table.counts[layout.cells[layout.cells >= 0]].toarray()
        )
    assert [layout.contexts.tolist() for layout in layouts] == [[0], [1, 2]]
    back = gather(layouts, [layout.cells.astype(np.float32) for layout in layouts], 150)
    np.testing.assert_array_equal(back[:148], numbers[:148])
    assert np.isnan(back[148:]).all()


def test_empty_rows_are_harmless(tiny_model):
    table = read_cells(make_adata(60), VOCABULARY)
    contexts = np.split(np.arange(60), 5)
    layouts = make_examples(table, contexts, tiny_model.config, cells_per_step=96)
    assert [layout.example.batch.cell_mask.shape for layout in layouts] == [(3, 32)] * 2
    assert layouts[1].contexts[-1] == -1
    model = tiny_model.express
    assert np.isfinite(model(tiny_model.device_params, layouts[1].example.batch)).all()


def test_variable_genes_are_those_of_scanpy():
    scanpy = pytest.importorskip("scanpy", reason="needs the extra 'eval'")
    random = np.random.default_rng(0)
    rate = random.gamma(0.5, 2.0, 300) * (
        1 + 4 * random.random((3, 300))[random.integers(0, 3, 200)]
    )
    counts = random.poisson(rate).astype(np.float32)
    counts[:, :3] = 0
    found = variable_genes(sparse.csr_matrix(counts), 50)
    adata = scanpy.AnnData(counts.copy())
    scanpy.pp.normalize_total(adata, target_sum=1e4)
    scanpy.pp.log1p(adata)
    scanpy.pp.highly_variable_genes(adata, n_top_genes=50, flavor="seurat")
    wanted = np.flatnonzero(adata.var["highly_variable"])
    np.testing.assert_array_equal(found, wanted)
    assert len(variable_genes(sparse.csr_matrix(counts), 10_000)) == (counts.sum(axis=0) > 0).sum()


# The split


def test_a_random_split_is_even_over_the_labels():
    table = read_cells(make_labelled(90), VOCABULARY)
    kind = labels_of(table.obs, "kind")
    usable = np.ones(90, bool)
    usable[:10] = False
    kind[11:] = np.where(kind[11:] == "gamma", "beta", kind[11:])
    kind[10:13] = "gamma"  # three cells: too few to give one away
    options = {"usable": usable, "strata": kind, "fraction": 0.2}
    train, valid = split_cells(table, None, seed=0, **options)
    assert sorted([*train, *valid]) == list(range(10, 90))
    assert "gamma" not in set(kind[valid])
    for name in ("alpha", "beta"):
        assert (kind[valid] == name).sum() == round(0.2 * (kind[10:] == name).sum())
    again = split_cells(table, None, seed=0, **options)
    np.testing.assert_array_equal(again[1], valid)
    assert not np.array_equal(split_cells(table, None, seed=1, **options)[1], valid)


def test_a_given_split_is_kept():
    adata = make_labelled(40)
    adata.obs["part"] = ["Train"] * 20 + ["validation"] * 8 + ["test"] * 12
    table = read_cells(adata, VOCABULARY)
    options = {"usable": np.ones(40, bool), "strata": labels_of(table.obs, "kind"), "seed": 0}
    train, valid = split_cells(table, "part", fraction=0.5, **options)
    assert (train.tolist(), valid.tolist()) == (list(range(20)), list(range(20, 28)))
    table.obs["part"] = ["train"] * 20 + ["test"] * 20
    train, valid = split_cells(table, "part", fraction=0.25, **options)
    assert set(train) | set(valid) == set(range(20))
    assert len(valid) >= 3
    table.obs["part"] = "test"
    with pytest.raises(InputError, match=r"marks no usable training cell .its values: 'test'"):
        split_cells(table, "part", fraction=0.1, **options)
    with pytest.raises(InputError, match="no column 'nothing'"):
        split_cells(table, "nothing", fraction=0.1, **options)


# The start of a task


def test_a_head_replaces_the_decoder_and_the_rest_is_pretrained(tiny_model):
    config = dataclasses.replace(
        tiny_model.config,
        latent=dataclasses.replace(tiny_model.config.latent, kind="deterministic"),
        head=HeadConfig(kind="annotation", outputs=3),
    )
    genes = VOCABULARY[5:20]
    start, fresh = start_model(tiny_model, config, genes, seed=1)
    assert fresh == ["head/mlp/linear_0/bias", "head/mlp/linear_0/kernel"]
    assert "decoder" not in start.params
    old = tiny_model.params
    np.testing.assert_array_equal(
        start.params["embedder"]["gene_embedding"], old["embedder"]["gene_embedding"][5:20]
    )
    np.testing.assert_array_equal(
        start.params["latent"]["linear"]["kernel"], old["latent"]["mean"]["kernel"]
    )
    assert start.config.genes == 15
    assert start.params["head"]["mlp"]["linear_0"]["kernel"].shape == (16, 3)


def test_other_widths_are_refused_by_name(tiny_model):
    config = dataclasses.replace(tiny_model.config, hidden=64)
    with pytest.raises(CheckpointError, match=r"needs the parameter '.*of shape .*has as"):
        start_model(tiny_model, config, VOCABULARY)


def test_new_batches_start_at_the_mean_of_the_pretrained_rows(tiny_model):
    estimator = Minimal(tiny_model, quiet=True).fit(make_adata(20), batch_key="batch")
    table = tiny_model.params["decoder"]["batch_0"]["table"]
    grown = estimator.model.params["decoder"]["batch_0"]["table"]
    assert estimator.batch_rows == {"b0": 3, "b1": 4}
    np.testing.assert_array_equal(grown[:3], table)
    np.testing.assert_allclose(grown[3:], np.tile(table.mean(axis=0), (2, 1)), rtol=1e-6)
    # So that predictions for them begin where the pretrained model's for an unknown batch are.
    other = Minimal(tiny_model, quiet=True).fit(make_adata(20))
    np.testing.assert_allclose(
        estimator.predict(make_adata(20)).sum(), other.predict(make_adata(20)).sum(), rtol=0.2
    )
    assert estimator.predict(make_adata(20)).shape == (20, 40)


# Saving and loading


def test_saved_and_loaded(tiny_model, tmp_path):
    estimator = Minimal(tiny_model, quiet=True, **RECIPE).fit(make_adata(20), batch_key="batch")
    wanted = estimator.predict(make_adata(25, seed=1))
    estimator.save(tmp_path / "saved")
    found = Minimal.load(tmp_path / "saved", quiet=True)
    np.testing.assert_array_equal(found.predict(make_adata(25, seed=1)), wanted)
    assert (found.answer, found.numbers.tolist()) == (42, [0.0, 1.0, 2.0])
    assert found.training == estimator.training
    assert found.reading.batch_key == "batch"
    assert cellplm_jax.load(tmp_path / "saved").genes == estimator.model.genes
    with pytest.raises(CheckpointError, match="already exists"):
        estimator.save(tmp_path / "saved")
    content = json.loads((tmp_path / "saved" / "estimator.json").read_text())
    assert content["class"] == "Minimal"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]
    assert restore_item(tmp_path / "saved", item="estimator")[0]["numbers"].shape == (3,)


def test_what_cannot_be_loaded(tiny_model, tiny_run, tmp_path):
    with pytest.raises(CheckpointError, match=r"has no estimator.json.*cellplm_jax\.load"):
        Minimal.load(tiny_run)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_estimator(tmp_path / "nowhere")
    Minimal(tiny_model, quiet=True).fit(make_adata(20)).save(tmp_path / "saved")
    with pytest.raises(
        CheckpointError,
        match=r"contains a fitted Minimal; expected a CellTypeAnnotator.*Minimal\.load",
    ):
        cellplm_jax.CellTypeAnnotator.load(tmp_path / "saved")
    path = tmp_path / "saved" / "estimator.json"
    content = json.loads(path.read_text())
    del content["reading"]
    path.write_text(json.dumps(content))
    with pytest.raises(
        CheckpointError, match=r"cannot be read .'estimator\.json' differs from its checksum"
    ):
        Minimal.load(tmp_path / "saved")
    path.write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Minimal.load(tmp_path / "saved")


def test_what_is_not_fitted(tiny_model, tmp_path):
    estimator = Minimal(tiny_model)
    with pytest.raises(InputError, match="this Minimal has not been fitted"):
        estimator.save(tmp_path / "x")
    with pytest.raises(InputError, match="without 'loss'"):
        estimator.plot_history()
    assert list(tmp_path.iterdir()) == []


def test_options_are_checked(tiny_model):
    with pytest.raises(
        ConfigError, match=r"unknown key 'epoch' in training.*Did you mean 'epochs'"
    ):
        Minimal(tiny_model, epoch=3)
    with pytest.raises(ConfigError, match=r"training\.epochs = 'many'"):
        Minimal(tiny_model, epochs="many")
    assert Minimal(tiny_model).genes is None
    assert Minimal(None).genes == 3000
    assert Minimal(None, genes=7).genes == 7


def test_gene_panels_that_do_not_overlap(tiny_model):
    adata = make_adata(20)
    adata.var_names = [f"other-{n}" for n in range(adata.n_vars)]
    with pytest.raises(InputError, match="0 of the model's 40 genes are among the 43 gene names"):
        Minimal(tiny_model).fit(adata)
    fitted = Minimal(tiny_model, quiet=True).fit(make_adata(20))
    with pytest.raises(InputError, match="0 of the model's 40 genes"):
        fitted.predict(adata)


ESTIMATORS = (
    "BatchIntegrator",
    "CellTypeAnnotator",
    "Denoiser",
    "GeneImputer",
    "PerturbationPredictor",
    "SampleClassifier",
)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_recipe_is_named_in_the_signature(name):
    """``help`` and notebooks show every argument with the default of the task, and no catch-all."""
    kind = getattr(cellplm_jax, name)
    parameters = inspect.signature(kind).parameters
    assert next(iter(parameters)) == "model"
    assert {p.kind for p in list(parameters.values())[1:]} == {inspect.Parameter.KEYWORD_ONLY}
    assert {"genes", "quiet", "precision", "devices", "seed"} <= set(parameters)
    assert parameters["quiet"].default is False
    if name != "SampleClassifier":
        assert {"epochs", "learning_rate", "freeze", "adapter_rank"} <= set(parameters)
        assert parameters["epochs"].default == kind.recipe.epochs
    else:
        assert "epochs" not in parameters
    assert kind(None, seed=3, precision="bfloat16").training.seed == 3


def test_the_named_recipe_is_that_of_the_configuration():
    fields = {field.name: field.type for field in dataclasses.fields(FinetuneConfig)}
    named = {name: hint.__forward_arg__ for name, hint in Recipe.__annotations__.items()}
    assert list(fields) == list(named)
    assert {name: text for name, text in named.items() if name != "masking"} == {
        name: text for name, text in fields.items() if name != "masking"
    }


def test_notebooks_complete_the_recipe():
    completer = pytest.importorskip("IPython.core.completer")
    complete = completer.IPCompleter(namespace={"A": cellplm_jax.CellTypeAnnotator})
    complete.use_jedi = False
    line = "A('small', ep"
    assert "epochs=" in complete.complete(line_buffer=line, cursor_pos=len(line))[1]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_misspelt_argument_is_answered_with_the_right_one(name):
    if name != "SampleClassifier":
        with pytest.raises(ConfigError, match="Did you mean 'epochs'"):
            getattr(cellplm_jax, name)(None, epoch=3)
