"""What the model sees, to look at."""
