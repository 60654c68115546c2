"""Hostile changes of an ``.h5ad`` file: each function changes an open copy, with the numbers of a random generator."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import h5py
import numpy as np

GROUPS = (
    "X",
    "obs",
    "var",
    "obsm",
    "uns",
    "layers",
    "X/data",
    "obs/batch",
    "obsm/spatial",
    "var/_index",
)
BIDI = "gene\u202e\u200e"
CONTROL = "gene\x1b]0;owned\x07\x1b[2J\x9b31m\r"


def _remove(file: h5py.File, name: str) -> None:
    if name in file:
        del file[name]


def external_link(file, random, secret):
    name = str(random.choice([*GROUPS, "uns/more", "layers/counts", "raw"]))
    _remove(file, name)
    file[name] = h5py.ExternalLink(str(secret), "/X" if name.startswith(("X", "lay")) else "/obs")


def external_storage(file, random, secret):
    name = str(random.choice(["X", "obsm/spatial", "obs/batch", "var/more", "layers/counts"]))
    _remove(file, name)
    shape = (
        (30, 2) if name == "obsm/spatial" else (30, 43) if name in ("X", "layers/counts") else (30,)
    )
    size = int(np.prod(shape)) * 8
    data = file.create_dataset(name, shape, "f8", external=[(str(secret), 0, size)])
    _encode(data)


def virtual(file, random, secret):
    name = str(random.choice(["X", "obsm/spatial", "layers/counts", "obs/source"]))
    shape = (30, 2) if name == "obsm/spatial" else (30,) if name == "obs/source" else (30, 43)
    layout = h5py.VirtualLayout(shape, "f8")
    layout[:] = h5py.VirtualSource(str(secret), "dense", shape=(30, 43))[
        tuple(slice(0, n) for n in shape) if len(shape) == 2 else (slice(0, 30), 0)
    ]
    _remove(file, name)
    _encode(file.create_virtual_dataset(name, layout))
    if name == "obs/source":
        file["obs"].attrs["column-order"] = np.array(["batch", "source"], h5py.string_dtype())


def cycle(file, random, secret):
    kind = random.integers(3)
    if kind == 0:
        file["uns/loop"] = h5py.SoftLink("/uns/loop")
    elif kind == 1:
        file["uns/loop"] = file["uns"]
    else:
        file["obs/batch/loop"] = file["obs"]


def deep(file, random, secret):
    group = file[str(random.choice(["uns", "obs", "obsm"]))]
    for _ in range(int(random.choice([50, 500, 3000]))):
        group = group.create_group("g")


def many(file, random, secret):
    group = file["layers"] if random.integers(2) else file["uns"]
    for number in range(100_010):
        group[f"n{number}"] = h5py.SoftLink("/X")


def _encode(data):
    data.attrs["encoding-type"], data.attrs["encoding-version"] = "array", "0.2.0"


def unwritten(file, random, secret):
    """Arrays that declare far more than the file stores."""
    size = int(10 ** random.integers(8, 12))
    name = str(random.choice(["X/data", "X/indptr", "X", "obs/_index", "var/_index", "obsm/spatial", "obs/wide",
                              "layers/counts", "obs/batch/codes"]))  # fmt: skip
    attributes = dict(file[name].attrs) if name in file else {}
    if name == "X/data":
        for part, kind in (("data", "f4"), ("indices", "i4")):
            _remove(file, f"X/{part}")
            file["X"].create_dataset(part, (size,), kind, chunks=(2**20,))
        pointers = file["X/indptr"][:].astype(np.int64)
        pointers[-1 if random.integers(2) else 5 :] = size
        _remove(file, "X/indptr")
        file["X/indptr"] = pointers
        return
    _remove(file, name)
    if name.endswith("_index"):
        data = file.create_dataset(name, (size,), h5py.string_dtype(), chunks=(2**16,))
    elif name == "obsm/spatial":
        data = file.create_dataset(name, (30, size // 30), "f8", chunks=(1, 2**16))
    elif name in ("X", "layers/counts"):
        data = file.create_dataset(name, (30, size // 30), "f4", chunks=(1, 2**16))
    else:
        data = file.create_dataset(name, (size,), "i8", chunks=(2**16,))
    _encode(data)
    for key, value in attributes.items():
        data.attrs[key] = value


def deflated(file, random, secret):
    """Zeros that are compressed a thousandfold."""
    name = str(random.choice(["obs/wide", "obsm/spatial", "X/indptr", "obs/batch/codes"]))
    chunk = np.zeros(2**20, np.int64)
    packed = zlib.compress(chunk.tobytes(), 9)
    count = int(random.integers(64, 512))
    attributes = dict(file[name].attrs) if name in file else {}
    _remove(file, name)
    shape, chunks = (2**20 * count,), (2**20,)
    if name == "obsm/spatial":
        shape, chunks = (30, 2**20 * count), (1, 2**20)
    data = file.create_dataset(name, shape, "i8", chunks=chunks, compression="gzip")
    for number in range(count):
        data.id.write_direct_chunk((0,) * (len(shape) - 1) + (number * 2**20,), packed)
    for key, value in attributes.items():
        data.attrs[key] = value
    if name == "obs/wide":
        file["obs"].attrs["column-order"] = np.array(["batch", "wide"], h5py.string_dtype())


def chunk(file, random, secret):
    """One chunk that is decompressed as a whole."""
    name = str(random.choice(["obs/wide", "obsm/spatial"]))
    _remove(file, name)
    rows = (30,) if name == "obs/wide" else (30, 2)
    wide = (2**28,) if name == "obs/wide" else (2**27, 2)
    data = file.create_dataset(
        name, rows, "i8", maxshape=(None,) * len(rows), chunks=wide, compression="gzip"
    )
    _encode(data)
    if name == "obs/wide":
        file["obs"].attrs["column-order"] = np.array(["batch", "wide"], h5py.string_dtype())


def dtype(file, random, secret):
    name = str(
        random.choice(
            ["X/data", "X/indices", "X/indptr", "obs/_index", "obsm/spatial", "var/_index"]
        )
    )
    kinds = [
        "S50000000",
        "V9",
        "c16",
        "f2",
        "bool",
        "u8",
        "i1",
        "f8",
        "object",
        "ref",
        "compound",
        "enum",
    ]
    kind = str(random.choice(kinds))
    shape, attributes = file[name].shape, dict(file[name].attrs)
    _remove(file, name)
    made = {
        "object": h5py.string_dtype(), "ref": h5py.ref_dtype,
        "compound": np.dtype([("a", "f4"), ("b", "S4")]), "enum": h5py.enum_dtype({"A": 0, "B": 1}, "i4"),
    }.get(kind, kind)  # fmt: skip
    data = file.create_dataset(name, shape, made)
    for key, value in attributes.items():
        data.attrs[key] = value


def shape(file, random, secret):
    """A declared shape that is no shape."""
    values = [
        [30, 43, 1], "30 x 43", [-1, 43], [30.5, 43.0], [np.nan, 1.0], [2**62, 2**62], [30], 30, [],
        [43, 30], [31, 43], [30, 42], [0, 0], np.array(["a", "b"], "S1"), [2**40 + 1, 43],
    ]  # fmt: skip
    if random.integers(8) == 0:
        del file["X"].attrs["shape"]
        return
    file["X"].attrs["shape"] = values[int(random.integers(len(values)))]


def dense(file, random, secret):
    """A dense matrix of another number of dimensions or type."""
    values = [np.zeros((30, 43, 2)), np.zeros(30), np.float64(3), np.zeros((30, 43), "S3"), np.zeros((30, 43), "c8"),
              np.zeros((29, 43)), np.zeros((30, 44)), np.zeros((0, 43)), np.full((30, 43), 1e30)]  # fmt: skip
    _remove(file, "X")
    file["X"] = values[int(random.integers(len(values)))]
    _encode(file["X"])


def encoding(file, random, secret):
    name = str(
        random.choice(["X", "obs", "var", "obsm", "uns", "obs/batch", "obs/_index", "obsm/spatial"])
    )
    kind = str(random.choice(["csr_matrix", "csc_matrix", "array", "dataframe", "dict", "categorical", "nothing",
                              "raw", "string-array", "nullable-integer", "null", "rec-array"]))  # fmt: skip
    file[name].attrs["encoding-type"] = kind
    if random.integers(3) == 0:
        file[name].attrs["encoding-version"] = "99.0.0"


def kind(file, random, secret):
    """A group that is an array, or the reverse."""
    name = str(
        random.choice(["obs", "var", "obsm", "uns", "layers", "X", "obs/batch", "X/data", "raw"])
    )
    is_group = name in file and isinstance(file[name], h5py.Group)
    _remove(file, name)
    if is_group or name == "raw":
        file[name] = np.arange(30)
    else:
        file.create_group(name)


def indices(file, random, secret):
    name = str(random.choice(["X/indices", "X/indptr", "X/data"]))
    values = file[name][:]
    changes = [
        lambda: values.astype(float) + 0.5,
        lambda: np.where(np.arange(len(values)) == 3, np.nan, values.astype(float)),
        lambda: np.stack([values, values]),
        lambda: values[: len(values) // 2],
        lambda: values[::-1].copy(),
        lambda: values.astype(np.int64) - 2**40,
        lambda: values.astype(np.uint64) + np.uint64(2**63),
        lambda: np.where(np.arange(len(values)) == 2, 43, values),
        lambda: np.concatenate([values, values]),
        lambda: values[:0],
        lambda: np.array(5),
        lambda: values.astype("S5"),
    ]
    changed = changes[int(random.integers(len(changes)))]()
    _remove(file, name)
    file[name] = changed


def names(file, random, secret):
    name = str(random.choice(["obs/_index", "var/_index"]))
    values = [v.decode() if isinstance(v, bytes) else str(v) for v in file[name][:]]
    bad = [
        "g" * 50_000_000, CONTROL, BIDI, "two\nlines\nTraceback (most recent call last)", "", "x" * 9_000,
        "a/b", "'; rm -rf /", "{0.__class__}", "%s%n", "[bold]red[/bold][/x]",
    ]  # fmt: skip
    text = bad[int(random.integers(len(bad)))]
    attributes = dict(file[name].attrs)
    several = 1 if len(text) > 10_000 else int(random.choice([1, 5, len(values)]))
    for number in range(several):
        values[number] = text
    _remove(file, name)
    file.create_dataset(name, data=np.array(values, object), dtype=h5py.string_dtype())
    for key, value in attributes.items():
        file[name].attrs[key] = value


def raw_bytes(file, random, secret):
    """Names that are no UTF-8."""
    name = str(random.choice(["obs/_index", "var/_index"]))
    attributes, count = dict(file[name].attrs), len(file[name])
    _remove(file, name)
    file.create_dataset(name, data=np.array([b"\xff\xfe\x80%d" % n for n in range(count)], object),
                        dtype=h5py.string_dtype())  # fmt: skip
    for key, value in attributes.items():
        file[name].attrs[key] = value


def attributes(file, random, secret):
    group = file[str(random.choice(["obs", "var"]))]
    values = [
        "no such",
        CONTROL,
        5,
        np.arange(3),
        np.array(["batch"] * 2000, h5py.string_dtype()),
        "",
        np.nan,
    ]
    key = str(random.choice(["_index", "column-order"]))
    if random.integers(5) == 0:
        del group.attrs[key]
    else:
        group.attrs[key] = values[int(random.integers(len(values)))]


def categories(file, random, secret):
    codes = file["obs/batch/codes"]
    change = int(random.integers(5))
    if change == 0:
        codes[3] = 100
    elif change == 1:
        codes[3] = -50
    elif change == 2:
        _remove(file, "obs/batch/categories")
    elif change == 3:
        _remove(file, "obs/batch/codes")
        file["obs/batch/codes"] = np.zeros((30, 2), np.int8)
    else:
        _remove(file, "obs/batch/codes")
        file["obs/batch/codes"] = np.zeros(7, np.int8)


def long_row(file, random, secret):
    """One row with millions of entries of the same gene."""
    count = int(random.integers(1_000_000, 4_000_000))
    pointers = np.zeros(31, np.int64)
    pointers[random.integers(1, 31) :] = count
    for name, value in (("data", np.ones(count, np.float32)), ("indices", np.zeros(count, np.int32)),
                        ("indptr", pointers)):  # fmt: skip
        _remove(file, f"X/{name}")
        file["X"].create_dataset(name, data=value, compression="gzip" if name != "indptr" else None)


def plugin(file, random, secret):
    """A filter that is not installed."""
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((30, 2))
    try:
        plist.set_filter(32001 + int(random.integers(20)), h5py.h5z.FLAG_OPTIONAL)
    except ValueError:
        plist.set_deflate(4)
    space = h5py.h5s.create_simple((30, 2))
    _remove(file, "obsm/spatial")
    h5py.h5d.create(file["obsm"].id, b"spatial", h5py.h5t.NATIVE_DOUBLE, space, plist)
    _encode(file["obsm/spatial"])


ATTACKS: dict[str, Callable] = {
    function.__name__.replace("_", " "): function
    for function in (
        external_link, external_storage, virtual, cycle, deep, many, unwritten, deflated, chunk, dtype, shape, dense,
        encoding, kind, indices, names, raw_bytes, attributes, categories, long_row, plugin,
    )
}  # fmt: skip
"""Attacks by name; ``(file, random, secret)``, where ``secret`` is another file of the user."""
