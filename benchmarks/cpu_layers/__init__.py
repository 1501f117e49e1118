"""Sparse layers on the CPU against dense and sparse rivals. ``python -m benchmarks.cpu_layers --help``"""
