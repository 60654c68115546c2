"""Corpora on disk: what is written is what is read, and damage never passes."""

from __future__ import annotations

import anndata
import numpy as np
import pytest
from scipy import sparse

from cellplm_jax.data.corpus import (
    PartSample,
    PartWriter,
    is_corpus,
    open_corpus,
    write_genes,
    write_index,
)
from tests.conftest import VOCABULARY, make_counts


def make_corpus(folder, *, parts=2, cells=(7, 30), seed=0):
    """A corpus of parts with two samples each, the second spatial, labels in the second part only."""
    write_genes(folder, VOCABULARY)
    matrices = []
    for number in range(parts):
        total = sum(cells)
        matrix = sparse.csr_matrix(make_counts(total, seed=seed + number).astype(np.uint16))
        random = np.random.default_rng(seed + number)
        coordinates = random.random((total, 2)).astype(np.float32)
        coordinates[: cells[0]] = np.nan
        with PartWriter(folder, f"part{number}", VOCABULARY, np.diff(matrix.indptr)) as writer:
            middle = int(matrix.indptr[5])
            writer.append(matrix.indices[:middle], matrix.data[:middle])
            writer.append(matrix.indices[middle:], matrix.data[middle:])
            writer.finish(
                [
                    PartSample("a", cells[0]),
                    PartSample("b", cells[1], platform_name="visium", spatial=True),
                ],
                dataset_name=f"part{number}",
                cell_names=[f"cell {i}" for i in range(total)],
                coordinates=coordinates,
                labels=[None, *(f"type {i % 3}" for i in range(total - 1))] if number else None,
                measured=np.arange(len(VOCABULARY)) != 3 if number else None,
                counters={"clipped_counts": number},
            )
        matrices.append((matrix, coordinates))
    write_index(folder, [f"part{number}" for number in range(parts)])
    return matrices


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "corpus"
    return folder, make_corpus(folder)


def test_reads_what_was_written(made):
    folder, matrices = made
    assert is_corpus(folder)
    corpus = open_corpus(folder)
    assert corpus.genes == VOCABULARY
    assert [(s.dataset_name, s.name, s.cells, s.spatial, s.batch) for s in corpus.samples] == [
        ("part0", "a", 7, False, 0),
        ("part0", "b", 30, True, 1),
        ("part1", "a", 7, False, 2),
        ("part1", "b", 30, True, 3),
    ]
    assert [s.platform for s in corpus.samples] == [-1, 0, -1, 0]
    assert corpus.label_names == ["type 0", "type 1", "type 2"]
    assert corpus.measured(0) is None
    assert corpus.measured(2).sum() == len(VOCABULARY) - 1
    for sample in range(4):
        matrix, coordinates = matrices[sample // 2]
        offset = 7 * (sample % 2)
        for start, stop in ((0, corpus.samples[sample].cells), (2, 5), (3, 3)):
            run = corpus.read(sample, start, stop)
            expected = matrix[offset + start : offset + stop]
            np.testing.assert_array_equal(run.indptr, expected.indptr)
            np.testing.assert_array_equal(run.gene, expected.indices)
            np.testing.assert_array_equal(run.count, expected.data)
            assert run.gene.dtype == run.count.dtype == np.uint16
            assert run.cells == stop - start
            if sample % 2:
                np.testing.assert_array_equal(
                    run.coordinates, coordinates[offset + start : offset + stop]
                )
            else:
                assert run.coordinates is None
            if sample < 2:
                assert (run.labels == -1).all()
            else:
                cells = np.arange(offset + start, offset + stop)
                np.testing.assert_array_equal(run.labels, np.where(cells, (cells - 1) % 3, -1))
        np.testing.assert_array_equal(
            corpus.indptr(sample), matrix[offset : offset + corpus.samples[sample].cells].indptr
        )


def test_a_part_is_an_anndata_file(made):
    folder, matrices = made
    adata = anndata.read_zarr(folder / "parts" / "part1.zarr")
    np.testing.assert_array_equal(adata.X.toarray(), matrices[1][0].toarray())
    assert list(adata.var_names) == VOCABULARY
    assert adata.obs_names[3] == "cell 3"
    assert list(adata.obs["sample"][:8]) == ["a"] * 7 + ["b"]
    np.testing.assert_array_equal(adata.obsm["spatial"], matrices[1][1])
    assert adata.obs["label"].isna().sum() == 1
