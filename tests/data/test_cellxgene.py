"""Files of CELLxGENE: those of Discover (normalised ``X``, counts in ``raw.X``) and slices of the Census."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from cellplm_jax.data.anndata_io import open_counts
from cellplm_jax.tasks.embed import embed, embed_file
from tests.conftest import VOCABULARY, make_adata

OBS = {
    "soma_joinid": range(20), "dataset_id": "d", "assay": "10x 3' v3", "cell_type": "T cell",
    "tissue": "blood", "donor_id": "p1", "is_primary_data": True, "suspension_type": "cell",
}  # fmt: skip


def counts():
    """The same counts as everywhere, genes in the order of the vocabulary."""
    return make_adata(20, spatial=False)[:, VOCABULARY]


def discover() -> ad.AnnData:
    """Schema 5: Ensembl ids as the index, ``feature_is_filtered`` genes are 0 in X but not in raw."""
    adata = counts()
    obs = pd.DataFrame(OBS, index=adata.obs_names)
    raw_var = pd.DataFrame(
        {
            "feature_name": [f"symbol{number}" for number in range(len(VOCABULARY))],
            "feature_reference": "NCBITaxon:9606",
            "feature_biotype": "gene",
            "feature_length": np.arange(500, 500 + len(VOCABULARY)),
            "feature_type": "protein_coding",
        },
        index=pd.Index(VOCABULARY, name="feature_id"),
    ).astype({"feature_reference": "category", "feature_biotype": "category"})
    raw = adata.X.toarray().astype(np.float32)
    filtered = np.arange(len(VOCABULARY)) % 7 == 0
    normalised = np.log1p(1e4 * raw / raw.sum(1, keepdims=True))
    normalised[:, filtered] = 0
    result = ad.AnnData(raw, obs, raw_var)
    result.raw = result.copy()
    result.X = normalised.astype(np.float32)
    result.var["feature_is_filtered"] = filtered
    result.uns["schema_version"] = "5.2.0"
    return result


def census() -> ad.AnnData:
    """A slice from ``cellxgene_census.get_anndata``: counts in X, numbers as the index, ids in ``feature_id``."""
    adata = counts()
    var = pd.DataFrame(
        {
            "soma_joinid": np.arange(len(VOCABULARY)) + 1000,
            "feature_id": VOCABULARY,
            "feature_name": [f"symbol{number}" for number in range(len(VOCABULARY))],
            "feature_length": 500,
            "nnz": 10,
            "n_measured_obs": 20,
        },
        index=[str(number) for number in range(len(VOCABULARY))],
    )
    return ad.AnnData(
        adata.X.toarray().astype(np.float32), pd.DataFrame(OBS, index=adata.obs_names), var
    )


@pytest.mark.parametrize(
    ("make", "matrix", "gene_key"),
    [(discover, "raw.X", "var_names"), (census, "X", "feature_id")],
)
def test_counts_and_genes_are_found(make, matrix, gene_key, tiny_model, tmp_path):
    expected = counts().X.toarray().astype(np.float32)
    adata = make()
    with open_counts(adata, VOCABULARY) as source:
        assert (source.report.matrix, source.report.gene_key) == (matrix, gene_key)
        assert source.report.genes.matched == len(VOCABULARY)
        np.testing.assert_array_equal(source.read(0, 20).toarray(), expected)
    adata.write_h5ad(tmp_path / "in.h5ad")
    embed_file(
        tmp_path / "in.h5ad", tiny_model, tmp_path / "out.h5ad", batch_key="donor_id", quiet=True
    )
    written = ad.read_h5ad(tmp_path / "out.h5ad")
    plain = embed(counts().copy(), tiny_model, quiet=True)
    np.testing.assert_allclose(written.obsm["X_cellplm"], plain.obsm["X_cellplm"], atol=1e-5)
    assert list(written.var.columns) == list(adata.var.columns)
    assert list(written.obs.columns) == list(adata.obs.columns)
