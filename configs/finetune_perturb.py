"""What perturbations do to expression, by gradients. Keys: the arguments of ``PerturbationPredictor`` and its ``fit``.

::

    python launch/finetune.py --config=configs/finetune_perturb.py --data=screen.h5ad --workdir=runs/perturb \\
        --config.perturbation_key=perturbation --config.control=control
"""

from ml_collections import ConfigDict

from launch.estimators import config_of


def get_config() -> ConfigDict:
    """Return the configuration."""
    return config_of(
        "perturb", method="finetune", perturbation_key="perturbation", control="control"
    )
