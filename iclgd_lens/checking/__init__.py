"""Proving on one model what the package promises of all."""
