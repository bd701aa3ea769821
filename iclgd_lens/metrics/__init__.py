"""Similarities between runs, and their controls."""
