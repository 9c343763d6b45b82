"""Every table and figure of the paper: its id, what it shows, and the notebook that makes it.

The Snakefile, the map (00) and the gallery (10) all read this list; an id that no notebook makes yet is shown as n/r.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from hq_lib.results import paths

FIGURE_ENDINGS = ("pdf", "png")
TABLE_ENDINGS = ("csv", "md", "tex")


@dataclass(frozen=True)
class Output:
    """One table or figure."""

    id: str
    """File name without ending; ``tab_...`` or ``fig_...``."""
    notebook: str
    """The notebook that makes it, without ending."""
    content: str
    """What it shows, in a few words."""

    def files(self, profile: str) -> list[Path]:
        """Where its files are (or will be) in a profile."""
        endings = FIGURE_ENDINGS if self.id.startswith("fig") else TABLE_ENDINGS
        return [paths.figures_dir(profile) / f"{self.id}.{ending}" for ending in endings]

    def made(self, profile: str) -> bool:
        """Whether all its files are there."""
        return all(file.exists() for file in self.files(profile))


FLOAT, FOLD, QAT = "01_float_training", "02_bn_fold", "03_dsq_pact_qat"
PTQ, SELECTION, HYBRID = "04_aciq_qdrop_ptq", "05_calibration_selection", "06_hybrid_precision"
INTEGER, CROSSBAR, EDGE, GALLERY = "07_integer_export", "08_crossbar", "09_edge_cloud", "10_gallery"
YOURS = "11_your_network"

OUTPUTS = (
    Output("tab_float_training", FLOAT, "the float networks: size, test accuracy, published accuracy"),
    Output("fig_float_training", FLOAT, "learning curves"),
    Output("tab_bn_fold", FOLD, "how exact the fold is, network by network"),
    Output("fig_bn_ranges", FOLD, "per-channel weight ranges before and after the fold"),
    Output("fig_dsq_curve", QAT, "DSQ's soft staircase and its gradient"),
    Output("fig_pact_alpha", QAT, "PACT's learned clips over training"),
    Output("tab_resnet20_methods", QAT, "ResNet-20: bits x methods beside the published numbers"),
    Output("tab_qat_integers", QAT, "the trained networks fake-quantized and in integers"),
    Output("tab_branches", QAT, "ResNet-20 with branch outputs and block inputs in float"),
    Output("tab_toynet", QAT, "ToyNet: the group's configurations x methods"),
    Output("tab_mobilenetv2", QAT, "MobileNetV2: the group's configurations x methods"),
    Output("tab_resnet20", QAT, "ResNet-20: the group's configurations x methods"),
    Output("tab_aciq_constants", PTQ, "ACIQ's optimal clips, closed form against the published table"),
    Output("fig_aciq_mse", PTQ, "predicted against measured quantization error per layer"),
    Output("tab_ptq", PTQ, "post-training methods x bits"),
    Output("tab_ptq_official", PTQ, "the public ResNet-20: ours beside the official code, schedule by schedule"),
    Output("fig_error_accumulation", PTQ, "error after each block"),
    Output("fig1_framework", SELECTION, "the selection framework"),
    Output("tab1_w2a2", SELECTION, "BRECQ and QDrop with and without selected images, W2A2"),
    Output("fig2a_w4a4", SELECTION, "the same at W4A4"),
    Output("fig2b_w3a3", SELECTION, "the same at W3A3"),
    Output("fig2c_w2a4", SELECTION, "the same at W2A4"),
    Output("tab_selection", SELECTION, "every way of choosing calibration images against random, paired by draw"),
    Output("fig_smoothness", SELECTION, "smoothness against reconstruction loss and accuracy"),
    Output("fig_n_calib", SELECTION, "accuracy against the number of calibration images"),
    Output("fig_hybrid_bits", HYBRID, "accuracy over weight x activation bits with the hybrid rule"),
    Output("fig_layer_sensitivity", HYBRID, "one layer quantized at a time"),
    Output("fig_pareto", HYBRID, "accuracy against size of searched bit assignments"),
    Output("tab_support_matrix", INTEGER, "networks x executors: accuracy, agreement, size, time"),
    Output("fig_integer_agreement", INTEGER, "integer against fake-quantized, layer by layer"),
    Output("tab_biases", INTEGER, "what biases that no accumulator holds change in each tensor"),
    Output("fig_mvm_scatter", CROSSBAR, "measured against ideal dot products"),
    Output("fig_mvm_calibration", CROSSBAR, "error before and after calibration"),
    Output("fig_crossbar_accuracy", CROSSBAR, "accuracy against noise, ADC bits, array size, stuck cells"),
    Output("fig_drift", CROSSBAR, "accuracy against time since programming"),
    Output("tab_error_budget", CROSSBAR, "one non-ideality at a time"),
    Output("tab_trained_arrays", CROSSBAR, "trained networks, exact and on RRAM"),
    Output("tab_slices", CROSSBAR, "weights in slices: cells, conversions, accuracy"),
    Output("fig_noise_aware", CROSSBAR, "accuracy against programming error by weight noise in training"),
    Output("tab_crossbar_cost", CROSSBAR, "conversions and cells; energy as an estimate"),
    Output("fig_edge_cloud", EDGE, "accuracy against KiB sent, by cut layer and bits on the wire"),
    Output("tab_edge_cloud", EDGE, "the same as numbers, with the share of the network that runs on the edge"),
    Output("tab_your_network", YOURS, "one's own network and pictures, from float to an analog array"),
    Output("tab_overview", GALLERY, "the paper in one table: ResNet-20 from float to analog arrays"),
)


def of_notebook(notebook: str) -> list[Output]:
    """The outputs of one notebook."""
    return [output for output in OUTPUTS if output.notebook == notebook]


def written() -> list[str]:
    """Notebooks that exist and make outputs, in order."""
    made = dict.fromkeys(output.notebook for output in OUTPUTS)
    return [name for name in made if (paths.ROOT / "notebooks" / f"{name}.ipynb").exists()]


def status(profile: str) -> pd.DataFrame:
    """One line an output: id, notebook, content and whether it is made in this profile ("yes" or "n/r").

    The id of what is made is a Markdown link to its file, the notebook one to itself, both as seen from ``notebooks/``.
    """
    lines = []
    for output in OUTPUTS:
        made, file = output.made(profile), output.files(profile)[1]  # .png or .md
        here = Path(os.path.relpath(file, paths.ROOT / "notebooks")).as_posix()
        name = f"[{output.id}]({here})" if made else output.id
        maker = f"[{output.notebook}]({output.notebook}.ipynb)"
        lines.append((name, maker, output.content, "yes" if made else "n/r"))
    return pd.DataFrame(lines, columns=["id", "notebook", "content", "made"])
