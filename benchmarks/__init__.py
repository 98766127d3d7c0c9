"""``pytest benchmarks``, and tables of ratios that are measured in one run: ``python -m benchmarks.penalty``."""
