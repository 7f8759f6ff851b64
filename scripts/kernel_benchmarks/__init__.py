"""The parts of `scripts/benchmark_kernels.py`: what is measured, one file an idea, and how it is shown.

Measurements return plain dictionaries, which the results file holds; `tables` and `picture` need only these, no GPU.
"""
