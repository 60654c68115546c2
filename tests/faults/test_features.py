"""Features that are no genes are never added to genes."""

from __future__ import annotations

import anndata
import numpy as np
import pytest
from scipy import sparse

from cellplm_jax.data.anndata_io import open_counts
from cellplm_jax.data.corpus import open_corpus
from cellplm_jax.errors import InputError
from cellplm_jax.tasks.embed import embed, embed_file
from cellplm_jax.tasks.prepare import prepare
from tests.conftest import VOCABULARY, make_adata, make_labelled


def with_antibodies(
    adata, column="feature_types", gene="Gene Expression", other="Antibody Capture"
):
    """Add antibodies that have the names of two genes, with high counts."""
    counts = np.random.default_rng(0).poisson(5000, (adata.n_obs, 2))
    both = anndata.AnnData(
        sparse.hstack([adata.X, sparse.csr_matrix(counts)]).tocsr().astype(np.float32),
        obs=adata.obs,
    )
    both.var_names = [*adata.var_names, *VOCABULARY[:2]]
    both.var[column] = [gene] * adata.n_vars + [other] * 2
    both.obsm.update(adata.obsm)
    return both


@pytest.mark.parametrize(
    ("column", "gene", "other"),
    [
        ("feature_types", "Gene Expression", "Antibody Capture"),
        ("feature_types", "Gene Expression", "CRISPR Guide Capture"),
        ("modality", "rna", "prot"),
        ("feature_biotype", "gene", "spike-in"),
        ("assay", "RNA", "ADT"),
    ],
)
@pytest.mark.parametrize("stored", [False, True])
def test_only_genes_are_read(tmp_path, column, gene, other, stored):
    plain = make_adata(30)
    source = with_antibodies(plain, column, gene, other)
    if stored:
        source.write_h5ad(tmp_path / "a.h5ad")
        source = tmp_path / "a.h5ad"
    with open_counts(plain, VOCABULARY) as expected, open_counts(source, VOCABULARY) as found:
        assert (found.read(0, 30) != expected.read(0, 30)).nnz == 0
        assert (found.read_rows([3, 1]) != expected.read_rows([3, 1])).nnz == 0
        note = next(text for text in found.report.messages() if "left out" in text)
        assert f"2 of '{other}'" in note
        assert found.report.as_dict()["other_features"] == {other: 2}
        assert found.gene_names[-2:] == ["", ""]
    with open_counts(source, VOCABULARY, feature_type="all") as found:
        assert found.read(0, 30)[:, 0].min() > 4000
    with open_counts(source, VOCABULARY, feature_type=other.upper(), minimum_genes=1) as found:
        assert (np.diff(found.read(0, 30).tocsc().indptr) > 0).sum() == 2


def test_an_unknown_type_and_a_file_without_genes():
    adata = with_antibodies(make_adata(30))
    with pytest.raises(
        InputError, match=r"no features of type 'Antibody Captur'.*Did you mean 'Antibody Capture'"
    ):
        open_counts(adata, VOCABULARY, feature_type="Antibody Captur")
    adata.var["feature_types"] = "Antibody Capture"
    with pytest.raises(InputError, match=r"lists no genes, only 'Antibody Capture'"):
        open_counts(adata, VOCABULARY)
    adata.var["feature_types"] = 5
    open_counts(adata, VOCABULARY)


def test_values_of_other_features_are_not_checked():
    adata = with_antibodies(make_adata(30))
    matrix = adata.X.tolil()
    matrix[:, -2:] = -1.5
    adata.X = matrix.tocsr()
    with (
        open_counts(adata, VOCABULARY) as found,
        open_counts(make_adata(30), VOCABULARY) as expected,
    ):
        assert (found.read(0, 30) != expected.read(0, 30)).nnz == 0


def test_embeddings_estimators_and_corpora_do_not_see_them(tiny_model, tmp_path):
    plain = make_labelled(60)
    both = with_antibodies(plain)
    expected = embed(plain.copy(), tiny_model).obsm["X_cellplm"]
    np.testing.assert_array_equal(embed(both.copy(), tiny_model).obsm["X_cellplm"], expected)
    assert (
        np.abs(
            embed(both.copy(), tiny_model, feature_type="all").obsm["X_cellplm"] - expected
        ).max()
        > 1e-3
    )
    both.write_h5ad(tmp_path / "both.h5ad")
    messages = embed_file(tmp_path / "both.h5ad", tiny_model, tmp_path / "out.h5ad", quiet=True)
    assert any("2 of 'Antibody Capture'" in text for text in messages)
    found = {}
    for name, options in (("genes", {}), ("all", {"feature_type": "all"})):
        summary = prepare(
            tmp_path / "both.h5ad",
            tmp_path / name,
            genes=VOCABULARY,
            workers=0,
            quiet=True,
            **options,
        )
        corpus = open_corpus(tmp_path / name)
        found[name] = sum(
            int(corpus.read(n, 0, s.cells).count.max()) for n, s in enumerate(corpus.samples)
        )
        if name == "genes":
            assert any("left out" in text for text in summary["parts"][0]["notes"])
    assert found["genes"] < 1000 < found["all"]


def test_an_estimator_keeps_the_type_it_was_fitted_with():
    from cellplm_jax.tasks.estimator import Reading

    reading = Reading(feature_type="all")
    assert reading.changed(layer="counts").feature_type == "all"
    with pytest.raises(InputError, match=r"batch_key = \['k'\] is of type list; expected one name"):
        Reading(batch_key=["k"])  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"cells_per_context = 2\.5"):
        Reading(cells_per_context=2.5)  # type: ignore[arg-type]


def test_genes_that_cellxgene_filtered_are_not_measured():
    adata = make_adata(30)
    where = list(adata.var_names).index(VOCABULARY[3])
    adata.var["feature_is_filtered"] = np.arange(adata.n_vars) == where
    adata.layers["counts"] = adata.X.copy()
    with open_counts(adata, VOCABULARY) as found:
        assert not found.measured[3]
        assert any("not measured in X" in text for text in found.report.messages())
    with open_counts(adata, VOCABULARY, layer="counts") as found:
        assert found.measured[3]


def test_coordinates_in_other_places():
    import pandas as pd

    adata = make_adata(30)
    xy = adata.obsm.pop("spatial")
    adata.obsm["spatial"] = pd.DataFrame({"y": xy[:, 1], "x": xy[:, 0]}, index=adata.obs_names)
    with open_counts(adata, VOCABULARY) as found:
        np.testing.assert_allclose(found.coordinates("spatial"), xy)
    del adata.obsm["spatial"]
    adata.obsm["X_spatial"] = xy
    with open_counts(adata, VOCABULARY) as found:
        assert found.coordinates("spatial") is None
        assert any("spatial_key='X_spatial'" in text for text in found.report.messages())
    del adata.obsm["X_spatial"]
    adata.obs["X_centroid"], adata.obs["y_centroid"] = xy.T
    with open_counts(adata, VOCABULARY) as found:
        assert found.coordinates("spatial") is None
        assert any("'X_centroid', 'y_centroid'" in text for text in found.report.messages())
