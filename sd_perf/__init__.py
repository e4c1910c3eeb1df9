"""sd-perf: a fast, checkable trainer of the MLPerf text-to-image benchmark (Stable Diffusion
v2)."""

__version__ = "0.1.0"
