"""The metrics: pure functions from raw sums to named values."""
