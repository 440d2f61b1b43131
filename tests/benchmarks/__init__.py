"""Benchmarks: they print ratios and rates measured in one run, and assert nothing."""
