"""Products of arrays with an axis of heads against their plain forms."""

from __future__ import annotations

import jax
import numpy as np

from cellplm_jax.kernels.heads import scaled, scaled_reference


def test_scaling_by_head_has_the_plain_gradient():
    values, weight = np.random.default_rng(0).standard_normal((2, 2, 4, 3, 5)).astype(np.float32)
    scale = weight[..., 0]
    found, wanted = (
        jax.grad(lambda v, s, of=of: (of(v, s) * weight).sum(), argnums=(0, 1))(values, scale)
        for of in (scaled, scaled_reference)
    )
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-5, atol=1e-6)
