"""Figures of trained models, each of the examples it is of."""
