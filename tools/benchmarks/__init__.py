"""The benchmarks behind tools/benchmark.py, one module each."""
