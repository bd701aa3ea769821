"""What things cost: the main jobs timed against a naive path, or against the work that they cannot avoid."""
