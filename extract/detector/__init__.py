"""Detectors: what one is (`protocol`), and those built on Detectron2."""
