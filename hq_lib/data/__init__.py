"""Data sets as uint8 tensors in memory, verified by hash, with a validation split cut from train.

>>> from hq_lib import data
>>> train, val, test = (data.load("cifar10", split) for split in ("train", "val", "test"))
"""

from hq_lib.data.batches import augment, batches, normalize
from hq_lib.data.fetch import DataUnavailableError
from hq_lib.data.sets import SPECS, DataSpec, ImageSet, load, load_or_embedded
