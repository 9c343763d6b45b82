"""Integer records as one file for C: portable C99, no allocation, the NumPy executor's bits.

    save(imodel, "net.hqm")                     # one container, checked by the runtime when it opens it
    Runtime(imodel).run(images)                 # through ctypes; compiled by the system's cc on first use
    save_arrays(imodel, "net.c", name="net")    # the same as a const array, for microcontrollers
    program()                                   # the command-line tool: hqm net.hqm --cifar10 test_batch.bin

The sources and a Makefile are in ``hq_lib/c``.
"""

from hq_lib.deploy.c.arrays import save_arrays
from hq_lib.deploy.c.build import CompilerError, compiler, library, program
from hq_lib.deploy.c.container import ExportError, save, to_bytes
from hq_lib.deploy.c.runtime import ContainerError, Runtime

__all__ = [
    "CompilerError",
    "ContainerError",
    "ExportError",
    "Runtime",
    "compiler",
    "library",
    "program",
    "save",
    "save_arrays",
    "to_bytes",
]
