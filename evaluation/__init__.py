"""Accuracy, measured."""
