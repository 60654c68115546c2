"""Corpora on disk: what is written is what is read, and damage never passes."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anndata
import numpy as np
import pytest
from scipy import sparse

from cellplm_jax.data.corpus import is_corpus, open_corpus
from cellplm_jax.data.corpus_writer import PartSample, PartWriter, write_genes, write_index
from cellplm_jax.errors import InputError
from tests.conftest import VOCABULARY, make_counts
from tests.stand_ins.gcs import cloud_storage


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


def test_threads_and_processes_share_a_corpus(made):
    folder, matrices = made
    corpus = pickle.loads(pickle.dumps(open_corpus(folder)))

    def read(number):
        sample, start = number % 4, number % 5
        run = corpus.read(sample, start, start + 2)
        low = 7 * (sample % 2) + start
        return (run.gene == matrices[sample // 2][0][low : low + 2].indices).all()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(200)))


def test_fingerprint(made, tmp_path):
    folder, _ = made
    first = open_corpus(folder).fingerprint()
    assert first == open_corpus(folder).fingerprint()
    make_corpus(tmp_path / "same")
    assert open_corpus(tmp_path / "same").fingerprint() == first
    make_corpus(tmp_path / "other", cells=(8, 29))
    assert open_corpus(tmp_path / "other").fingerprint() != first
    write_index(tmp_path / "same", ["part1", "part0"])
    assert open_corpus(tmp_path / "same").fingerprint() != first


def test_cells_outside_a_sample(made):
    corpus = open_corpus(made[0])
    for start, stop in ((-1, 3), (3, 2), (0, 8)):
        with pytest.raises(IndexError, match="sample 'a'"):
            corpus.read(0, start, stop)


def test_many_shards(tmp_path, monkeypatch):
    """Arrays of several shards and chunks, appended in pieces that fit neither."""
    monkeypatch.setattr("cellplm_jax.data.corpus.SHARD_VALUES", 256)
    monkeypatch.setattr("cellplm_jax.data.corpus_writer.SHARD_VALUES", 256)
    monkeypatch.setattr("cellplm_jax.data.corpus_writer.CHUNK_VALUES", 32)
    matrices = make_corpus(tmp_path / "corpus", cells=(100, 300))
    corpus = open_corpus(tmp_path / "corpus")
    shards = tmp_path / "corpus/parts/part0.zarr/X/data/c"
    assert len(list(shards.iterdir())) == -(-matrices[0][0].nnz // 256)
    run = corpus.read(3, 0, 300)
    np.testing.assert_array_equal(run.gene, matrices[1][0][100:].indices)
    np.testing.assert_array_equal(run.coordinates, matrices[1][1][100:])
    adata = anndata.read_zarr(tmp_path / "corpus" / "parts" / "part1.zarr")
    np.testing.assert_array_equal(adata.X.toarray(), matrices[1][0].toarray())
    np.testing.assert_array_equal(adata.obsm["spatial"], matrices[1][1])
    assert corpus.verify() == []
    # A sound shard of another part in the place of this one.
    shutil.copy(
        tmp_path / "corpus/parts/part0.zarr/X/data/c/1",
        tmp_path / "corpus/parts/part1.zarr/X/data/c/1",
    )
    (problem,) = open_corpus(tmp_path / "corpus").verify()
    assert "part 'part1'" in problem
    assert "shard 1 of X/data" in problem


def test_the_writer_holds_callers_to_what_they_announced(tmp_path):
    write_genes(tmp_path, VOCABULARY)
    with PartWriter(tmp_path, "p", VOCABULARY, np.array([1, 2])) as writer:
        writer.append(np.array([0, 1]), np.array([1, 1]))
        with pytest.raises(ValueError, match="2 values were written, 3 announced"):
            writer.finish([PartSample("a", 2)], dataset_name="p", cell_names=["x", "y"])
    with PartWriter(tmp_path, "p", VOCABULARY, np.array([1, 2])) as writer:
        writer.append(np.array([0, 1, 2, 3]), np.array([1, 1, 1, 1]))
        with pytest.raises(ValueError, match="more than the 3 values announced"):
            writer.finish([PartSample("a", 2)], dataset_name="p", cell_names=["x", "y"])
    with (
        PartWriter(tmp_path, "p", VOCABULARY, np.array([1, 2])) as writer,
        pytest.raises(ValueError, match="'samples': 3"),
    ):
        writer.finish([PartSample("a", 3)], dataset_name="p", cell_names=["x", "y"])
    assert list((tmp_path / "parts").iterdir()) == []


def test_a_part_without_cells(tmp_path):
    write_genes(tmp_path, VOCABULARY)
    with PartWriter(tmp_path, "p", VOCABULARY, np.zeros(0, int)) as writer:
        writer.finish([], dataset_name="p", cell_names=[])
    write_index(tmp_path, ["p"])
    corpus = open_corpus(tmp_path)
    assert corpus.samples == []
    assert corpus.verify() == []
    assert anndata.read_zarr(tmp_path / "parts" / "p.zarr").n_obs == 0


def test_wide_vocabularies_take_four_bytes_a_gene(tmp_path):
    genes = [f"gene {i}" for i in range(70_000)]
    write_genes(tmp_path, genes)
    with PartWriter(tmp_path, "p", genes, np.array([2])) as writer:
        writer.append(np.array([5, 69_999]), np.array([1, 65_535]))
        writer.finish([PartSample("a", 1)], dataset_name="p", cell_names=["x"])
    write_index(tmp_path, ["p"])
    run = open_corpus(tmp_path).read(0, 0, 1)
    assert run.gene.dtype == np.uint32
    assert run.gene.tolist() == [5, 69_999]
    assert run.count.tolist() == [1, 65_535]


# -- damage --------------------------------------------------------------------------------------


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "copy")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0x55
    path.write_bytes(bytes(data))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("array", ["X/data", "X/indices", "X/indptr", "obs/label/codes"])
def test_a_damaged_shard_is_never_read(copy, array, damage):
    damage(next(p for p in (copy / f"parts/part1.zarr/{array}/c").rglob("*") if p.is_file()))
    corpus = open_corpus(copy)
    corpus.read(0, 0, 7)
    if array.startswith("X") or damage is not Path.unlink:
        with pytest.raises(InputError, match=r"part 'part1' .* is damaged .*part1\.json"):
            corpus.read(3, 0, 30)
    (problem,) = corpus.verify()
    assert "part 'part1'" in problem


def test_damaged_coordinates(copy):
    flip(copy / "parts/part0.zarr/obsm/spatial/c/0/0")
    with pytest.raises(InputError, match="part 'part0'"):
        open_corpus(copy).read(1, 0, 30)


def test_an_array_that_is_gone(copy):
    shutil.rmtree(copy / "parts/part0.zarr/X/data")
    with pytest.raises(InputError, match="part 'part0'"):
        open_corpus(copy).read(1, 0, 30)


def test_genes_out_of_range(copy):
    """Sound shards of another vocabulary: every CRC agrees and the indices mean nothing."""
    genes = [f"gene {i}" for i in range(80)]
    write_genes(copy.parent / "wide", genes)
    record = json.loads((copy / "parts/part0.json").read_text())
    sizes = np.diff(open_corpus(copy).indptr(0)), np.diff(open_corpus(copy).indptr(1))
    with PartWriter(copy.parent / "wide", "part0", genes, np.concatenate(sizes)) as writer:
        writer.append(np.full(record["nonzeros"], 79), np.ones(record["nonzeros"]))
        writer.finish(
            [PartSample("a", 7), PartSample("b", 30)], dataset_name="p", cell_names=["x"] * 37
        )
    shutil.rmtree(copy / "parts/part0.zarr/X")
    shutil.copytree(copy.parent / "wide/parts/part0.zarr/X", copy / "parts/part0.zarr/X")
    with pytest.raises(InputError, match="out of range"):
        open_corpus(copy).read(0, 0, 7)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_opening_refuses(copy, tmp_path):
    def refused(match):
        with pytest.raises(InputError, match=match):
            open_corpus(copy)

    with pytest.raises(InputError, match=r"contains no corpus\.json"):
        open_corpus(tmp_path / "nothing")
    assert not is_corpus(tmp_path / "nothing")
    index = (copy / "corpus.json").read_text()
    edit(copy / "corpus.json", format=2)
    refused("format 2; expected format 1")
    edit(copy / "corpus.json", format=1, complete=False)
    refused("unfinished")
    (copy / "corpus.json").write_text(index[:-20])
    refused("is not JSON")
    (copy / "corpus.json").write_text(index)
    genes = (copy / "genes.txt").read_text()
    (copy / "genes.txt").write_text(genes.replace("ENSG00000000003\n", ""))
    refused("39 genes that are not its vocabulary")
    (copy / "genes.txt").write_text(genes)
    record = (copy / "parts/part1.json").read_text()
    edit(copy / "parts/part1.json", cells=36)
    refused(r"part1\.json .* is not the one corpus\.json describes")
    (copy / "parts/part1.json").unlink()
    refused(r"part1\.json .* is missing")
    (copy / "parts/part1.json").write_text(record)
    open_corpus(copy)


def test_parts_that_do_not_belong_together(copy):
    edit(copy / "parts/part1.json", vocabulary="0" * 64)
    with pytest.raises(InputError, match="part 'part1' was made with another vocabulary"):
        write_index(copy, ["part0", "part1"])
    record = json.loads((copy / "parts/part0.json").read_text())
    (copy / "parts/part1.json").write_text(json.dumps({**record, "name": "part1"}))
    with pytest.raises(InputError, match="sample 'a' of data set 'part0' is both in part"):
        write_index(copy, ["part0", "part1"])


def test_a_full_disk(copy, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = sorted(path.relative_to(copy) for path in copy.rglob("*"))
    index = (copy / "corpus.json").read_bytes()
    monkeypatch.setattr("cellplm_jax.data.corpus.tensorstore.open", full)
    with pytest.raises(InputError, match=r"'new' .* the disk is full.*finished parts are kept"):
        PartWriter(copy, "new", VOCABULARY, np.array([1]))
    monkeypatch.undo()
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match=r"index of the corpus .* the disk is full"):
        write_index(copy, ["part0"])
    monkeypatch.undo()
    assert (copy / "corpus.json").read_bytes() == index
    left = sorted(path.relative_to(copy) for path in copy.rglob("*"))
    assert [path for path in left if ".new.partial" not in str(path)] == before


def test_a_file_that_may_not_grow(tmp_path):
    """The operating system itself refuses, in the middle of writing counts."""
    script = tmp_path / "write.py"
    script.write_text(
        "import resource, sys\n"
        "import numpy as np\n"
        "from cellplm_jax.data.corpus_writer import PartSample, PartWriter, write_genes\n"
        "from cellplm_jax.errors import InputError\n"
        "genes = [f'gene {i}' for i in range(60000)]\n"
        "write_genes(sys.argv[1], genes)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        "random = np.random.default_rng(0)\n"
        "try:\n"
        "    with PartWriter(sys.argv[1], 'p', genes, np.full(10, 100_000)) as writer:\n"
        "        writer.append(random.integers(0, 60000, 10**6), random.integers(1, 60000, 10**6))\n"
        "        writer.finish([PartSample('a', 10)], dataset_name='p', cell_names=['x'] * 10)\n"
        "except InputError as error:\n"
        "    print(error)\n"
    )
    ran = subprocess.run(
        [sys.executable, script, tmp_path / "corpus"], capture_output=True, text=True, check=True
    )
    assert "part 'p'" in ran.stdout
    assert "the disk is full" in ran.stdout
    assert list((tmp_path / "corpus/parts").iterdir()) == []


# -- cloud storage -------------------------------------------------------------------------------


def test_reading_from_cloud_storage(made):
    folder, matrices = made
    for bucket in ("one", "two"):  # a second server in the same process is found too
        with cloud_storage() as storage:
            storage.add_folder(folder, bucket, "deep/corpus")
            address = f"gs://{bucket}/deep/corpus"
            assert is_corpus(address)
            assert not is_corpus(f"gs://{bucket}/deep")
            corpus = open_corpus(address)
            assert corpus.fingerprint() == open_corpus(folder).fingerprint()
            run = corpus.read(3, 2, 20)
            np.testing.assert_array_equal(run.gene, matrices[1][0][9:27].indices)
            np.testing.assert_array_equal(run.coordinates, matrices[1][1][9:27])
            assert corpus.verify() == []
            with pytest.raises(InputError, match=r"gs://.* contains no corpus\.json"):
                open_corpus(f"gs://{bucket}/nothing")
            del storage.objects[bucket, "deep/corpus/parts/part1.zarr/X/data/c/0"]
            with pytest.raises(InputError, match="part 'part1' of the corpus 'gs://"):
                open_corpus(address).read(3, 2, 20)
