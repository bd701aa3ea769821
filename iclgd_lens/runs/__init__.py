"""Runs and what is read from them."""
