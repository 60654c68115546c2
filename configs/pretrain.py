"""Pretraining configurations, chosen by a variant after the colon.

Every command is one of the two lines below with the variant put in; the same ``--workdir`` resumes, on any number of
processes. ``--corpus`` takes a folder or ``gs://`` address made by ``cellplm prepare``, or ``.h5ad`` files::

    python launch/pretrain.py --config=configs/pretrain.py:VARIANT --corpus=CORPUS --workdir=runs/VARIANT
    bash launch/tpu_pod.sh up --project=ID --zone=ZONE --name=NAME --accelerator=TYPE -- \\
        --config=configs/pretrain.py:VARIANT --corpus=gs://BUCKET/corpus --workdir=gs://BUCKET/runs/VARIANT

Variants, where they belong, and what a whole run took and scored on held-out samples (masked-gene correlation) where
one was made:

=====================  ==============================================================  ==================  ===========
variant                what                                                            made for            time, score
=====================  ==============================================================  ==================  ===========
``:85m``               the published architecture                                      one accelerator up  not yet run
``:1b``                the same, grown to 1,018 M parameters                           a pod slice         not yet run
``:small``             a projection of the corpus, 2 layers, 256 hidden, 240 latent    a laptop            36 min, .692
``:scratch``           64 latent dimensions, random start: what ``Estimator(None)`` is  a laptop            not yet run
``:debug``             goes through every stage                                        a laptop            seconds
``:gaussian``          ``:small`` with a Gaussian instead of the mixture               a laptop            not yet run
``:no_latent``         ``:small`` with a deterministic latent                          a laptop            not yet run
``:mlp_encoder``       ``:small`` with an MLP encoder: cells do not see one another    a laptop            not yet run
``:no_positions``      ``:small`` without positional encodings                         a laptop            not yet run
``:no_masks``          ``:small`` without masking: a plain autoencoder                 a laptop            not yet run
``:no_projection``     ``:small`` from random weights                                  a laptop            not yet run
``:no_discriminants``  ``:small`` from principal components alone                      a laptop            not yet run
``:no_restoration``    ``:small`` without latent restoration                           a laptop            not yet run
=====================  ==============================================================  ==================  ===========

The run of ``:small``: 61,082 cells and spots of 37 human and mouse files, 170 samples, 2,000 steps on 2 CPU cores
next to other programs. Before training it scores .604, as the decoder's bias starts at the genes' means.

Any value can be changed on the command line, such as ``--config.optimizer.learning_rate=1e-4``; a misspelt key is an
error that names the nearest one. ``data.rows`` has to be a multiple of the devices along the data axis (all devices /
``mesh.cells`` / ``mesh.genes``): on a v5litepod-16, ``:85m`` wants ``--config.data.rows=16`` or a multiple of it.
"""

from ml_collections import ConfigDict

from cellplm_jax.config import to_dict
from cellplm_jax.presets import preset


def get_config(variant: str = "small") -> ConfigDict:
    """Return the configuration of a variant."""
    return ConfigDict(to_dict(preset(variant)))
