"""The original CellPLM, as its pipelines and its released objective run it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from counts import BATCHES, DATASETS, make_counts
from worker import serve


def write_weights(prefix: str) -> None:
    """Write a randomly initialised model of the published form, for both sides to load."""
    from original_cellplm import build_published, save_published

    save_published(*build_published(11), prefix)


def prepare(job: dict[str, Any]) -> Callable[[], Any]:
    """Build the published model and the cells as torch tensors, and return what is timed."""
    import json

    import torch
    from original_cellplm import Cells, _inputs, given_noise, load_original

    device = "cuda" if job["device"] == "gpu" else "cpu"
    counts = make_counts(job["counts"], job["cells"])
    random = np.random.RandomState(1)
    batch = random.randint(0, BATCHES, counts.shape[0])
    dataset = random.randint(0, DATASETS, counts.shape[0])
    config = json.loads(Path(job["prefix"] + ".config.json").read_text())
    embedding = job["task"] == "embed"
    head = {"head_type": "embedder"} if embedding else {}
    model = load_original().OmicsFormer(**{**config, **head})
    state = torch.load(job["prefix"] + ".best.ckpt", weights_only=True)["model_state_dict"]
    model.load_state_dict(state, strict=False)
    model.to(device)
    inputs = {k: v.to(device) for k, v in _inputs(model, Cells(counts, batch, dataset)).items()}

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    if embedding:
        model.eval()
        seen: list[Any] = []
        # Its pipeline's head returns the latent less its mean over the cells; the latent itself is compared.
        model.latent.register_forward_hook(lambda _m, _i, output: seen.append(output[0]))

        def embed() -> np.ndarray:
            seen.clear()
            with torch.no_grad(), given_noise(None, None):
                model(dict(inputs), None)
            return seen[0].float().cpu().numpy()

        return embed

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"], weight_decay=config["wd"])

    def step() -> float:
        optimizer.zero_grad()
        given = {**inputs, "gene_mask": torch.ones(counts.shape[1], dtype=torch.bool).to(device)}
        _, loss = model(given, None)
        loss.backward()
        optimizer.step()
        wait()
        return float(loss.detach())

    return step


if __name__ == "__main__":
    import sys

    if sys.argv[1] == "write-weights":
        write_weights(sys.argv[2])
    else:
        serve(prepare)
