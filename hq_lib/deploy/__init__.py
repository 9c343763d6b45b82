"""The integer record outside Python: ``c`` (C99), ``onnx``, ``fpga``, and ``edge_cloud``, a network cut in two.

export(lower(qnet), "net.onnx", "onnx")
"""

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hq_lib.results.atomic import write_bytes

if TYPE_CHECKING:
    import numpy as np

    from hq_lib.integer import IntegerModel

ENDINGS = {"c": ".hqm", "onnx": ".onnx", "npz": ".npz", "board": "_board", "fpga": "_fpga"}
"""Format -> what a file (board and fpga: a folder) of it is called."""


def export(imodel: "IntegerModel", path: str | os.PathLike, to: str, *, image: "np.ndarray | None" = None) -> Path:
    """Write ``imodel`` to ``path`` in format ``to``, and return the path.

    c: a container for the C runtime; onnx: integer initializers (extra ``export``); npz: read with NumPy alone; board:
    a folder of C sources that builds as it is and proves itself on ``image``; fpga: a folder of memory images (hex).

    Raises:
        ValueError:  an unknown format, an ending that is not the format's, or (``ExportError``, ``RecordError``,
                     ``FpgaiError``) what the format cannot hold.
        ImportError: onnx is not installed.
    """
    path = Path(path)
    if to not in ENDINGS:
        raise ValueError(f"format {to!r}: choose one of {', '.join(ENDINGS)}")
    if ENDINGS[to][0] == "." and path.suffix != ENDINGS[to]:
        raise ValueError(f"{path.name}: a file for {to} ends in {ENDINGS[to]}")
    rooms = {"npz": "hq_lib.integer", "board": "hq_lib.deploy.c"}
    room: Any = importlib.import_module(rooms.get(to, f"hq_lib.deploy.{to}"))
    if to == "fpga":
        room.write_images(imodel, path)
    elif to == "board":
        room.export_folder(imodel, path, image)
    else:
        write_bytes(path, room.to_bytes(imodel))
    return path
