"""The :class:`Pretrained` model returned by ``cellplm_jax.load``."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from cellplm_jax.batch import CellBatch, Reconstruction
from cellplm_jax.compilation_cache import keep_compiled
from cellplm_jax.config import PRECISIONS, MeshConfig, ModelConfig, to_dict
from cellplm_jax.display import Displayed, shown
from cellplm_jax.errors import CheckpointError, InputError, nearest, require
from cellplm_jax.interop import hub
from cellplm_jax.interop.model_card import model_card
from cellplm_jax.model.cellplm import CellPLM, attention_rows, in_precision, init_params
from cellplm_jax.model.embedder import transform_stored
from cellplm_jax.platforms import check_platforms
from cellplm_jax.tasks.long_context import StreamedEncoder
from cellplm_jax.train.checkpoint import (
    ModelFiles,
    WeightFormat,
    read_root,
    restore_item,
    save_model,
)
from cellplm_jax.train.covariates import grow_rows
from cellplm_jax.train.sharding import MeshFunction, joined_copies, make_mesh, over_cells

# Parts of the parameter tree used for embedding.
EMBEDDING_PARTS = ("embedder", "centre", "encoder", "pre_latent_norm", "latent")


@dataclass(eq=False, repr=False)
class Pretrained(Displayed):
    """A model with its weights, gene vocabulary and card.

    Attributes:
        config: The architecture.
        params: Nested dictionary of numpy arrays.
        genes: Gene vocabulary, Ensembl ids, in the order of the gene embedding's rows.
        card: Origin and training data of the model.
        source: Source of the model; for a model from the hub with the resolved commit.
        step: Training step of the weights; 0 for a converted or untrained model.
        precision: Precision of the matrix products of an embedding: ``"float32"``, or ``"bfloat16"``, twice as fast or
            more on hardware that supports it. Sums are float32. The cosine to exact embeddings is above .9999, except
            for cells whose two most probable mixture components tie: half a percent, near .999.
        stored_product: Whether the embedder multiplies sparse counts on the cores of the host, instead of
            dense ones on the device. None: if the device is a CPU and Numba is installed (extra ``cpu``),
            three to four and a half times as fast (``benchmarks/speed/embedder.md``).
        devices: Devices of this process that embed together: the embedder's chunks are assigned round-robin, and the
            encoder shards the cells of a context over them. None: all accelerators of this process, or JAX's default
            device if it was set; on the CPU the first device only, because all CPU devices share the same cores.

    Raises:
        InputError: The precision is unknown, or ``devices`` is empty, repeated or belongs to another process.
        MissingDependencyError: ``stored_product`` is True and Numba is not installed; raised by the first embedding.
    """

    config: ModelConfig
    params: dict[str, Any]
    genes: list[str]
    card: dict[str, Any] = field(default_factory=dict)
    source: str = "memory"
    step: int = 0
    precision: str = "float32"
    stored_product: bool | None = None
    devices: Sequence[jax.Device] | None = None

    def __post_init__(self):
        """Check precision and devices."""
        if self.precision not in PRECISIONS:
            raise InputError(
                f"precision = '{self.precision}'",
                f"one of {', '.join(PRECISIONS)}",
                "Use one of them",
            )
        if self.devices is not None:
            self.devices = _own_devices(self.devices)

    @property
    def id(self) -> str:
        """Name, step, task of a fine-tuned model, and start of :attr:`digest`; recorded with each embedding."""
        # Without the revision: the digest identifies the weights already.
        source = self.source.partition("@")[0] if hub.is_hub_address(self.source) else self.source
        name = self.card.get("name") or Path(source).name
        task = f"-{self.card['task']}" if self.card.get("kind") == "fine-tuned" else ""
        return f"{name}@{self.step}{task}+{self.digest[:8]}"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of architecture, genes and weights, in hexadecimal; the same for both formats of a file."""
        facts = json.dumps([to_dict(self.config), self.genes], sort_keys=True, default=str)
        digest = hashlib.sha256(facts.encode())
        for path, leaf in sorted(flatten_dict(self.params).items()):
            array = np.ascontiguousarray(leaf)
            # The type and shape too: the same bytes in another shape are another model.
            digest.update(f"{'/'.join(path)} {array.dtype} {array.shape}".encode())
            digest.update(array.data if array.ndim else array.tobytes())
        return digest.hexdigest()

    @property
    def parameters(self) -> int:
        """Number of scalar parameters."""
        return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(self.params))

    def _display(self) -> dict[str, Any]:
        return {
            "model": self.id,
            "parameters": self.parameters,
            "genes": len(self.genes),
            "latent": self.config.latent_size,
            "trained_on": trained_on(self.card),
            "kind": self.card.get("kind"),
            "species": self.card.get("species"),
            "precision": self.precision,
            "source": self.source,
        }

    @classmethod
    def untrained(cls, config: ModelConfig, genes: list[str], *, seed: int = 0) -> Pretrained:
        """Return a model with random weights, as a baseline or a start.

        Args:
            config: The architecture.
            genes: Gene vocabulary.
            seed: Seed of the initialisation.
        """
        # One program; otherwise each operation of the initialisation is compiled by itself.
        params = jax.jit(lambda: init_params(config, jax.random.key(seed)))()
        card = {"kind": "untrained", "seed": seed}
        return cls(
            config,
            jax.tree.map(np.asarray, params),
            list(genes),
            card,
            "untrained",
        )

    def save(
        self,
        directory: str | os.PathLike,
        *,
        format: WeightFormat = "orbax",
        half: bool = False,
    ) -> None:
        """Write the model to a self-contained checkpoint directory.

        Args:
            directory: A new or empty directory.
            format: ``"orbax"``, the format of training; ``"safetensors"``: the weights as one file
                ``model.safetensors``, for exchange (extra ``hub``). :func:`load` opens both.
            half: Store the weights as float16: half the size, three decimal digits. They are loaded as float32.

        Raises:
            CheckpointError: The directory is not empty, or the format is unknown.
            MissingDependencyError: The format is ``"safetensors"``, which is not installed.
        """
        files = ModelFiles(self.config, self.genes, self.card)
        params = self.params
        if half:
            params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float16), params)
        save_model(directory, files, params, step=self.step, format=format)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        revision: str | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        half: bool = False,
    ) -> hub.HubCommit:
        """Publish the model on the Hugging Face Hub in one commit, with a generated model card.

        Missing information is stated as unknown on the page; fill in ``card["data"]``, ``card["licence"]``,
        ``card["intended_use"]`` and ``card["limits"]`` first.

        Args:
            repo_id: ``"organisation/name"``; created if it does not exist.
            private: Make it private; an existing public repository raises an error.
            revision: Branch of the commit, created if it does not exist; None: the main branch.
            token: A token with write permission; None: the token of the local login.
            commit_message: Commit message.
            half: Publish the weights as float16.

        Returns:
            The commit; its ``address`` is a source for :func:`load` that is pinned to these weights.

        Raises:
            InputError: The name ``repo_id`` is invalid, or the repository is public but ``private`` is set.
            CheckpointError: The hub rejected the commit, or cannot be reached.
            MissingDependencyError: The extra ``hub`` is not installed.
        """

        def write(folder: Path) -> None:
            self.save(folder, format="safetensors", half=half)

        return publish(
            self,
            write,
            repo_id,
            private=private,
            revision=revision,
            token=token,
            message=commit_message,
        )

    @cached_property
    def embeds_on(self) -> tuple[jax.Device | None, ...]:
        """Devices used for embedding; a single None: JAX's default device."""
        return working_devices(self.devices)

    @cached_property
    def weight_copies(self) -> tuple[dict[str, Any], ...]:
        """The weights used for embedding, on each of the embedding devices."""
        # Decoder and head are not copied: an embedding does not use them, and they would take memory on each device.
        needed = {name: self.params[name] for name in EMBEDDING_PARTS if name in self.params}
        return tuple(
            in_precision(jax.device_put(needed, device), self.precision)
            for device in self.embeds_on
        )

    @property
    def device_params(self) -> dict[str, Any]:
        """The weights used for embedding, on the first of the embedding devices."""
        return self.weight_copies[0]

    @cached_property
    def multiplies_stored(self) -> bool:
        """Whether the embedder multiplies sparse counts, see ``stored_product``."""
        if self.stored_product is not None:
            return self.stored_product
        platform = self.devices[0].platform if self.devices else jax.default_backend()
        return platform == "cpu" and numba_works()

    @cached_property
    def express(self) -> Callable[..., jax.Array]:
        """Jitted ``(params, batch, gene_sum=None) -> hidden [samples, cells, hidden]``, each cell separately."""
        model = CellPLM(self.config)
        return jax.jit(
            lambda params, batch, gene_sum=None: model.apply(
                {"params": params},
                batch,
                gene_sum=gene_sum,
                method=CellPLM.embed_expression,
            )
        )

    @cached_property
    def embed_expression(self) -> Callable[[Any, CellBatch], jax.Array]:
        """``(params, batch) -> hidden [samples, cells, hidden]``; gene embeddings are summed by host or device."""
        if not self.multiplies_stored:
            return self.express
        require("numba", "cpu", "Multiplying sparse counts")
        from cellplm_jax.kernels.sparse_numba import stored_product

        def embed_expression(params, batch):
            table = np.asarray(params["embedder"]["gene_embedding"])
            stored = map(np.asarray, (batch.indptr, batch.gene, batch.count))
            sums = [
                stored_product(indptr, gene, transform_stored(indptr, count, self.config), table)
                for indptr, gene, count in zip(*stored, strict=True)
            ]
            return self.express(params, batch, np.stack(sums))

        return embed_expression

    @cached_property
    def encode(self) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
        """Jitted ``(params, hidden, cell_mask) -> embedding [samples, cells, latent]`` of complete contexts."""
        return jax.jit(self._encode)

    def _encode(self, params: Any, hidden: jax.Array, cell_mask: jax.Array) -> jax.Array:
        model = CellPLM(self.config)
        variables = {"params": params}
        hidden = model.apply(variables, hidden, cell_mask, method=CellPLM.encode)
        return model.apply(variables, hidden, method=CellPLM.infer).mean

    @cached_property
    def _encode_together(self) -> Callable[[np.ndarray, np.ndarray], jax.Array]:
        """The same as :meth:`encode`, with the cells sharded over all embedding devices."""
        devices: Any = self.embeds_on
        mesh = make_mesh(MeshConfig(cells=len(devices)), devices)
        run = MeshFunction(self._encode, mesh)
        params = joined_copies(mesh, self.weight_copies)
        shared = over_cells(mesh)

        def encode(hidden: np.ndarray, cell_mask: np.ndarray) -> jax.Array:
            return run(params, *jax.device_put((hidden, cell_mask), shared))

        return encode

    def encode_context(self, hidden: np.ndarray, cell_mask: np.ndarray) -> jax.Array:
        """Encode contexts: on all embedding devices if their number divides the cells, else on the first.

        With flow attention the devices only communicate sums over cells.

        Args:
            hidden: float32 [samples, cells, hidden] from the embedder.
            cell_mask: bool [samples, cells].

        Returns:
            float32 [samples, cells, latent].
        """
        number = len(self.embeds_on)
        if number > 1 and hidden.shape[1] % number == 0:
            return self._encode_together(hidden, cell_mask)
        return self.encode(
            self.device_params, *jax.device_put((hidden, cell_mask), self.embeds_on[0])
        )

    @cached_property
    def encode_streamed(self) -> StreamedEncoder:
        """The same as :meth:`encode` for contexts of any size, in passes over chunks."""
        return StreamedEncoder(self.config, self.encode)

    @cached_property
    def attend(self) -> Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]:
        """Jitted ``(params, hidden, cell_mask, rows) -> attention weights [layers, heads, rows, cells]``."""
        return jax.jit(
            lambda params, hidden, cell_mask, rows: attention_rows(
                params,
                hidden,
                cell_mask,
                rows,
                self.config,
            )
        )

    @cached_property
    def output_params(self) -> dict[str, Any]:
        """The weights of the decoder or task head, on the first of the embedding devices."""
        needed = {k: v for k, v in self.params.items() if k in ("decoder", "head")}
        return jax.device_put(needed, self.embeds_on[0])

    @cached_property
    def predict(self) -> Callable[[Any, jax.Array, jax.Array, jax.Array | None], jax.Array]:
        """Jitted ``(params, z, cell_mask, condition) -> prediction`` of the task head."""
        model = CellPLM(self.config)
        return jax.jit(
            lambda params, z, cell_mask, condition: model.apply(
                {"params": params},
                z,
                cell_mask,
                condition=condition,
                method=CellPLM.predict,
            )
        )

    @cached_property
    def decode(self) -> Callable[[Any, jax.Array, CellBatch], Reconstruction]:
        """Jitted ``(params, z, batch) -> reconstruction``; only the covariates of the batch are used."""
        model = CellPLM(self.config)
        return jax.jit(
            lambda params, z, batch: model.apply(
                {"params": params},
                z,
                batch,
                method=CellPLM.decode,
            )
        )


def trained_on(card: Mapping[str, Any]) -> str | None:
    """Return the training data of a model card as a phrase; None if the card does not state them."""
    data = card.get("training_data")
    cells = card.get("training_cells")
    if isinstance(data, list) and cells:
        return f"{cells:,} cells of {len(data)} data sets"
    stated = data or card.get("data")
    return None if stated is None else shown(stated)


def working_devices(devices: Sequence[jax.Device] | None) -> tuple[jax.Device | None, ...]:
    """Return the devices that work together; None, alone: JAX's default device.

    Args:
        devices: Those that were chosen; None: all accelerators of this process, or JAX's default device if that was
            set; on the CPU the default device alone.
    """
    if devices is not None:
        return tuple(devices)
    local = jax.local_devices()
    # Who sets a default device reserves the others, so they are not used.
    if len(local) == 1 or local[0].platform == "cpu" or jax.config.jax_default_device is not None:
        return (None,)
    return tuple(local)


def _own_devices(devices: Sequence[jax.Device]) -> tuple[jax.Device, ...]:
    """Validate the devices given by the user."""
    devices = tuple(devices)
    index = jax.process_index()
    if not devices or len(set(devices)) < len(devices):
        found = "no devices" if not devices else "repeated devices"
    elif any(device.process_index != index for device in devices):
        found = f"devices of other processes than this one, which is {index}"
    else:
        return devices
    raise InputError(
        f"{found} were given",
        "different devices of this process",
        "Choose among jax.local_devices(), or leave devices out",
    )


@cache
def numba_works() -> bool:
    """Return whether Numba is installed, complete, and compatible with the installed NumPy."""
    try:
        import cellplm_jax.kernels.sparse_numba  # noqa: F401
    except (ImportError, OSError):
        return False
    return True


BUNDLED = ("small",)
"""Models included in the package, by name."""


def bundled_path(name: str) -> Path:
    """Return the path of a model included in the package."""
    return Path(str(resources.files("cellplm_jax") / "resources" / "models" / name))


def publish(
    model: Pretrained,
    write: Callable[[Path], None],
    repo_id: str,
    *,
    estimator: str | None = None,
    **options: Any,
) -> hub.HubCommit:
    """Write a model or a fitted estimator to a temporary folder, add its model card, and publish the folder.

    Args:
        model: Model of the card.
        write: Writes the folder, in the format ``"safetensors"``.
        repo_id: ``"organisation/name"``.
        estimator: Name of the estimator's class; None: a plain model.
        **options: See :func:`cellplm_jax.interop.hub.push`.
    """
    require("huggingface_hub", hub.EXTRA, "Publishing a model on the Hugging Face Hub")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write(folder)
        text = model_card(
            model.config,
            model.genes,
            model.card,
            parameters=model.parameters,
            step=model.step,
            repository=repo_id,
            estimator=estimator,
        )
        (folder / hub.README_FILE).write_text(text, encoding="utf-8")
        return hub.push(folder, repo_id, **options)


def resolve_source(
    source: str | os.PathLike,
    *,
    extra_files: Iterable[str] = (),
) -> tuple[str, str]:
    """Resolve a model source; the only function that handles all kinds of sources.

    Args:
        source: See :func:`load`.
        extra_files: See :func:`cellplm_jax.interop.hub.fetch`.

    Returns:
        The directory or ``gs://`` address, and the name to record: the address with its commit for the hub,
        else the directory.

    Raises:
        InputError: The kind of source is not supported.
        CheckpointError: It cannot be downloaded.
    """
    text = os.fspath(source)
    if hub.is_hub_address(text):
        directory, address = hub.fetch(text, extra_files=extra_files)
        return str(directory), address
    if "://" in text and not text.startswith("gs://"):
        raise InputError(
            f"'{text}' is an unsupported remote source",
            "a local directory, a gs:// or an hf:// address",
            "Download it first",
        )
    # A folder of that name was made by the user, so it comes before the bundled model.
    if text in BUNDLED and not Path(text).exists():
        text = str(bundled_path(text))
    if text.startswith("~"):
        text = os.path.expanduser(text)
    return text, text


def load(
    source: str | os.PathLike,
    *,
    step: int | None = None,
    precision: str = "float32",
    devices: Sequence[jax.Device] | None = None,
) -> Pretrained:
    """Load a trained model.

    Args:
        source: ``"small"``, the bundled model (a folder with that name has priority); a checkpoint
            directory (from ``cellplm convert`` or ``Pretrained.save``) or a work directory, local or at a
            ``gs://`` address; ``"hf://organisation/name"`` on the Hugging Face Hub (extra ``hub``), optionally followed
            by ``@revision`` and ``/folder``. It is downloaded once and stored in the hub's cache; the
            resolved commit is in ``source`` and ``card["loaded_from"]`` of the model, and in
            ``uns["cellplm"]["model_source"]`` of its embeddings.
        step: Step to load; None: the best by held-out likelihood, else the latest.
        precision: ``"float32"`` or ``"bfloat16"``, see :class:`Pretrained`.
        devices: Devices of this process that embed together, see :class:`Pretrained`; None: all accelerators.

    Returns:
        A :class:`Pretrained`; its arrays are numpy, on no device yet.

    Raises:
        CheckpointError: It is not a checkpoint, is damaged, or config and weights do not match.
        InputError: The kind of source is not supported.
        MissingDependencyError: The source requires the extra ``hub`` or ``gcp``, which is not installed.
    """
    where, name = resolve_source(source)
    if "://" not in where and not Path(where).is_dir():
        raise CheckpointError(
            f"there is no directory '{where}'",
            f"a checkpoint directory, a gs:// or hf:// address, or a bundled model: {', '.join(BUNDLED)}",
            nearest(
                where, BUNDLED, "Check the path; 'cellplm convert' opens published checkpoints"
            ),
        )
    return load_located(where, name, step=step, precision=precision, devices=devices)


def load_located(
    directory: str,
    name: str,
    *,
    step: int | None = None,
    precision: str = "float32",
    devices: Sequence[jax.Device] | None = None,
) -> Pretrained:
    """Load a model from a resolved source.

    Args:
        directory: From :func:`resolve_source`.
        name: From :func:`resolve_source`; used in messages and recorded in the model.
        step: See :func:`load`.
        precision: See :func:`load`.
        devices: See :func:`load`.

    Raises:
        CheckpointError: See :func:`load`.
    """
    keep_compiled()
    check_platforms()
    files = read_root(directory)
    params, found_step = restore_item(directory, step=step)
    # Half-precision files are widened: the model computes and is fine-tuned in float32.
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
    # A step that was saved before data was added has fewer covariate rows than the run has now.
    shapes = jax.eval_shape(lambda: init_params(files.model, jax.random.key(0)))
    # A different structure is reported by `check_params`, which names the parameter.
    if jax.tree.structure(shapes) == jax.tree.structure(params):
        params = grow_rows(params, shapes)
    check_params(files.model, params, name)
    return Pretrained(
        config=files.model,
        params=params,
        genes=files.genes,
        card={**files.card, "loaded_from": name} if hub.is_hub_address(name) else files.card,
        source=name,
        step=found_step,
        precision=precision,
        devices=devices,
    )


def as_pretrained(model: Pretrained | str | os.PathLike) -> Pretrained:
    """Return a model unchanged, or load it from a source for :func:`load`."""
    return model if isinstance(model, Pretrained) else load(model)


def check_params(config: ModelConfig, params: dict[str, Any], where: str) -> None:
    """Check that weights have exactly the parameters and shapes of a configuration.

    Args:
        config: The architecture.
        params: The ``"params"`` collection.
        where: Name of the checkpoint, for the message.

    Raises:
        CheckpointError: Names the first parameter that is missing, unknown or has another shape.
    """
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    expected = {"/".join(path): leaf.shape for path, leaf in flatten_dict(shapes).items()}
    found = {"/".join(path): np.shape(leaf) for path, leaf in flatten_dict(params).items()}
    problem = None
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            problem = f"has no parameter '{name}' {expected[name]}"
        elif name not in expected:
            problem = f"has a parameter '{name}' {found[name]} that is not in its config"
        elif found[name] != expected[name]:
            problem = (
                f"has '{name}' of shape {found[name]}, but its config specifies {expected[name]}"
            )
        if problem:
            break
    if problem:
        raise CheckpointError(
            f"'{where}' {problem}",
            "config.json and weights of the same model",
            "Copy the complete checkpoint directory, without mixing files of two models",
        )
