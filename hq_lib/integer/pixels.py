"""Raw pixels to the input's integers by a table: what devices without floats do instead of normalising."""

from __future__ import annotations

import numpy as np

from hq_lib.integer.execute import ImageError, to_grid
from hq_lib.integer.record import IntegerModel
from hq_lib.integer.requant import RecordError


def pixel_table(model: IntegerModel) -> np.ndarray:
    """Return (C, 256), uint8 or uint16: the input integer of each pixel value 0..255 of each channel.

        q = Q(f32(f32(pixel - f32(f32(mean) * 255)) / f32(f32(std) * 255))),   Q: the first operation, ``Quantize``

    exactly what ``hq_lib.data.normalize`` and ``quantize`` make of the pixel.

    Raises:
        RecordError: the record does not know its data set's mean and std (``lower(..., images=spec)`` stores them).
    """
    image = model.meta.get("image")
    if not isinstance(image, dict) or not {"mean", "std"} <= set(image):
        raise RecordError("the record holds no mean and std of its images: lower the network with images=spec")
    n_channels = model.tensors[model.input].shape[0]
    mean, std = (_column(image[key], n_channels, key) for key in ("mean", "std"))
    return to_grid((np.arange(256, dtype=np.float32) - mean) / std, model.tensors[model.ops[0].output])


def _column(values: object, n: int, key: str) -> np.ndarray:
    column = np.asarray(values, np.float32) * np.float32(255)
    if column.shape != (n,) or not np.all(np.isfinite(column)) or (key == "std" and not np.all(column > 0)):
        raise RecordError(f"the record's image {key} is {values!r:.60}: {n} numbers were expected")
    return column[:, None]


def quantize_pixels(model: IntegerModel, pixels: np.ndarray) -> np.ndarray:
    """Return the input integers of raw ``pixels`` (N, C, H, W) uint8, by ``pixel_table``: same shape, uint8 or uint16.

    Raises:
        ImageError: other dtype or channels. RecordError: see ``pixel_table``.
    """
    table = pixel_table(model)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1] != len(table):
        raise ImageError(f"pixels are uint8 (N, {len(table)}, H, W), not {pixels.dtype} {pixels.shape}")
    return np.stack([table[c][pixels[:, c]] for c in range(len(table))], axis=1)
