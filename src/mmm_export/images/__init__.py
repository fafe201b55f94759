"""Pictures on their way into the model: reading any common file as RGB, and cutting it into normalised tiles."""

from mmm_export.images.files import MAX_PIXELS, MAX_SIDE, ImageSource, load_image
from mmm_export.images.tiles import MAX_TILES, choose_grid, tiles_from_image

__all__ = ["MAX_PIXELS", "MAX_SIDE", "MAX_TILES", "ImageSource", "choose_grid", "load_image", "tiles_from_image"]
