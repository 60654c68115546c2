"""Genes that a panel lacks, learnt from a reference. Keys: the arguments of ``GeneImputer`` and of its ``fit``.

::

    python launch/finetune.py --config=configs/finetune_impute.py --data=spatial.h5ad --workdir=runs/impute \\
        --config.reference=reference.h5ad

The genes to impute, ``genes`` of ``fit``, are ``--config.impute``: names separated by commas, or a file.
"""

from ml_collections import ConfigDict

from launch.estimators import config_of


def get_config() -> ConfigDict:
    """Return the configuration."""
    return config_of("impute")
