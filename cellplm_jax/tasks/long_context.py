"""Contexts larger than device memory: prefetch, arrays that spill to disk, and encoding in several passes."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import numpy as np

from cellplm_jax.config import ModelConfig
from cellplm_jax.errors import InputError, explain
from cellplm_jax.model.cellplm import CellPLM
from cellplm_jax.model.encoder import context_centre
from cellplm_jax.model.long_context import FLOW_ROUNDS, chunk_layer, chunk_sums

Item = TypeVar("Item")

STREAM_CELLS = 32_768
"""Contexts with more cells are encoded in passes over chunks."""

STREAM_CHUNK = 8192
"""Number of cells per chunk."""

WORTH_SAYING = 0.15
"""Fraction of time spent waiting for data above which a message is shown."""

LOCAL_KINDS = ("mlp", "residual_mlp", "none")
"""Encoders in which cells do not attend to each other."""


class Prefetcher(Generic[Item]):
    """Prefetch items in a thread.

    Args:
        items: Generated in order, in the thread; an exception is raised at the position of its item.
        depth: Maximum number of prefetched items.

    Attributes:
        waited: Seconds spent waiting for items, except for the first.
    """

    def __init__(self, items: Iterable[Item], depth: int = 2):
        self._items = iter(items)
        self._depth = depth
        self.waited = 0.0

    def __iter__(self) -> Iterator[Item]:
        end = object()
        first = True
        # One thread: the items come from one iterator, and HDF5 reads under a global lock.
        with ThreadPoolExecutor(1, thread_name_prefix="reader") as pool:
            ready = deque(pool.submit(next, self._items, end) for _ in range(self._depth))
            try:
                while True:
                    started = time.perf_counter()
                    item = ready.popleft().result()
                    if not first:
                        # Without the first item, which nothing could overlap.
                        self.waited += time.perf_counter() - started
                    first = False
                    if item is end:
                        return
                    ready.append(pool.submit(next, self._items, end))
                    yield item  # type: ignore[misc]
            finally:
                for waiting in ready:
                    waiting.cancel()


@dataclass
class IOWait:
    """Time that work spent waiting for its data.

    Attributes:
        seconds: Waiting time.
        total: Total time of the work, including waiting.
    """

    seconds: float = 0.0
    total: float = 0.0

    def add(self, seconds: float, total: float) -> None:
        """Add the times of some work."""
        self.seconds = self.seconds + seconds
        self.total = self.total + total

    @property
    def share(self) -> float:
        """Fraction of the time, 0 if there is none."""
        return self.seconds / self.total if self.total > 0 else 0.0

    def messages(self) -> list[str]:
        """Return a message if the fraction is large enough to matter, else nothing."""
        if self.share <= WORTH_SAYING or self.total < 10:
            return []
        return [
            f"{self.share:.0%} of {self.total:.0f} s was spent waiting for data: uncompressed files are read faster"
            " (adata.write_h5ad(path), its default), and so are files on a local disk."
        ]


def overlap(results: Iterable[Item], devices: int = 1) -> Iterator[Item]:
    """Yield each result after the next one has been started, to overlap device computation with copies to the host.

    Args:
        results: Started on request.
        devices: Number of devices that compute them round-robin: a result waits until its device has the next one.
    """
    behind: deque[Item] = deque()
    for result in results:
        behind.append(result)
        if len(behind) == devices + 1:
            yield behind.popleft()
    yield from behind


def host_array(shape: tuple[int, ...]) -> np.ndarray:
    """Return float32 zeros in memory, or in a temporary file if they would use half of the free memory.

    The file is unnamed and deleted with the array; ``TMPDIR`` selects its disk.

    Args:
        shape: Shape of the array.

    Raises:
        InputError: Neither memory nor disk has enough space.
    """
    size = int(np.prod(shape)) * 4
    # Half: the rest is for the chunks, the embedding and the file cache.
    if 2 * size <= available_memory():
        return np.zeros(shape, np.float32)
    directory = tempfile.gettempdir()
    free = shutil.disk_usage(directory).free
    msg = explain(
        f"{size / 1e9:.1f} GB of activations, and {free / 1e9:.1f} GB free in '{directory}'",
        "space for them in memory or on disk",
        "Point TMPDIR at a larger disk, or pass cells_per_context=... (--cells-per-context)",
    )
    if size > free:
        raise InputError(msg)
    with tempfile.TemporaryFile(dir=directory) as file:
        if hasattr(os, "posix_fallocate"):
            # Reserve the space now: a disk that fills up later ends the process.
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                raise InputError(msg) from error
        return np.memmap(file, np.float32, "w+", shape=shape)


def available_memory() -> int:
    """Return the number of bytes available without swapping and without exceeding a container's limit."""
    return min(_free_memory(), _left_in_container())


def _left_in_container() -> int:
    """Return the memory left in this process's control group (version 2, used by containers)."""
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        return int(limit) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no control group, or no limit
        return 2**62


def _free_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (ValueError, OSError, AttributeError):
        return 4 * 2**30


class StreamedEncoder:
    """Encoder and latent over contexts of any size, equal to :attr:`cellplm_jax.Pretrained.encode`.

    Args:
        config: The architecture; see :meth:`supports`.
        at_once: ``(params, hidden, cell_mask) -> embedding`` of complete contexts; also used for chunks if cells do not
            attend to each other.
    """

    def __init__(self, config: ModelConfig, at_once: Callable[..., jax.Array]):
        self.config = config
        self._at_once = at_once
        model = CellPLM(config)
        self._sums = jax.jit(partial(chunk_sums, config=config))
        self._layer = jax.jit(partial(chunk_layer, config=config))
        self._conclude = jax.jit(
            lambda params, hidden: model.apply(
                {"params": params},
                hidden,
                method=CellPLM.embed_encoded,
            )
        )

    @staticmethod
    def supports(config: ModelConfig) -> bool:
        """Return whether contexts of this architecture can be encoded in chunks."""
        # With a projection, a chunk that is encoded by itself would be centred at the chunk.
        local = LOCAL_KINDS if config.trunk == "none" else ()
        return config.encoder.kind in ("flow", *local)

    def __call__(
        self,
        params: Any,
        hidden: np.ndarray,
        embedding: np.ndarray,
        *,
        others: Sequence[Any] = (),
        chunk: int = STREAM_CHUNK,
        on_progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Encode one context.

        Args:
            params: The weights used for embedding, on the device.
            hidden: float32 [cells, hidden] from the embedder; overwritten with the last layer's output.
            embedding: float32 [cells, latent]; overwritten with the result.
            others: The same weights on further devices: chunks are assigned round-robin.
            chunk: Number of cells per chunk.
            on_progress: Called with a progress text per chunk.
        """
        flow = self.config.encoder.kind == "flow"
        layers = self.config.encoder.layers if flow else 0
        copies = (params, *others)
        if self.config.trunk == "projection":
            self._centre(params["centre"]["context_mean"], hidden, chunk)
        for number in range(layers):
            weights = [copy["encoder"][f"layer_{number}"] for copy in copies]
            known: tuple[np.ndarray, ...] = ()
            for turn in range(len(FLOW_ROUNDS)):
                title = f"layer {number + 1} of {layers}, pass {turn + 1} of 4"
                total = None
                for _, found in self._chunks(
                    hidden,
                    chunk,
                    weights,
                    lambda w, h, mask, k=known: self._sums(w, h, mask, k),
                ):
                    # Sum chunks in float64, so that their number does not matter.
                    found = [np.asarray(value, np.float64) for value in found]
                    total = found if total is None else list(map(np.add, total, found))
                    on_progress(title)
                known += tuple(np.asarray(value, np.float32) for value in total or ())
            for cells, found in self._chunks(
                hidden,
                chunk,
                weights,
                lambda w, h, mask, k=known: self._layer(w, h, mask, k),
            ):
                # In place: the sums of the layer are complete, so its input is not needed again.
                hidden[cells] = np.asarray(found)[0, : cells.stop - cells.start]
                on_progress(f"layer {number + 1} of {layers}, pass 4 of 4")

        def conclude(params, hidden, mask):
            return self._conclude(params, hidden) if flow else self._at_once(params, hidden, mask)

        for cells, found in self._chunks(hidden, chunk, copies, conclude):
            embedding[cells] = np.asarray(found)[0, : cells.stop - cells.start]
            on_progress("latent")

    def _centre(self, prior: Any, hidden: np.ndarray, chunk: int) -> None:
        """Centre a context in place, as :class:`cellplm_jax.model.encoder.Centre` does."""
        starts = range(0, len(hidden), chunk)
        # In chunks: `hidden` may be a file larger than memory.
        total = sum(hidden[start : start + chunk].sum(axis=0, dtype=np.float64) for start in starts)
        weight = self.config.centre_cells
        centre = context_centre(total, len(hidden), np.asarray(prior, np.float64), weight)
        for start in starts:
            hidden[start : start + chunk] -= centre.astype(np.float32)

    @staticmethod
    def _chunks(
        hidden: np.ndarray,
        chunk: int,
        weights: Sequence[Any],
        work: Callable,
    ) -> Iterator[tuple[slice, Any]]:
        """Yield ``work(weights, chunk, mask)`` of every chunk, on the devices of the weights round-robin."""

        def started():
            for number, start in enumerate(range(0, len(hidden), chunk)):
                cells = slice(start, min(start + chunk, len(hidden)))
                padded = np.zeros((1, chunk, hidden.shape[1]), np.float32)
                padded[0, : cells.stop - start] = hidden[cells]
                mask = np.arange(chunk)[None, :] < cells.stop - start
                yield cells, work(weights[number % len(weights)], padded, mask)

        return overlap(started(), len(weights))
