"""Data and training scripts."""
