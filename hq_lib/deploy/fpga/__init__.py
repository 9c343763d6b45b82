"""FPGA files: memory images of any integer record, and seed 002's (FPGAI) formats and arithmetic with an exporter.

    write_images(imodel, folder)                        # hex or coe, a manifest: every operation, packed weights
    narrowed(imodel, 18)                                # multipliers for one DSP slice each, and their largest error
    integer.run(read_images(folder), images)            # rebuilt from the files alone, with NumPy

    net = read_net(folder, "lenet", LENET)              # or read_tuple(path, LENET)
    logits = run(net, images)                           # raw uint8 pixels -> the C program's integers
    record_of(net, (1, 28, 28))                         # the same integers in NumPy, C and memory images
    net = exporter.export(float_net, example)           # a chain with ReLU or ReLU1; eight-bit multipliers
    write_net(net, folder, "lenet")

The module ``exporter`` and ``read_tuple`` alone need torch.
"""

from hq_lib.deploy.fpga.formats import read_net, read_tuple, write_net
from hq_lib.deploy.fpga.fpgai import LENET, FpgaiError, FpgaiLayer, Stage, int32_overflows, record_of, run
from hq_lib.deploy.fpga.memory_image import narrowed, read_images, write_images
