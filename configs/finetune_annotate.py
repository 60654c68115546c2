"""Cell types, learnt from labelled cells.

::

    python launch/finetune.py --config=configs/finetune_annotate.py --data=labelled.h5ad --workdir=runs/annotate \\
        --config.label_key=cell_type --config.training.learning_rate=1e-3

Keys: ``label_key``, ``batch_key``, ``split_key`` and the other arguments of ``CellTypeAnnotator`` and of its ``fit``;
``model``, what to start from; ``training``, the recipe (``cellplm_jax.FinetuneConfig``).
"""

from ml_collections import ConfigDict

from launch.estimators import config_of


def get_config() -> ConfigDict:
    """Return the configuration."""
    return config_of("annotate", label_key="cell_type")
