"""Other libraries' int8, each put on a model as its documentation says, with ranges from photos."""

import torch
from torch import nn

from testreg.judging.quantise import Ranges


def ao_weights(model, photos):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model


def ao_dynamic(model, photos):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def ao_static(model, photos):
    from torchao.quantization import Int8StaticActivationInt8WeightConfig, PerRow, PerTensor, quantize_

    with Ranges(model) as ranges, torch.no_grad():
        model(photos)
    for name, (low, high) in {name: ranges.range(name) for name in ranges.images}.items():
        scale = (torch.maximum(-low, high) / 127).reshape((1, 1) if name == "classifier" else (1, 1, 1))  # as its input
        config = Int8StaticActivationInt8WeightConfig(act_quant_scale=scale, granularity=[PerTensor(), PerRow()])
        quantize_(model, config, filter_fn=lambda module, path, name=name: path == name)
    return model


def quanto(model, photos):
    from optimum.quanto import Calibration, freeze, qint8, quantize

    quantize(model, weights=qint8, activations=qint8)
    with Calibration(), torch.no_grad():
        model(photos)
    freeze(model)
    return model


def torch_dynamic(model, photos):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


QUANTISERS = {
    "torchao weights": ("torchao", ao_weights, 0.99),
    "torchao dynamic": ("torchao", ao_dynamic, 0.98),
    "torchao static": ("torchao", ao_static, 0.9),
    "quanto static": ("optimum.quanto", quanto, 0.9),
    "torch.ao dynamic": ("torch", torch_dynamic, 0.9),
}
