"""sd-perf: a fast, checkable trainer of the MLPerf text-to-image benchmark."""

__version__ = "0.1.0"
