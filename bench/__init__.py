"""Benchmarks: each times normscope against its alternative in one process and reports the ratio."""
