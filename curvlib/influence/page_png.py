"""Images as PNG data addresses, for pages that must not load anything.

The format is that of the PNG specification (ISO/IEC 15948): a header, one compressed stream of
rows without filters, and an end.
"""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import torch
from torch import Tensor

#: Pixels along an image's longer side, at most; larger ones are averaged down.
SIDE = 160


def data_address(image: Any) -> str:
    """An image as ``data:image/png;base64,...``.

    Args:
        image: ``[H, W]``, ``[1 or 3, H, W]`` or ``[H, W, 1 or 3]``: uint8 as it is; floating-point
            numbers in [0, 1] as they are, others stretched to their own range.

    Raises:
        ValueError: If it has another shape.
    """
    return "data:image/png;base64," + base64.b64encode(png(pixels(image))).decode("ascii")


def pixels(image: Any) -> Tensor:
    """The pixels that are shown, uint8 ``[H, W, C]`` with 1 or 3 channels.

    Raises:
        ValueError: If the image has another shape.

    Example:
        >>> pixels(torch.tensor([[0.0, 8.0], [16.0, 4.0]]))[..., 0].tolist()
        [[0, 128], [255, 64]]
    """
    own = torch.as_tensor(image).detach().cpu()
    rows = _channels_last(own)
    if rows is None or 0 in rows.shape:
        raise ValueError(
            f"expected an image of shape [H, W], [C, H, W] or [H, W, C] with 1 or 3 channels, got "
            f"{list(own.shape)}"
        )
    shrink = -(-max(rows.shape[:2]) // SIDE)
    values = rows.double()
    if shrink > 1:
        size = (max(1, rows.shape[0] // shrink), max(1, rows.shape[1] // shrink))
        values = torch.nn.functional.adaptive_avg_pool2d(values.movedim(2, 0), size).movedim(0, 2)
    if own.dtype != torch.uint8:
        finite = values[values.isfinite()]
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
        if low < 0.0 or high > 1.0:
            values = (values - low) / ((high - low) or 1.0)
        values = values.nan_to_num(0.5, 1.0, 0.0).clamp(0.0, 1.0) * 255.0
    return values.round().to(torch.uint8)


def is_image(value: Any) -> bool:
    """Whether a tensor or an array has the shape of an image: at least two pixels each way."""
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        return False
    rows = _channels_last(torch.as_tensor(value))
    return rows is not None and min(rows.shape[:2]) > 1


def png(rows: Tensor) -> bytes:
    """The bytes of a PNG file of pixels, uint8 ``[H, W, C]`` with 1 or 3 channels."""
    height, width, channels = rows.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    lines = rows.reshape(height, -1)
    raw = torch.cat([lines.new_zeros((height, 1)), lines], 1).numpy().tobytes()
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(raw, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    check = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)


def _channels_last(image: Tensor) -> Tensor | None:
    """``[H, W, C]``, or ``None`` for what is no image."""
    if image.is_complex():
        return None
    if image.ndim == 2:
        return image[..., None]
    if image.ndim != 3:
        return None
    if image.shape[0] in (1, 3):
        return image.movedim(0, 2)
    return image if image.shape[2] in (1, 3) else None
