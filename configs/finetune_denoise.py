"""Expected counts: a model tuned on cells. Keys: the arguments of ``Denoiser`` and of its ``fit``.

::

    python launch/finetune.py --config=configs/finetune_denoise.py --data=cells.h5ad --workdir=runs/denoise
"""

from ml_collections import ConfigDict

from launch.estimators import config_of


def get_config() -> ConfigDict:
    """Return the configuration."""
    return config_of("denoise")
