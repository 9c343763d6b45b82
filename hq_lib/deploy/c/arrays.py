"""A model compiled in: the container as one const array of words, for devices without files.

    save_arrays(imodel, "net.c", name="net")    # net_model[], net_model_size, NET_ARENA_SIZE in net.h

The device's program adds the files of ``build.RUNTIME``, with ``-DHQM_PORTABLE`` where there is no vector unit, opens
the array where it lies and gives a static arena. The bits are NumPy's under ``-ffp-contract=off``, as in the Makefile.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np

from hq_lib.deploy.c.container import ExportError, to_bytes
from hq_lib.integer.record import IntegerModel
from hq_lib.results.atomic import write_text

_HEADER = """\
/* {title}: {n_bytes} bytes of constants, {arena} bytes of working memory.
 *
 *     static uint32_t arena[{upper}_ARENA_SIZE / 4];
 *     hqm_model model;
 *     hqm_open(&model, {name}_model, sizeof {name}_model);
 *     hqm_run_pixels(&model, arena, pixels, logits);
 */
#ifndef {upper}_H
#define {upper}_H

#include <stdint.h>

#define {upper}_ARENA_SIZE {arena}u

extern const uint32_t {name}_model[{n_words}];

#endif
"""


def save_arrays(model: IntegerModel, path: Path | str, *, name: str) -> tuple[Path, Path]:
    """Write the container of ``model`` as C source to ``path`` (``*.c``) and its header, and return both paths.

    Args:
        name: what the array is called, a C identifier: ``<name>_model``.

    Raises:
        ExportError: another ending, no identifier, or a record that no container holds.
    """
    path = Path(path)
    if path.suffix != ".c" or not re.fullmatch(r"[a-z][a-z0-9_]{0,40}", name):
        raise ExportError(f"{path}, {name!r}: a .c file and a name of lower-case letters, digits and _ are needed")
    content = to_bytes(model)
    words = np.frombuffer(content, "<u4")
    (arena,) = struct.unpack_from("<I", content, 36)
    header = path.with_suffix(".h")
    facts = {"name": name, "upper": name.upper(), "n_words": len(words), "n_bytes": len(content), "arena": arena}
    lines = [", ".join(f"0x{word:08x}" for word in words[i : i + 10]) for i in range(0, len(words), 10)]
    body = ",\n    ".join(lines)
    write_text(header, _HEADER.format(title=header.stem, **facts))
    write_text(path, f'#include "{header.name}"\n\nconst uint32_t {name}_model[{len(words)}] = {{\n    {body}}};\n')
    return path, header
