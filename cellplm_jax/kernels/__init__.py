"""Fast forms of array operations, each next to a plain reference.

A kernel is a function ``name`` that the package calls, and a function ``name_reference`` that computes the same numbers
in the plain way. The docstring of ``name`` says after "Why:" what the fast form saves, and with which version of jax.
``tests/kernels/`` compares values and gradients of the two. When a later jax no longer needs a fast form, replace its
body by a call of the reference.
"""
