"""Which images, in which order, and their pixels. No PyTorch behind this door."""

from uniter.extract.images.decoding import MAX_PIXELS, decode_image
from uniter.extract.images.items import UNIT_IMAGES, ImageItem, ImageList, read_bytes
from uniter.extract.images.listing import list_images

__all__ = ["MAX_PIXELS", "UNIT_IMAGES", "ImageItem", "ImageList", "decode_image", "list_images", "read_bytes"]
