"""A network on its way to a board: one folder of C that builds as it is and proves itself on one image.

    export_folder(imodel, "firmware", images[0])     # then, there: make run
    make CC=arm-linux-gnueabi-gcc CFLAGS="-Os -DHQM_PORTABLE" LDFLAGS=-static

A processor without a floating-point unit wants a record made with ``lower(..., requantizer="fixed")``: floats are then
left in ``hqm_open``'s checks and in the logits alone.
"""

import re
import struct
from pathlib import Path
from typing import Any

import numpy as np

from hq_lib.deploy.c.container import ExportError, to_bytes
from hq_lib.deploy.c.runtime import FLAGS, RUNTIME, SOURCES
from hq_lib.integer.execute import ImageError, normalized, run
from hq_lib.integer.record import IntegerModel
from hq_lib.results.atomic import write_bytes, write_text

STACK_BYTES = 4096
"""more than any function of the runtime and all that it calls take with ``-DHQM_PORTABLE``"""
CODE_BYTES = 16384
"""more than gcc makes of the runtime as Thumb-2 code with ``-Os -DHQM_PORTABLE``, the C library left out"""


def export_folder(model: IntegerModel, folder: Path | str, example: Any, *, name: str = "net") -> Path:
    """Write C sources, the network as a const array and a ``main.c`` that runs ``example``, and return ``folder``.

    Args:
        folder:  made if need be; files of the same names are replaced, others stay.
        example: one image, (C, H, W): uint8 pixels where the record knows mean and std, or float32 as in training.
        name:    of program and array, a C identifier.

    Raises:
        ExportError: ``name`` is none, or no container holds the record. ImageError: ``example`` does not fit it.
        RecordError: pixels for a record without ``meta["image"]``: give ``images=`` to ``lower``, or a float image.
    """
    folder, image = Path(folder), np.ascontiguousarray(np.asarray(example))
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,40}", name) or name in ("main", "hqm") or name.startswith("hqm_"):
        raise ExportError(f"{name!r}: a name of lower-case letters, digits and _ is needed, not main or hqm")
    content, logits = to_bytes(model), _logits(model, image)
    words = np.frombuffer(content, "<u4")
    (arena,) = struct.unpack_from("<I", content, 36)
    is_pixels, fixed = image.dtype == np.uint8, model.requantizer == "fixed"
    facts = {
        "name": name, "upper": name.upper(), "label": int(logits.argmax()), "requantizer": model.requantizer,
        "type": "uint8_t" if is_pixels else "float", "call": "hqm_run_pixels" if is_pixels else "hqm_run",
        "n_words": len(words), "n_values": image.size, "n_logits": logits.size, "n_bytes": f"{len(content):,}",
        "arena": arena, "ram": f"{arena:,}", "stack": f"{STACK_BYTES:,}", "code": f"{CODE_BYTES:,}",
        "flags": " ".join(flag for flag in FLAGS if not flag.startswith(("-O", "-fPIC", "-fno-sem"))),
        "advice": "" if fixed else "; without a floating-point unit export it again with `--set requantizer=fixed`\n"
        '(Python: `lower(..., requantizer="fixed")`)',
    }  # fmt: skip
    arrays = [
        _array("uint32_t", f"{name}_model", [f"0x{word:08x}" for word in words]),
        _array(facts["type"], f"{name}_image", [str(v) if is_pixels else f"{float(v).hex()}f" for v in image.ravel()]),
        _array("uint32_t", f"{name}_logits", [f"0x{word:08x}" for word in logits.ravel().view(np.uint32)]),
    ]
    write_text(folder / f"{name}.c", f'#include "{name}.h"\n\n' + "\n".join(arrays))
    for template in sorted((SOURCES / "board").iterdir()):  # in which @fact@ stands for one of ``facts``
        text = re.sub(r"@(\w+)@", lambda found: str(facts[found[1]]), template.read_text(encoding="utf-8"))
        write_text(folder / (f"{name}.h" if template.name == "net.h" else template.name), text)
    for file in (*RUNTIME, *(path.name for path in SOURCES.glob("*.h") if path.name != "hqm_images.h")):
        write_bytes(folder / file, (SOURCES / file).read_bytes())
    return folder


def _logits(model: IntegerModel, image: np.ndarray) -> np.ndarray:
    """Return NumPy's logits of one image, float32 pixels or uint8."""
    shape = model.tensors[model.input].shape
    if image.dtype not in (np.uint8, np.float32) or image.shape != shape:
        raise ImageError(f"the model takes one image {shape}, uint8 or float32, not {image.dtype} {image.shape}")
    return run(model, (image if image.dtype == np.float32 else normalized(model, image))[None])


def _array(kind: str, name: str, values: list[str]) -> str:
    lines = [", ".join(values[i : i + 10]) for i in range(0, len(values), 10)]
    return f"const {kind} {name}[{len(values)}] = {{\n    " + ",\n    ".join(lines) + "};\n"
