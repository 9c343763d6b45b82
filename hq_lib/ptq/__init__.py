"""Post-training quantization: ranges from calibration images, then rounding learned block by block.

    qnet = quantize(net, BitPolicy("minmax:4", "lsq_plus:4", placement="academic", bn="fold"), images[:1])
    ptq.fit_weights(qnet, "mse")                              # a grid per output channel
    ptq.fit_acts(qnet, images[:256], "mse")                   # one-shot, from float activations
    ptq.reconstruct(qnet, images, ptq.qdrop(iterations=500), folder=run_folder, progress=print)
    integer.lower(qnet, images=spec)                          # the image, float in this policy, on 8 bits

``ranges`` method name -> grids; ``config`` every switch, and AdaRound, BRECQ and QDrop as settings of it;
``reconstruction`` the loop, with QDrop's masks; ``units`` its regions, their activations inside a memory budget,
BRECQ's weights of the loss, and how the error grows block by block; ``progress`` reports and the files of a run;
``equalization`` ranges evened out before quantizing, means corrected and batch norms measured again after it;
``allocation`` ACIQ's bits per channel and its correction of moments; ``bits`` mixed precision; ``selection`` of images.
"""

from hq_lib.ptq.allocation import correct_moments, fit_allocated
from hq_lib.ptq.config import ReconstructionConfig, adaround, brecq, qdrop
from hq_lib.ptq.equalization import correct_means, equalize, reestimate_norms
from hq_lib.ptq.progress import ReconstructionError, UnitReport
from hq_lib.ptq.ranges import find_grid, fit_acts, fit_weights
from hq_lib.ptq.reconstruction import reconstruct
from hq_lib.ptq.units import block_errors
