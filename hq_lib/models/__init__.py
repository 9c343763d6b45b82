"""Networks by name, and their weights on disk.

>>> from hq_lib import models
>>> net = models.build("resnet20", option="B")
"""

from hq_lib.models.checkpoints import (
    build_recorded,
    digest,
    load_checkpoint,
    read_checkpoint,
    rounded_to,
    save_checkpoint,
    write_checkpoint,
)
from hq_lib.models.mobile import TAKEN
from hq_lib.models.public import IMAGENET_MEAN_STD, CheckpointError, fetched, load_public, resnet20_akamaster
from hq_lib.models.zoo import (
    IMAGENET,
    build,
    builder,
    count_macs,
    count_madds_thop,
    count_parameters,
    names,
    published,
)
