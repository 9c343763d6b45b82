"""hq_lib: from float CNNs to low-bit, integer-only and analog-crossbar inference.

Glossary (one word per concept, everywhere):
    w, x            real weight, real activation of one layer
    x_int, x_hat    grid index of x; the real value that the index stands for
    scale           real units per grid step, > 0
    zero_point      grid index of real 0
    qmin, qmax      ends of the grid, inclusive
    bits            width of a grid; 32 means "left in float"
    alpha           PACT's learned clip; DSQ's characteristic is ``dsq_alpha``
    n_calib         number of calibration images
    acc_pct         top-1 accuracy, percent
    profile         smoke (seconds, CI), quick (minutes, two cores), full (the published protocol)
"""

__version__ = "0.1.0"
