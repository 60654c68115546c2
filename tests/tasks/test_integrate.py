"""Integration: batches mixed on simulated cells, new batches, saved and loaded, and every refusal."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from cellplm_jax.errors import ConfigError, InputError
from cellplm_jax.evaluate.embedding import integration_scores
from cellplm_jax.losses.objectives import batch_mixing_loss
from cellplm_jax.tasks.denoise import Denoiser
from cellplm_jax.tasks.embed import embed
from cellplm_jax.tasks.estimator import Estimator
from cellplm_jax.tasks.integrate import BatchIntegrator
from tests.conftest import VOCABULARY, make_labelled

pytest.importorskip("scanpy", reason="needs the extra 'eval'")
pytest.importorskip("igraph", reason="needs the extra 'eval'")

# Few cells are few steps: the mixing term has to weigh more than usual.
FAST = {
    "strength": 30,
    "epochs": 30,
    "warmup_epochs": 1,
    "learning_rate": 3e-3,
    "cells_per_context": 60,
    "cells_per_step": 60,
    "quiet": True,
}
KEY = "X_cellplm_integrated"


def batched(cells=120, *, seed=0, added=12):
    """Three kinds of cell in two batches; in the second, every fourth gene has ``added`` counts more."""
    adata = make_labelled(cells, seed=seed)
    matrix = adata.X.toarray()
    second = (adata.obs["batch"] == "b1").to_numpy()
    genes = np.isin(adata.var_names, VOCABULARY[::4])
    matrix[np.ix_(second, genes)] += added
    adata.X = matrix.astype(np.float32)
    return adata


@pytest.fixture(scope="module")
def fitted(tiny_model):
    """Read only."""
    return BatchIntegrator(tiny_model, **FAST).fit(batched(), batch_key="batch")


def test_mixes_batches_and_keeps_the_kinds(tiny_model, fitted):
    adata = embed(batched(), tiny_model, spatial_key=None)
    batches, kinds = adata.obs["batch"], adata.obs["kind"]
    before = integration_scores(adata.obsm["X_cellplm"], batches, kinds)
    after = fitted.score(batched(), label_key="kind")
    assert after["ilisi"] > before["ilisi"] + 0.1
    assert after["kbet"] > before["kbet"] + 0.1
    assert after["knn_accuracy"] > before["knn_accuracy"] - 0.05
    assert fitted.history[-1]["mixing"] < fitted.history[0]["mixing"]


def test_writes_an_embedding_and_facts(fitted):
    adata = batched(30, seed=3)
    assert fitted.predict(adata) is adata
    assert adata.obsm[KEY].shape == (30, fitted.model.config.latent_size)
    assert adata.uns["cellplm_integration"]["batches_fitted"] == ["b0", "b1"]
    assert set(fitted.score(adata)) == {"ilisi", "kbet", "clusters"}


def test_batches_need_not_be_known(fitted):
    adata = batched(30, seed=3)
    expected = fitted.predict(adata.copy()).obsm[KEY]
    del adata.obs["batch"]
    np.testing.assert_array_equal(fitted.predict(adata, key_added="z").obsm["z"], expected)


def test_saved_and_loaded_predicts_the_same(fitted, tmp_path):
    fitted.save(tmp_path / "integrator")
    found = BatchIntegrator.load(tmp_path / "integrator", quiet=True)
    assert found.strength == 30.0
    adata = batched(30, seed=3)
    np.testing.assert_array_equal(
        found.predict(adata.copy()).obsm[KEY], fitted.predict(adata.copy()).obsm[KEY]
    )
    with pytest.raises(Exception, match="a fitted BatchIntegrator"):
        Denoiser.load(tmp_path / "integrator")
    assert isinstance(found, Estimator)


def test_mixing_loss_by_hand():
    """Two batches of two cells each: log 2 apart; on one point more than 0, as a cell is not its own neighbour."""
    code, mask = jnp.array([[0, 0, 1, 1]]), jnp.ones((1, 4), bool)
    apart = jnp.array([[[0.0], [1], [50], [51]]])
    loss = batch_mixing_loss(apart, code, mask, batches=2, neighbors=1)
    assert float(loss) == pytest.approx(np.log(2), abs=1e-5)
    same = batch_mixing_loss(jnp.zeros((1, 4, 1)), code, mask, batches=2, neighbors=1)
    third, rest = 1 / 3, 2 / 3
    expected = third * np.log(third / 0.5) + rest * np.log(rest / 0.5)
    assert float(same) == pytest.approx(expected, abs=1e-5)
    padded = jnp.concatenate([apart, jnp.full((1, 2, 1), 0.5)], axis=1)
    mask = jnp.array([[True] * 4 + [False] * 2])
    code = jnp.array([[0, 0, 1, 1, -1, -1]])
    loss = batch_mixing_loss(padded, code, mask, batches=2, neighbors=5)
    assert np.isfinite(float(loss))
    assert float(batch_mixing_loss(padded, code, mask, batches=2, neighbors=1)) == pytest.approx(
        np.log(2), abs=1e-5
    )


def test_refusals(tiny_model):
    with pytest.raises(ConfigError, match="strength = -1"):
        BatchIntegrator(tiny_model, strength=-1)
    integrator = BatchIntegrator(tiny_model, **FAST)
    with pytest.raises(InputError, match="has not been fitted"):
        integrator.predict(batched(30))
    adata = batched(30)
    adata.obs["one"] = "only"
    with pytest.raises(InputError, match=r"names 1 batch with counts \('only'\)"):
        integrator.fit(adata, batch_key="one")
    with pytest.raises(InputError, match="absent"):
        integrator.fit(adata, batch_key="absent")


@pytest.fixture(scope="module")
def aligned(tiny_model):
    """An integrator without training; read only."""
    pytest.importorskip("harmonypy", reason="needs the extra 'eval'")
    return BatchIntegrator(tiny_model, quiet=True).fit(batched(), batch_key="batch")


def test_alignment_mixes_batches_without_training(tiny_model, aligned):
    adata = embed(batched(), tiny_model, spatial_key=None)
    batches, kinds = adata.obs["batch"], adata.obs["kind"]
    before = integration_scores(adata.obsm["X_cellplm"], batches, kinds)
    after = aligned.score(batched(), label_key="kind")
    assert (aligned.method, aligned.history) == ("align", [])
    assert after["ilisi"] > before["ilisi"] + 0.1
    assert after["kbet"] > before["kbet"] + 0.1
    assert after["knn_accuracy"] > before["knn_accuracy"] - 0.05
    none = BatchIntegrator(tiny_model, strength=0, quiet=True).fit(batched(), batch_key="batch")
    # Without Harmony; components are still centred by batch.
    assert len(none._alignment.centroids) == 0 < len(aligned._alignment.centroids)
    assert np.isfinite(none.predict(batched()).obsm[KEY]).all()


def test_a_new_batch_moves_to_the_clusters_of_the_fit(aligned):
    """Cells of the second batch, all of them in a file of their own, lie next to the same kinds of the fit."""
    known, new = batched(), batched(120, seed=5)
    new = new[(new.obs["batch"] == "b1").to_numpy()].copy()
    new.obs["batch"] = "never seen"
    one = aligned.predict(known).obsm[KEY]
    other = aligned.predict(new).obsm[KEY]
    assert one.shape[1] == other.shape[1]
    distance = np.square(other[:, None] - one[None]).sum(axis=2)
    nearest = known.obs["kind"].to_numpy()[distance.argmin(axis=1)]
    assert (nearest == new.obs["kind"].to_numpy()).mean() > 0.8
    expected = aligned.predict(new.copy()).obsm[KEY]
    del new.obs["batch"]
    np.testing.assert_allclose(aligned.predict(new).obsm[KEY], expected, atol=1e-5)


def test_a_saved_alignment_predicts_the_same(aligned, tmp_path):
    aligned.save(tmp_path / "integrator")
    found = BatchIntegrator.load(tmp_path / "integrator", quiet=True)
    assert found.method == "align"
    adata = batched(40, seed=3)
    np.testing.assert_array_equal(
        found.predict(adata.copy()).obsm[KEY], aligned.predict(adata.copy()).obsm[KEY]
    )
    facts = found.predict(adata).uns["cellplm_integration"]
    assert facts["batches_fitted"] == ["b0", "b1"]
    assert facts["method"] == "align"


def test_which_method(tiny_model):
    assert BatchIntegrator(tiny_model).method == "align"
    assert BatchIntegrator(tiny_model, seed=3, strength=2).method == "align"
    assert BatchIntegrator(tiny_model, epochs=2).method == "finetune"
    assert BatchIntegrator(None).method == "finetune"
    with pytest.raises(InputError, match="method='align' with training options"):
        BatchIntegrator(tiny_model, method="align", epochs=2)
    with pytest.raises(InputError, match="without a pretrained model"):
        BatchIntegrator(None, method="align")
    with pytest.raises(InputError, match="method='best'; expected one of 'default', 'align'"):
        BatchIntegrator(tiny_model, method="best")
    adata = batched(30)
    adata.obs["one"] = "only"
    with pytest.raises(InputError, match=r"names 1 batch with counts \('only'\)"):
        BatchIntegrator(tiny_model, quiet=True).fit(adata, batch_key="one")
