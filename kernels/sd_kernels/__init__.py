"""Operators of the Stable Diffusion v2 UNet, each with a plain reference and faster backends chosen
by name.

One folder an op: `reference.py` is plain torch, `triton.py` and the adapters named after a package
are faster, and `__init__.py` holds the op's `SPEC`. Needs torch and triton, nothing else; an
adapter imports its package when chosen.
"""
