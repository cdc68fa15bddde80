"""Names that options, files and the code behind them share, known without PyTorch."""

from __future__ import annotations

from typing import Literal

CompressorKind = Literal["conv", "pca", "mlp"]
CompressedColumn = Literal["features", "cls"]
"""What a compressor is fitted to: the column of a store with patch features, or with class tokens."""
Estimator = Literal["alignment", "local", "drawn"]
"""What estimates the encoder's features without the image: from the latents, from the local map, or from the local map
that a run draws given the latents."""
FeatureKind = Literal["class-token", "patch-mean"]
"""What stands for an image: the class token after the final norm, or the mean of the last chosen layer's patches."""
Weights = Literal["ema", "model"]
"""Of a checkpoint: the averaged ones, or those that are trained."""
GraphFormat = Literal["onnx", "torch"]
"""What the networks of an exported run are written as."""
GraphPrecision = Literal["float32", "float16", "int8"]
"""Of the weights of an exported run, in graphs."""
StoredPrecision = Literal["float32", "float16", "float8"]
"""Of the weights of a run that is shared. float8 is e4m3: four bits of exponent, three of mantissa."""
INCEPTION = "inception"
"""The name by which the network of FID is loaded from the internet, or from torch.hub's cache."""
PAGE = "samples.html"
"""In a folder of samples: the page on which to look at them."""
NO_ENCODER = "none"
"""In place of a vision encoder."""
LOCAL_CODES = "local."
CLASS_TOKEN_CODES = "cls."
"""What the names of columns that hold a compressor's codes begin with, for maps and for class tokens."""


def codes_column(name: str, column: CompressedColumn) -> str:
    """The column with the codes of compressor `name`, which was fitted to `column`."""
    return (LOCAL_CODES if column == "features" else CLASS_TOKEN_CODES) + name


DatasetFormat = Literal["coco", "yolo", "voc", "masks"]
"""In which a data set of images with masks is written."""
