"""A detector's weights, from wherever they are and in whatever layout."""

from uniter.extract.weights.load import Weights, load_known_weights, load_weight_file, load_weights

__all__ = ["Weights", "load_known_weights", "load_weight_file", "load_weights"]
