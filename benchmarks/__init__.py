"""Benchmarks: each command is a module, `python -m benchmarks.NAME`; results/ holds measured JSON.

Commands: throughput, ladder, scaling, data, evaluation, kernels, kernel_speed, gpu_acceptance,
ahead_of_time, cpu_comparisons, frechet_distance, full_size_cpu. The other modules are their parts.
"""
