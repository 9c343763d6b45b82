"""Integer records as one file for C: portable C99, no allocation, the NumPy executor's bits.

    to_bytes(imodel)                            # one container, checked by the runtime when it opens it
    Runtime(imodel).run(images)                 # through ctypes; compiled by the system's cc on first use
    export_folder(imodel, "firmware", image)    # sources, network and image as constants, Makefile: for a board
    program()                                   # the command-line tool: hqm net.hqm --cifar10 test_batch.bin

The sources and a Makefile are in ``src``.
"""

from hq_lib.deploy.c.board import export_folder
from hq_lib.deploy.c.container import ExportError, to_bytes
from hq_lib.deploy.c.runtime import CompilerError, ContainerError, Runtime, compiler, library, program
