"""Which images to calibrate with: scores, strategies and manifests that make a set reproducible.

``metrics`` smoothness of pixels; ``features`` scores and selections from a network's features; ``strategies`` from
scores to a set; ``manifest`` a set as a verified file; ``agreement`` whether a score predicts anything.
"""

from hq_lib.ptq.selection import features
from hq_lib.ptq.selection.agreement import paired_difference, spearman
from hq_lib.ptq.selection.manifest import Manifest, from_images, read, take, write
from hq_lib.ptq.selection.metrics import METRICS, score
from hq_lib.ptq.selection.strategies import Strategy, check_set, draw_pool, select
