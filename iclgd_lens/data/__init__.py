"""Tasks, prompts and episodes: what a model is asked."""
