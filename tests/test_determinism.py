"""Same seed, same digits: over two runs, and over one and two threads.

Integers, selections and reconstructions must not move; trained weights may with the thread count, which every row
names (`provenance.device`).
"""

import pytest
import torch
from integer_nets import images, quantized
from torch import Tensor

from hq_lib import integer, ptq
from hq_lib.graph import BitPolicy, calibrate, quantize
from hq_lib.integer.storage import to_bytes
from hq_lib.models import build
from hq_lib.ptq import selection
from hq_lib.results import provenance


def runs(result):
    """``result()`` on one thread, on one again, and on two."""
    found, threads = [], torch.get_num_threads()
    try:
        for n in (1, 1, 2):
            torch.set_num_threads(n)
            torch.manual_seed(5)
            found.append(result())
    finally:
        torch.set_num_threads(threads)
    return found


def pictures(n: int) -> Tensor:
    return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("requantizer", ["float32", "fixed"])
def test_integers_of_a_quantized_network(requantizer):
    qnet, x = quantized("residual", BitPolicy("minmax:4", "minmax:4")), images(64)

    def logits():
        record = integer.lower(qnet, requantizer=requantizer)
        return to_bytes(record), integer.run(record, x).tobytes()

    once, again, two_threads = runs(logits)
    assert once == again == two_threads


@pytest.mark.parametrize("metric", [None, *selection.METRICS])
def test_selected_images(metric):
    pool = pictures(300)

    def chosen():
        scores = selection.score(pool, metric) if metric else None
        how = {"strategy": "lowest"} if metric else {"strategy": "random", "n_images": len(pool)}
        return selection.select(scores, 40, seed=2, **how).tolist()

    once, again, two_threads = runs(chosen)
    assert once == again == two_threads


def test_reports_of_a_reconstruction():
    x = images(32, seed=3)

    def reports():
        qnet = quantized("residual", BitPolicy("minmax:3", "lsq_plus:3", bn="fold"))
        found = ptq.reconstruct(qnet, x, ptq.qdrop(iterations=5, n_images=32, batch_size=8))
        return [(r.name, r.loss_before, r.loss_after, r.undecided_pct) for r in found], qnet(x).tolist()

    once, again, two_threads = runs(reports)
    assert once == again == two_threads


@pytest.mark.slow
def test_calibrated_ranges_of_a_network_of_the_workbook():
    net, x = build("resnet20").eval(), torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def ranges():
        qnet = quantize(net, BitPolicy("aciq:4", "aciq:4", bn="fold"), x[:1])
        calibrate(qnet, x)
        return {key: value.tolist() for key, value in qnet.state_dict().items() if "quantizer" in key}

    once, again, two_threads = runs(ranges)
    assert once == again
    assert len(once) > 20
    assert once == two_threads


def test_rows_name_the_number_of_threads():
    once, _, two_threads = runs(provenance.device)
    assert once.endswith(", 1 thread")
    assert two_threads.endswith(", 2 threads")
