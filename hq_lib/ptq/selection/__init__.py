"""Which images to calibrate with: ``scores`` of images, ``sets`` chosen by them and kept as verified files."""

from hq_lib.ptq.selection.scores import (
    METRICS,
    bn_distance,
    channel_moments,
    herding,
    k_center,
    knowledge_distance,
    paired_difference,
    reconstruction_error,
    score,
)
from hq_lib.ptq.selection.sets import (
    Manifest,
    ManifestError,
    Strategy,
    check_set,
    draw_pool,
    from_images,
    read,
    select,
    take,
    write,
)
