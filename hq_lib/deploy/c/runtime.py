"""The C runtime: its binaries, compiled when first asked for and kept beside the data (``cache_dir``), and called from
Python: one container, one arena, logits per image."""

import ctypes
import hashlib
import json
import os
import shutil
import struct
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from hq_lib.deploy.c.container import MAGIC, ExportError, to_bytes
from hq_lib.integer.execute import ImageError
from hq_lib.integer.record import IntegerModel
from hq_lib.results import paths

SOURCES = Path(__file__).resolve().parent / "src"
FLAGS = (
    "-std=c99", "-O3", "-Wall", "-Wextra", "-pedantic", "-Werror", "-ffp-contract=off", "-fPIC",
    "-fno-semantic-interposition",
)  # fmt: skip
RUNTIME = (
    "hqm_open.c", "hqm_run.c", "hqm_layer.c", "hqm_moves.c", "hqm_rescale.c", "hqm_table.c", "hqm_threads.c",
    "hqm_kernel.c", "hqm_kernel_avx2.c", "hqm_kernel_avx512.c", "hqm_kernel_neon.c",
)  # fmt: skip
TOOL = ("hqm_images.c", "hqm_main.c")
KERNELS = ("auto", "scalar", "avx2", "avx512vnni", "neon")
"""equal bits, other speed: scalar everywhere, avx* on x86-64, neon on 64-bit ARM; auto: the fastest there is"""


class CompilerError(RuntimeError):
    """No C compiler, or one that refuses the sources; the message says which and what to install."""


def compiler() -> str:
    """Return the C compiler: ``$CC``, else cc, gcc or clang. Raises CompilerError where there is none."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    for name in names:
        if found := shutil.which(name):
            return found
    raise CompilerError(f"no C compiler ({', '.join(names)}): install gcc or clang, or set CC to one")


def program() -> Path:
    """Return the command-line program ``hqm``. Raises CompilerError."""
    return compiled("hqm", RUNTIME + TOOL)


def library() -> Path:
    """Return the shared library of the runtime, for ctypes. Raises CompilerError."""
    return compiled("libhqm.so", RUNTIME, "-shared", "-DHQM_THREADS", "-pthread")


def compiled(name: str, sources: tuple[str, ...], *extra: str, folder: Path = SOURCES) -> Path:
    """Return ``name`` made of C ``sources`` in ``folder`` with these flags too, from a cache called by what it is made
    of; compiled there if it is not. Raises CompilerError."""
    cc, own = compiler(), os.environ.get("CFLAGS", "")
    digest = hashlib.sha256(repr((cc, extra, FLAGS, own)).encode())
    for source in sorted(folder.glob("*.[ch]")):
        digest.update(source.read_bytes())
    target = paths.cache_dir() / "c" / digest.hexdigest()[:16] / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        if target.exists():
            return target
        fresh = target.with_name(f".{name}.{os.getpid()}.tmp")
        command = [cc, *FLAGS, *extra, *own.split(), *(str(folder / source) for source in sources), "-o", str(fresh)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise CompilerError(f"{cc} does not compile the C runtime:\n{done.stderr[-4000:]}")
            os.replace(fresh, target)
        except OSError as error:
            raise CompilerError(f"{cc} cannot be run: {error}") from error
        finally:
            fresh.unlink(missing_ok=True)
    return target


class ContainerError(ValueError):
    """A container that the C runtime refuses; the message is the runtime's own."""


def meta_of(file: Path | str) -> dict[str, Any]:
    """The metadata of the record that a container was made from: policy, commit, the images' mean and deviation."""
    raw = Path(file).read_bytes()
    if raw[:4] != MAGIC:
        raise ExportError(f"{file} is no container: its first bytes are {raw[:4]!r}")
    try:
        place, size = struct.unpack_from("<2I", raw, 4 * 11)
        return dict(json.loads(raw[place : place + size]))
    except (struct.error, ValueError, TypeError, RecursionError) as error:
        raise ExportError(f"{file}: its metadata cannot be read ({error}): export it again") from error


class _Shape(ctypes.Structure):
    _fields_ = (
        ("rank", ctypes.c_uint32), ("shape", ctypes.c_uint32 * 8), ("n", ctypes.c_uint32), ("dtype", ctypes.c_int)
    )  # fmt: skip


@cache
def _library(path: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(path))
    lib.hqm_message.restype = lib.hqm_kernel_name.restype = ctypes.c_char_p
    lib.hqm_arena_size.restype = lib.hqm_model_size.restype = ctypes.c_size_t
    lib.hqm_input.restype = lib.hqm_output.restype = _Shape
    return lib


class Runtime:
    """A container opened by the C runtime.

    >>> logits = Runtime(imodel).run(images)        # the NumPy executor's bits
    """

    def __init__(self, model: IntegerModel | bytes | Path | str, *, kernel: str = "auto", n_threads: int = 1) -> None:
        """Open a record, the bytes of a container, or its file.

        Args:
            kernel:    one of ``KERNELS``. Holds for the process.
            n_threads: 1..64 that share the images of a batch, or the rows of a large layer where there are fewer
                       images than threads; the bits stay.

        Raises:
            ContainerError: what the runtime says of the container. ValueError: no such kernel here, or no such threads.
            CompilerError: the runtime cannot be compiled here.
        """
        content = model if isinstance(model, bytes | Path | str) else to_bytes(model)
        content = content if isinstance(content, bytes) else Path(content).read_bytes()
        self._lib = _library(library())
        if not self._lib.hqm_use_kernel(kernel.encode()):
            raise ValueError(f"no kernel {kernel!r} on this processor (known: {', '.join(KERNELS)})")
        self._n_threads = n_threads
        if not self._lib.hqm_use_threads(n_threads):
            raise ValueError(f"{n_threads!r} threads: 1 to 64, as many as this system gives")
        self._content = _aligned(len(content))
        self._content[:] = np.frombuffer(content, np.uint8)
        self._model = ctypes.create_string_buffer(self._lib.hqm_model_size())
        status = self._lib.hqm_open(self._model, _pointer(self._content), ctypes.c_size_t(len(content)))
        self._need(status, ContainerError)
        self._arenas = [_aligned(self._lib.hqm_arena_size(self._model)) for _ in range(n_threads)]
        self.in_shape = _shape(self._lib.hqm_input(self._model))
        self.out_shape = _shape(self._lib.hqm_output(self._model))

    @property
    def kernel(self) -> str:
        """Name of the kernels in use."""
        return self._lib.hqm_kernel_name().decode()

    def run(self, images: Any) -> np.ndarray:
        """Return the logits of ``images``, float32 (N, n_classes), equal to ``hq_lib.integer.run``'s.

        Args:
            images: (N, C, H, W) float32, normalised as in training, or uint8 pixels where the container knows mean
                    and std.

        Raises:
            ImageError: another shape or dtype, NaN, or pixels that the container cannot read.
        """
        x = np.ascontiguousarray(np.asarray(images))
        if x.dtype not in (np.float32, np.uint8) or x.shape[1:] != self.in_shape or not len(x):
            raise ImageError(f"the model takes (N, {', '.join(map(str, self.in_shape))}), not {x.dtype} {x.shape}")
        call = self._lib.hqm_run if x.dtype == np.float32 else self._lib.hqm_run_pixels
        logits = np.empty((len(x), *self.out_shape), np.float32)
        n = self._n_threads if len(x) >= self._n_threads else 1  # images at the same time
        self._lib.hqm_use_threads(self._n_threads // n)

        def run_share(first: int) -> None:
            arena = _pointer(self._arenas[first])
            for image, row in zip(x[first::n], logits[first::n], strict=True):
                self._need(call(self._model, arena, _pointer(image), _pointer(row)), ImageError)

        if n == 1:
            run_share(0)
        else:
            with ThreadPoolExecutor(n) as pool:
                list(pool.map(run_share, range(n)))
        return logits

    def profile(self, images: Any, *, rounds: int = 5) -> np.ndarray:
        """Return the seconds of each operation, per image: (n_ops,), in the order of the record's ``ops``.

        Args:
            images: (N, C, H, W) float32, as ``run`` takes them.
            rounds: of each operation the least time counts; a call from Python adds under 2 us to each.
        """
        n_ops, arena = int(self._content[24:28].view("<u4")[0]), _pointer(self._arenas[0])
        seconds, x = np.zeros((rounds, n_ops)), np.ascontiguousarray(np.asarray(images, np.float32))
        self.run(x)  # which checks them, and may have given each thread images of its own
        self._lib.hqm_use_threads(self._n_threads)
        for row in seconds:
            for image in map(_pointer, x):
                for i in range(n_ops):
                    start = time.perf_counter()
                    self._lib.hqm_run_operation(self._model, i, arena, image)
                    row[i] += time.perf_counter() - start
        return seconds.min(0) / len(x)

    def _need(self, status: int, error: type[ValueError]) -> None:
        if status:
            raise error(self._lib.hqm_message(status).decode())


def _aligned(size: int) -> np.ndarray:
    """Return zeroed bytes at a multiple of 64."""
    block = np.zeros(size + 64, np.uint8)
    start = -block.ctypes.data % 64
    return block[start : start + size]


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _shape(shape: _Shape) -> tuple[int, ...]:
    return tuple(shape.shape[: shape.rank])
