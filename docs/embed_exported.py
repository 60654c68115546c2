"""Embed an .h5ad with a file that `cellplm export` wrote; needs jax, flatbuffers and anndata, not cellplm-jax.

python embed_exported.py MODEL.cellplm IN.h5ad OUT.h5ad     (raw counts in X, Ensembl ids as var_names)
"""

import sys
import zipfile

import anndata
import jax
import numpy as np
from scipy import sparse

model, path, out = sys.argv[1:]
with zipfile.ZipFile(model) as archive:
    program = jax.export.deserialize(bytearray(archive.read("program.bin")))
    genes = archive.read("genes.txt").decode().split()

adata = anndata.read_h5ad(path)
known = adata[:, adata.var_names.isin(genes)]
if known.n_vars == 0:
    sys.exit(f"None of the names, such as {adata.var_names[0]}, is an Ensembl id of the model.")
counts = sparse.csr_matrix(known.X, dtype=np.float32)
gene = np.array([genes.index(name) for name in known.var_names], np.int32)[counts.indices]
nowhere = np.full((adata.n_obs, 2), np.nan, np.float32)
embedding = program.call(counts.indptr.astype(np.int32), gene, counts.data, nowhere)
adata.obsm["X_cellplm"] = np.asarray(embedding)
adata.write_h5ad(out)
