"""Commands that measure, ``python -m benchmarks.NAME``, and ``pytest benchmarks``: rank-1 EWC against diagonal EWC."""
