"""What TensorRT's ONNX parser takes, as NVIDIA documents it: operators, types of their data, restrictions, limits.

Facts copied from the sources below and nothing measured. `tensorrt.check` reads this table, and asks TensorRT-RTX where
that is installed; where the documentation changes, change it here.
"""

from __future__ import annotations

VERSION = "TensorRT 10.15"
"""The release whose parser documentation the operators, types and restrictions below are from."""

OPSETS = (9, 24)
"""First and last version of ai.onnx that this parser takes."""

OPERATORS = "https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md"
PARSER = "https://github.com/onnx/onnx-tensorrt/blob/main/ModelImporter.cpp"
DOCS = "https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/operators/"
DIMS = "https://docs.nvidia.com/deeplearning/tensorrt/api/c_api/classnvinfer1_1_1_dims64.html"

MAX_RANK = 8  # nvinfer1::Dims::MAX_DIMS
MAX_TOPK = 3840
MAX_ELEMENTS = 2**31 - 1
LIMITED = {"TopK": "TopK", "Scatter": "Scatter", "ScatterElements": "Scatter", "ScatterND": "Scatter"}
"""Operators with at most that many elements in each input and output, and the page of DOCS that says so."""

_BY_TYPES = {
    "FP32 FP16 BF16": (
        "Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos Cosh "
        "CumSum Dropout Einsum Elu Erf Exp Floor GRU Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool GroupNormalization "
        "HardSigmoid HardSwish Hardmax ImageScaler InstanceNormalization IsInf LRN LSTM LayerNormalization LeakyRelu Log "
        "LogSoftmax LpNormalization LpPool MatMul MaxPool MeanVarianceNormalization PRelu ParametricSoftplus "
        "QuantizeLinear RMSNormalization RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike Reciprocal "
        "Resize RotaryEmbedding Round ScaledTanh Scan Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh "
        "ThresholdedRelu Upsample"
    ),
    "FP32 FP16 BF16 INT32 INT64": (
        "Abs Add ArgMax ArgMin DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less LessOrEqual Max Min Mod Mul Neg "
        "Pad Pow Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum "
        "ReduceSumSquare Relu Scatter ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TopK"
    ),
    "FP32 FP16 BF16 INT32 INT64 BOOL": (
        "Concat Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop OneHot Reshape ReverseSequence "
        "Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where"
    ),
    "FP32 FP16": ("BlackmanWindow DeformConv GridSample HammingWindow HannWindow Mish NonMaxSuppression NonZero RoiAlign"),
    "BOOL": ("And Not Or Xor"),
    "FP32 FP16 BF16 INT32 INT64 UINT8 BOOL": ("Cast CastLike"),
    "FP32 FP16 BF16 FP8 FP4 INT4 INT32 INT64 BOOL": ("Constant ConstantOfShape"),
    "FP32 FP16 BF16 INT8 FP8": ("Attention"),
    "INT8 FP8 FP4 INT4": ("DequantizeLinear"),
    "FP32 FP16 BF16 INT8 INT32 INT64": ("Gelu"),
    "FP32 FP16 BF16 FP8 INT32 INT64": ("Mean"),
    "FP32": ("STFT"),
    "FP32 FP16 BF16 INT32": ("TensorScatter"),
}

TYPES: dict[str, frozenset[str]] = {
    operator: frozenset(types.split()) for types, operators in _BY_TYPES.items() for operator in operators.split()
}
"""The types that the data of an operator may have. DOUBLE is taken as well, and cast down to FP32."""

_NOT_SUPPORTED = """
    AffineGrid Bernoulli BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor CenterCropPad Col2Im Compress
    ConcatFromSequence ConvInteger DFT Det DynamicQuantizeLinear ImageDecoder MatMulInteger MaxRoiPool MaxUnpool
    MelWeightMatrix Multinomial NegativeLogLikelihoodLoss Optional OptionalGetElement OptionalHasElement QLinearConv
    QLinearMatMul RegexFullMatch SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert
    SequenceLength SequenceMap SoftmaxCrossEntropyLoss SplitToSequence StringConcat StringNormalizer StringSplit
    TfIdfVectorizer Unique
"""
UNSUPPORTED = frozenset(_NOT_SUPPORTED.split())
"""Operators that the documentation lists as not supported. One in neither table is unknown, and refused as well."""

DATA: dict[str, tuple[str, int]] = {
    **dict.fromkeys(("Constant", "ConstantOfShape", "EyeLike", "RandomNormal", "RandomUniform"), ("output", 0)),
    "Where": ("input", 1),
    "OneHot": ("input", 2),
    "Loop": ("input", 2),
    "If": ("output", 0),
}
"""Which value's type the table means, where it is not the first input's."""

_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")

CONSTANT_INPUTS: dict[str, tuple[int, str]] = {
    **{f"Reduce{name}": (1, "axes") for name in _REDUCTIONS},
    "CumSum": (1, "axis"),
    "Dropout": (2, "training_mode"),
    "OneHot": (1, "depth"),
    "Squeeze": (1, "axes"),
    "Unsqueeze": (1, "axes"),
}
"""Inputs whose value must be known when the engine is built."""

ONE_OUTPUT = frozenset({"Attention", "AveragePool", "LayerNormalization", "LpPool", "MaxPool"})
"""Operators of which the first output alone is supported."""

NO_ATTRIBUTES = {
    "Attention": ("softcap", "qk_matmul_output_mode"),
    "Constant": ("sparse_value", "value_string", "value_strings"),
}
"""Attributes that may be neither given nor, where they have a default, other than 0."""

DATA_DEPENDENT = {"NonZero": "NonZero", "NonMaxSuppression": "NMS"}
"""Operators whose output's shape depends on data, so that no optimisation profile bounds it; their pages of DOCS."""

UNCHECKED = {
    "DeformConv": "1-D or 2-D input, equal pads at both ends",
    "DequantizeLinear": "zero points must be zero",
    "EyeLike": "the input must have static dimensions",
    "GRU": "both directions must have the same activations",
    "Hardmax": "the axis' extent must be a build-time constant",
    "LSTM": "the same activations in both directions, input_forget and layout 0",
    "Loop": "no scan output of dynamic length, carried shapes the same in every iteration",
    "QuantizeLinear": "zero points must be zero",
    "RNN": "both directions must have the same activations",
    "Resize": "some coordinate, nearest and aspect modes only, no antialiasing",
    "STFT": "frame_step and window must be initializers, real input",
    "TensorScatter": "4-D cache and update, axis -2",
}
"""Documented restrictions that the checker does not evaluate: it names the node, and someone has to look."""
