"""The C runtime's binaries, compiled when first asked for and kept beside the data (``cache_dir``)."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from filelock import FileLock

from hq_lib.results import paths

SOURCES = Path(__file__).resolve().parent / "src"
FLAGS = (
    "-std=c99", "-O3", "-Wall", "-Wextra", "-pedantic", "-Werror", "-ffp-contract=off", "-fPIC",
    "-fno-semantic-interposition",
)  # fmt: skip
SANITIZERS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
RUNTIME = (
    "hqm_open.c", "hqm_run.c", "hqm_layer.c", "hqm_moves.c", "hqm_rescale.c", "hqm_table.c", "hqm_threads.c",
    "hqm_kernel.c", "hqm_kernel_avx2.c", "hqm_kernel_avx512.c", "hqm_kernel_neon.c",
)  # fmt: skip
TOOL = ("hqm_images.c", "hqm_main.c")


class CompilerError(RuntimeError):
    """No C compiler, or one that refuses the sources; the message says which and what to install."""


def compiler() -> str:
    """Return the C compiler: ``$CC``, else cc, gcc or clang. Raises CompilerError where there is none."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    for name in names:
        if found := shutil.which(name):
            return found
    raise CompilerError(f"no C compiler ({', '.join(names)}): install gcc or clang, or set CC to one")


def program(*, sanitize: bool = False) -> Path:
    """Return the command-line program ``hqm``; with ``sanitize`` findings of AddressSanitizer and
    UndefinedBehaviorSanitizer are fatal. Raises CompilerError."""
    return compiled("hqm", RUNTIME + TOOL, *(SANITIZERS if sanitize else ()))


def fuzzer() -> Path:
    """Return the test program ``hqm_fuzz``, with both sanitizers. Raises CompilerError."""
    return compiled("hqm_fuzz", (*RUNTIME, "hqm_fuzz.c"), *SANITIZERS)


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
