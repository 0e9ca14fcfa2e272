"""Whether this machine computes what the reference says, operation by operation."""
