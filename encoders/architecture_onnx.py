"""From an ONNX file to the graph of its network; the values of its weights are not read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmpt.encoders.architecture_graph import UNKNOWN, ArchitectureGraph, Shape
from mmpt.errors import DataError

_NAMES = {
    "Relu": "relu", "Gelu": "gelu", "Sigmoid": "sigmoid", "HardSigmoid": "hardsigmoid", "HardSwish": "hardswish",
    "Tanh": "tanh", "Elu": "elu", "LeakyRelu": "leaky_relu", "PRelu": "leaky_relu", "Mish": "mish",
    "Softplus": "softplus", "Swish": "silu", "Clip": "relu6", "Softmax": "softmax", "LogSoftmax": "softmax",
    "GlobalAveragePool": "glob_avg", "ReduceMean": "glob_avg", "GlobalMaxPool": "max_pool", "Concat": "concat",
    "Flatten": "view", "Reshape": "reshape", "Transpose": "permute", "Squeeze": "squeeze", "Unsqueeze": "unsqueeze",
    "Slice": "slice", "Gather": "index", "GatherND": "index", "ScatterND": "index", "Split": "split",
    "Expand": "expand", "Tile": "expand", "Pad": "pad", "Div": "div", "Sub": "sub", "Pow": "arithmetic",
    "Sqrt": "arithmetic", "Exp": "arithmetic", "Log": "arithmetic", "Erf": "arithmetic", "Neg": "arithmetic",
    "Where": "arithmetic", "Attention": "scaled_dot_product", "LSTM": "rnn", "GRU": "rnn", "RNN": "rnn",
    "ReduceSum": "reduce", "ReduceMax": "reduce", "ReduceMin": "reduce", "ReduceL2": "l2_norm",
    "LpNormalization": "l2_norm", "Equal": "compare", "Less": "compare", "Greater": "compare", "ArgMax": "compare",
    "DepthToSpace": "reshape", "SpaceToDepth": "reshape", "Einsum": "bmm",
}  # fmt: skip
_NORMS = {
    "BatchNormalization": "bn", "LayerNormalization": "ln", "GroupNormalization": "gn", "InstanceNormalization": "gn",
    "RMSNormalization": "rms_norm", "SimplifiedLayerNormalization": "rms_norm",
}  # fmt: skip
_SAME = {"Identity", "Dropout", "Cast", "CastLike", "Constant", "Shape", "ConstantOfShape", "Range", "Size"}


def read_onnx(path: Path) -> ArchitectureGraph:
    """The graph of an ONNX file.

    Raises:
        DataError: the package `onnx` is missing, or a file that is absent, damaged or empty.
    """
    try:
        import onnx
    except ImportError as error:
        raise DataError(f'{path} needs the package onnx; run: pip install "mmpt[architecture]"') from error
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's errors have no common base
        raise DataError(f"{path} can't be read as ONNX: {error}") from error
    reader = _Reader({w.name: tuple(w.dims) for w in model.graph.initializer})
    reader.node = {i.name: 0 for i in model.graph.input if i.name not in reader.weights}
    for call in model.graph.node:
        options = {a.name: onnx.helper.get_attribute_value(a) for a in call.attribute}
        reader.read(call.op_type, list(call.input), list(call.output), options)
    ends = {reader.node[o.name] for o in model.graph.output if o.name in reader.node}
    if not ends or len(reader.types) < 2:
        raise DataError(f"{path} has no operators between its inputs and outputs")
    parameters = sum(_product(shape) for shape in reader.weights.values())
    return ArchitectureGraph(
        tuple(reader.types),
        tuple(reader.shapes),
        tuple(sorted(reader.edges)),
        path.stem,
        parameters,
        unknown=dict(reader.unknown),
    )


def _product(shape: Shape) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


class _Reader:
    def __init__(self, weights: dict[str, Shape]) -> None:
        self.weights = weights  # also what is computed from weights alone
        self.types: list[str] = ["input"]
        self.shapes: list[Shape] = [()]
        self.edges: set[tuple[int, int]] = set()
        self.node: dict[str, int] = {}
        self.unknown: Counter[str] = Counter()

    def read(self, name: str, inputs: list[str], outputs: list[str], options: dict[str, Any]) -> None:
        """One operator, in the order of the file, which ONNX demands to be topological."""
        sources = list(dict.fromkeys(self.node[i] for i in inputs if i in self.node))
        shapes = [self.weights[i] for i in inputs if i in self.weights]
        if not sources or name == "Shape":
            if shapes:
                self.weights.update(dict.fromkeys(outputs, shapes[0]))
            return
        node = self._record(name, sources, shapes, options)
        self.node.update(dict.fromkeys((o for o in outputs if o), node))

    def _record(self, name: str, sources: list[int], shapes: list[Shape], options: dict[str, Any]) -> int:
        shape = shapes[0] if shapes else ()
        if name in _SAME:
            return sources[-1]
        if name in ("Conv", "ConvTranspose"):
            kind = "conv" if options.get("group", 1) == 1 else "sep_conv"
            if kind == "sep_conv" and min(options.get("dilations") or [1]) > 1:
                kind = "dil_conv"
            kind = {3: "conv1d", 5: "conv3d"}.get(len(shape), kind) if name == "Conv" else "conv_transpose"
            return self._with_bias(self._add(kind, shape, sources), shapes[1:])
        if name in ("Gemm", "MatMul") and shape:
            # Gemm with transB, and what torch exports as MatMul, hold (out, in) and (in, out)
            size = shape if options.get("transB") else tuple(reversed(shape))
            return self._with_bias(self._add("conv", size, sources), shapes[1:])
        if name in _NORMS:
            return self._add(_NORMS[name], shape, sources)
        if name in ("MaxPool", "AveragePool", "LpPool"):
            size = tuple(options.get("kernel_shape", ()))[-2:]
            return self._add("max_pool" if name == "MaxPool" else "avg_pool", (1, 1, *size), sources)
        if name in ("Resize", "Upsample"):
            smooth = options.get("mode", b"nearest") != b"nearest"
            return self._add("upsamplebilinear2d" if smooth else "upsamplenearest2d", (), sources)
        if name in ("Add", "Sum", "Mul", "Sub", "Div", "Concat") and len(sources) == 1:
            return self._with_weight(name, sources, shape)
        kind = {"Add": "sum", "Sum": "sum", "Mul": "mul", "MatMul": "bmm"}.get(name) or _NAMES.get(name, UNKNOWN)
        if kind == UNKNOWN:
            self.unknown[name] += 1
        return self._add(kind, (), sources)

    def _with_weight(self, name: str, sources: list[int], shape: Shape) -> int:
        if _product(shape) <= 1 or name == "Concat":  # scaling by a number
            return self._add("concat", (), sources) if name == "Concat" and shape else sources[-1]
        if name in ("Mul", "Div"):
            return self._add("mul", shape, sources)
        return self._add("bias" if max(shape) == _product(shape) else "pos_enc", shape, sources)

    def _with_bias(self, node: int, shapes: Sequence[Shape]) -> int:
        return self._add("bias", shapes[0], [node]) if shapes else node

    def _add(self, kind: str, shape: Shape, sources: Sequence[int]) -> int:
        node = len(self.types)
        self.types.append(kind)
        self.shapes.append(shape)
        self.edges.update((a, node) for a in sources)
        return node
