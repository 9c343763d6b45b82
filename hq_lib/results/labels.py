"""The words printed in tables and figures for the keys that rows carry, and the ids of outputs."""

import re

# Key in result rows and in data/published.csv → name in print, in the order in which tables list them.
METHOD_LABELS = {
    "float": "float",
    "minmax": "min-max", "percentile": "percentile", "mse": "MSE ranges", "aciq": "ACIQ", "lapq": "LAPQ",
    "adaround": "AdaRound", "brecq": "BRECQ", "qdrop": "QDrop", "pd_quant": "PD-Quant", "mrecg_qdrop": "MRECG + QDrop",
    "captq_brecq": "CaPTQ + BRECQ", "captq_qdrop": "CaPTQ + QDrop", "fx_ptq": "torch.fx PTQ",
    "ste": "STE", "dorefa": "DoReFa", "dorefa_paper": "DoReFa (paper's clip)", "dorefa_hw": "DoReFa (hardware)",
    "pact": "PACT", "mpact": "mPACT",
    "mpact_fixed": "mPACT, fixed clips", "mpact_integer": "mPACT, in integers",
    "lsq": "LSQ",
    "lsq_paper": "LSQ (paper's start)",
    "lsq_plus": "LSQ+", "dsq": "DSQ", "lq_nets": "LQ-Nets", "apot": "APoT", "bnn": "BNN", "xnor": "XNOR-Net",
    "ir_net": "IR-Net", "sd_bnn": "SD-BNN", "ir2net": "IR2Net", "wageubn": "WAGEUBN", "sbm": "SBM", "cpt": "CPT",
    "unified_int8": "unified INT8", "distributed_int8": "distributed INT8", "fpgai": "FPGAI",
    "fake_quant": "fake-quantized", "numpy": "NumPy", "c": "C", "onnx": "ONNX Runtime",
}  # fmt: skip
MODEL_LABELS = {
    "lenet": "LeNet", "lenet_relu1": "LeNet (ReLU1)", "lenet_mnist": "LeNet (MNIST)",
    "vgg_small": "VGG-Small", "vgg11": "VGG-11", "resnet20": "ResNet-20", "resnet32": "ResNet-32",
    "resnet44": "ResNet-44", "resnet56": "ResNet-56", "toynet": "ToyNet", "mobilenetv2": "MobileNetV2",
    "mobilenetv2_seed": "MobileNetV2 (seed form)", "mobilenetv2_imagenet": "MobileNetV2 (ImageNet)",
    "resnet18": "ResNet-18", "resnet50": "ResNet-50", "resnet101": "ResNet-101", "regnetx_600m": "RegNetX-600M",
    "mnasnet2_0": "MNASNet-2.0", "efficientnet_lite0": "EfficientNet-Lite0",
    "efficientnet_lite1": "EfficientNet-Lite1", "efficientnet_lite2": "EfficientNet-Lite2",
}  # fmt: skip
_PRINTED = {"method": METHOD_LABELS, "model": MODEL_LABELS}


def printed(column: str, key: object) -> str:
    """What a table shows for a cell of ``column``: the method's or model's name, a whole number without ``.0``."""
    if isinstance(key, float) and key.is_integer():
        return str(int(key))
    return _PRINTED.get(column, {}).get(str(key), str(key))


def bits_label(w_bits: float, a_bits: float) -> str:
    """``W4A4``; ``float`` where both are 32."""
    return "float" if w_bits == a_bits == 32 else f"W{w_bits:g}A{a_bits:g}"


def check_id(name: str, kind: str) -> str:
    """The id itself where it is one of ``kind`` (``fig`` or ``tab``), e.g. ``tab1_w2a2``; else ``ValueError``."""
    if not re.fullmatch(rf"{kind}[0-9]*[a-z]?_[a-z0-9_]+", name):
        raise ValueError(f"{name!r} is no id of a {kind}: write {kind}_ and lower-case words, as in {kind}_resnet20")
    return name
