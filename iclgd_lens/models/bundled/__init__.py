"""The bundled in-context learner: its language, its architecture and weights, its training recipe."""
