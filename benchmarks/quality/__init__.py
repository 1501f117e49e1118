"""Perplexity of pruned models: recipes against each other, and against plain quantisation.

    python -m benchmarks.quality --calibration FILE --data FILE [--suite table|frontier|all]

What is to be measured is declared as cells (`cells`); each is measured in a process of its own (`measure`) and kept in
a store (`store`), so that the benchmark can be interrupted at any moment and continued over days: the same command goes
on where the last one stopped. `--print` shows what there is without measuring anything.
"""
