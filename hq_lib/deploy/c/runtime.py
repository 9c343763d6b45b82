"""The C runtime called from Python: one container, one arena, logits per image."""

import ctypes
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from hq_lib.deploy.c.build import library
from hq_lib.deploy.c.container import to_bytes
from hq_lib.integer.execute import ImageError
from hq_lib.integer.record import IntegerModel

KERNELS = ("auto", "scalar", "avx2", "avx512vnni", "neon")
"""equal bits, other speed: scalar everywhere, avx* on x86-64, neon on 64-bit ARM; auto: the fastest there is"""


class ContainerError(ValueError):
    """A container that the C runtime refuses; the message is the runtime's own."""


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
        self.run(x)  # which checks them
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
