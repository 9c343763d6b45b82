"""A frozen network from its file, carried on: NumPy, C, ONNX Runtime and ideal arrays give one set of logits."""

import numpy as np
import pytest
from integer_nets import float_net, images

from hq_lib import crossbar, graph, integer
from hq_lib.deploy import c, onnx
from hq_lib.deploy.c.runtime import CompilerError
from hq_lib.graph import BitPolicy, calibrate, quantize

METHODS = ("minmax", "dorefa", "dorefa_hw", "pact", "mpact", "lsq", "lsq_plus", "dsq", "aciq")


def executors(model: integer.IntegerModel) -> dict[str, np.ndarray]:
    """The logits of every executor on the same images."""
    x = images(6, seed=5).contiguous()
    found = {"onnx": onnx.run(onnx.session(onnx.export(model)), x.numpy())}
    try:
        found["c"] = c.Runtime(model).run(x.numpy())
    except CompilerError:
        print("no C compiler: C is left out")
    if all(op.weight_bits <= 8 for op in model.layers()):
        found["arrays"] = crossbar.EngineNetwork(model, crossbar.IdealEngine()).run(x)
    return {"numpy": integer.run(model, x), **found}


@pytest.mark.parametrize(
    "bits", [1, 3, 16, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (2, 4, 5, 6, 7, 8))]
)
@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_one_network_in_every_executor(tmp_path, method, axis, bits):
    act = "lsq_plus" if bits == 1 else method  # a signed activation of one bit has no level at 0
    a_bits = 8 if bits == 16 else max(bits, 2)  # 16 by 16 bits is more than an int32 accumulator holds
    policy = BitPolicy({"method": method, "bits": bits, "axis": axis}, f"{act}:{a_bits}", bn="fold")
    qnet = quantize(float_net("residual"), policy, images(1))
    calibrate(qnet, images(16))
    file = graph.save(qnet.eval(), tmp_path / "net.safetensors", form="frozen")
    again = graph.load(file, net=float_net("residual"))
    try:
        model = integer.lower(again)
    except (integer.LowerError, integer.RecordError) as error:
        if bits < 16:  # a method with 2^16 + 1 levels, or sums beyond int32: the layer is named
            raise
        pytest.skip(str(error))
    logits = executors(model)
    for name, found in logits.items():
        np.testing.assert_array_equal(found, logits["numpy"], err_msg=name)
    integer.round_biases(again)
    fake = again(images(6, seed=5)).detach().numpy()
    assert np.abs(fake - logits["numpy"]).max() <= 0.1 * np.abs(logits["numpy"]).max()
