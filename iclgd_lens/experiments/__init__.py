"""Whole comparisons and their tidy results."""
