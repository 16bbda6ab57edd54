"""Training a detector of one's own on COCO-style boxes."""
