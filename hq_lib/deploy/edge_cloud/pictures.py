"""What an edge without a network sends: the image itself, in pixels of fewer bits or as JPEG.

These are the lines that a cut inside the network has to beat. JPEG's tables (574 bytes) are the same for every image of
a quality, so both ends keep them, as they keep the grid of a ``Wire``; sent is the compressed image alone.
"""

import functools
import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hq_lib.data import DataSpec
from hq_lib.deploy.edge_cloud.cuts import IMAGE
from hq_lib.deploy.edge_cloud.wire import MAX_BITS, Wire, WireError, check_wire_bits

_WHOLE, _TABLES, _IMAGE_ONLY = 0, 1, 2  # Pillow's ``streamtype``
_MARKER_BYTES = 2


def pixel_wire(spec: DataSpec, *, bits: int) -> Wire:
    """The wire that sends images of ``spec`` with ``bits`` a pixel: 2^bits even levels from black to white.

    Nothing is fitted: code k stands for the pixel 255 k / (2^bits - 1), normalised; 8 bits lose nothing but float
    rounding.
    """
    check_wire_bits(bits)
    if bits > MAX_BITS:
        raise WireError(f"pixels have {MAX_BITS} bits, not {bits}")
    mean, std = (np.asarray(values, np.float32) for values in (spec.mean, spec.std))
    return Wire(IMAGE, spec.in_shape, bits, 1 / ((2**bits - 1) * std), -mean / std)


def to_jpeg(images: Tensor, *, quality: int) -> list[bytes]:
    """Each image as a JPEG stream without tables, 4:2:0 as usual.

    Args:
        images:  (N, 3, H, W) or (N, 1, H, W) uint8.
        quality: 1..95, libjpeg's scale.
    """
    if not 1 <= quality <= 95:
        raise WireError(f"JPEG quality {quality}: give 1 to 95")
    return [_encoded(pixels, quality, _IMAGE_ONLY) for pixels in _pixels(images)]


def from_jpeg(streams: Sequence[bytes], like: Tensor, *, quality: int) -> Tensor:
    """The images in ``streams``: (N, C, H, W) uint8.

    Args:
        streams: from ``to_jpeg``.
        like:    (..., C, H, W) uint8: any image of that shape, which gives the tables.
        quality: as they were made with.

    Raises:
        WireError: names the first stream that is no such image.
    """
    channels, height, width = like.shape[-3:]
    tables = _tables(channels, height, width, quality)
    found = []
    for i, stream in enumerate(streams):
        try:
            with Image.open(io.BytesIO(tables[:-_MARKER_BYTES] + stream[_MARKER_BYTES:])) as image:
                held = (len(image.getbands()), *image.size[::-1])
                pixels = np.array(image) if held == (channels, height, width) else None  # nothing larger is decoded
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise WireError(f"stream {i} is no JPEG image of quality {quality}: {error}") from None
        if pixels is None:
            raise WireError(f"stream {i} holds an image {held}, not {(channels, height, width)}")
        found.append(torch.from_numpy(pixels).view(height, width, channels))
    return torch.stack(found).permute(0, 3, 1, 2)


def _pixels(images: Tensor) -> list[np.ndarray]:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise WireError(f"JPEG takes uint8 images (N, 1 or 3, H, W), not {images.dtype} {tuple(images.shape)}")
    pixels = images.permute(0, 2, 3, 1).numpy()
    return list(pixels[..., 0] if images.shape[1] == 1 else pixels)


def _encoded(pixels: np.ndarray, quality: int, part: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, streamtype=part)
    return buffer.getvalue()


@functools.cache
def _tables(channels: int, height: int, width: int, quality: int) -> bytes:
    """What all JPEG streams of a quality share, from the first marker to the closing one."""
    blank = torch.zeros(1, channels, height, width, dtype=torch.uint8)
    return _encoded(_pixels(blank)[0], quality, _TABLES)
