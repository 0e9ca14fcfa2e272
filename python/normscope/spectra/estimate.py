"""Estimates, with intervals, of the spectrum of matrices too large for the exact path."""
