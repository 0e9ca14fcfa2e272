"""Singular values on a budget: the certified largest one, and estimates for matrices too large for the exact path."""
