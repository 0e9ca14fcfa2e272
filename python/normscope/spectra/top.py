"""The largest singular value, warm-started from the call before and certified."""
