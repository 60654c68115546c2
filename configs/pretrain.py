"""Pretraining configurations, chosen by a variant after the colon.

Commands (``--corpus`` takes ``.h5ad`` files or a folder of them; the same ``--workdir`` resumes)::

    python launch/pretrain.py --config=configs/pretrain.py:debug --corpus=FILE.h5ad --workdir=runs/debug
    python launch/pretrain.py --config=configs/pretrain.py:small --corpus=FOLDER    --workdir=runs/small
    python launch/pretrain.py --config=configs/pretrain.py:85m   --corpus=FOLDER    --workdir=runs/85m

Variants: ``:85m`` (the published architecture, for accelerators), ``:small`` (a laptop, minutes), ``:debug`` (seconds),
and the ablations of ``:small``: ``:gaussian``, ``:no_latent``, ``:mlp_encoder``, ``:no_positions``, ``:no_masks``.
Any value can be changed on the command line, such as ``--config.optimizer.learning_rate=1e-4``; a misspelt key is
an error.
"""

from ml_collections import ConfigDict

from cellplm_jax.config import to_dict
from cellplm_jax.presets import preset


def get_config(variant: str = "small") -> ConfigDict:
    """Return the configuration of a variant."""
    return ConfigDict(to_dict(preset(variant)))
