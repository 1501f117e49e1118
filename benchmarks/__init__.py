"""What is measured against whom; every module here is a command: ``python -m benchmarks.NAME``."""
