"""Gradient steps in dual form, and their injection by hooks."""
