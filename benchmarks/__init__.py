"""What is measured: each module is a command, `python -m benchmarks.NAME`; results/ holds the
measured JSON."""
