"""ACIQ (arXiv:1810.05723): analytic clipping, bits per channel, bias correction. Seed 000 calls it "AICQ".

``clip`` closed-form ratios and the noise model; ``exact`` the same without the model, per grid, and all
constants side by side; ``ranges`` a tensor's
statistics to its range; ``weights`` bit allocation and bias correction.
"""

from hq_lib.quantizers.aciq.clip import PUBLISHED, Prior, clip_ratio, noise_mse
from hq_lib.quantizers.aciq.exact import GridKind, constants, grid_clip_ratio, grid_mse
from hq_lib.quantizers.aciq.ranges import Fit, ReluVariant, advised_range, clip_range, fit, predicted_mse
from hq_lib.quantizers.aciq.weights import Correction, absorb, allocate_bits, bias_correction, window_sum_mean
