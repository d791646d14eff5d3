"""Lilliput beside its peers, measured in turn in one run. `python -m benchmarks` runs all; docs/benchmarks.md tells."""
