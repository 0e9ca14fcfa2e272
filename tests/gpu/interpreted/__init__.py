"""Tests that run in Triton's interpreter; tests/gpu/test_interpreted.py starts a process for them."""
