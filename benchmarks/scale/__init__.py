"""``python -m benchmarks.scale``: what the library costs in a decoder of 8 B parameters on 64 to 1,024 ranks."""
