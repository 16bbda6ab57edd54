"""Annotation files of captions to Iterator[Caption]."""
