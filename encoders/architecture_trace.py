"""From a network to its graph: one forward pass on the meta device, where no number is ever computed.

Every call of a torch function is seen as it happens, so that control flow, several outputs and shared weights need no
special treatment. torch.export gives the same layers (the tests compare them) in about ten times the time.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mmpt.encoders.architecture_graph import EXTRA, RELEASED, UNKNOWN, ArchitectureGraph, Shape
from mmpt.errors import DataError

VERSION = 1
"""Changes whenever the graph of some network would be another one; part of the key of caches."""

_SAME = frozenset(
    [
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "alpha_dropout",
        "feature_dropout",
        "contiguous",
        "clone",
        "to",
        "float",
        "half",
        "double",
        "bfloat16",
        "type",
        "type_as",
        "detach",
        "requires_grad",
        "alias",
        "lift_fresh",
        "cpu",
        "cuda",
        "positive",
        "nan_to_num",
        "set_",
        "fill",
        "rename",
        "refine_names",
        "result_type",
        "as_subclass",
        "zero_",
        "new_zeros",
        "data",
    ]
)
"""Calls that change nothing about the flow of data in evaluation."""

_NAMES = {
    "linear": "conv", "batch_norm": "bn", "layer_norm": "ln", "group_norm": "gn", "instance_norm": "gn",
    "rms_norm": "rms_norm", "embedding": "embedding", "conv1d": "conv1d", "conv3d": "conv3d",
    "conv_transpose1d": "conv_transpose", "conv_transpose2d": "conv_transpose", "conv_transpose3d": "conv_transpose",
    "lstm": "rnn", "gru": "rnn", "rnn_tanh": "rnn", "rnn_relu": "rnn",
    "max_pool1d": "max_pool", "max_pool2d": "max_pool", "max_pool3d": "max_pool", "boolean_dispatch": "max_pool",
    "max_pool2d_with_indices": "max_pool", "avg_pool1d": "avgpool1d", "avg_pool2d": "avg_pool",
    "avg_pool3d": "avg_pool",
    "lp_pool2d": "avg_pool", "prelu": "leaky_relu", "rrelu": "leaky_relu", "swish": "silu", "threshold": "relu",
    "hardtanh": "relu6", "selu": "elu", "celu": "elu", "logsigmoid": "sigmoid", "log_softmax": "softmax",
    "scaled_dot_product_attention": "scaled_dot_product",
    "cat": "concat", "concat": "concat", "concatenate": "concat", "hstack": "concat", "vstack": "concat",
    "flatten": "view", "unflatten": "view", "ravel": "view", "view_as": "view", "reshape_as": "reshape",
    "swapaxes": "transpose", "swapdims": "transpose", "movedim": "permute", "moveaxis": "permute", "mT": "transpose",
    "T": "t", "chunk": "split", "tensor_split": "split", "split_with_sizes": "split", "narrow": "slice",
    "expand_as": "expand", "repeat": "expand", "repeat_interleave": "expand", "tile": "expand",
    "broadcast_to": "expand",
    "flip": "roll", "gather": "index", "take_along_dim": "index", "index_select": "index", "masked_select": "index",
    "scatter": "index", "index_add": "index", "index_copy": "index", "__setitem__": "index", "copy": "index",
    "masked_fill": "arithmetic", "where": "arithmetic", "fold": "unfold", "im2col": "unfold",
    "pixel_shuffle": "reshape", "pixel_unshuffle": "reshape", "channel_shuffle": "reshape",
    "matmul": "bmm", "bmm": "bmm", "__matmul__": "bmm", "__rmatmul__": "bmm", "einsum": "bmm", "baddbmm": "bmm",
    "mm": "mm", "addmm": "mm", "addbmm": "bmm", "bilinear": "bmm", "tensordot": "bmm", "outer": "bmm",
    "normalize": "l2_norm", "norm": "l2_norm", "vector_norm": "l2_norm", "cosine_similarity": "l2_norm",
}  # fmt: skip
_NAMES |= dict.fromkeys(["add", "__add__", "__radd__", "__iadd__", "addcmul"], "sum")
_NAMES |= dict.fromkeys(["sub", "__sub__", "__rsub__", "__isub__", "rsub", "subtract"], "sub")
_NAMES |= dict.fromkeys(["mul", "__mul__", "__rmul__", "__imul__", "multiply"], "mul")
_NAMES |= dict.fromkeys(["div", "__truediv__", "__rtruediv__", "__itruediv__", "true_divide"], "div")
_NAMES |= dict.fromkeys(
    [
        "pow",
        "__pow__",
        "__rpow__",
        "square",
        "sqrt",
        "rsqrt",
        "exp",
        "log",
        "log1p",
        "log2",
        "abs",
        "neg",
        "__neg__",
        "reciprocal",
        "clamp",
        "clip",
        "clamp_min",
        "clamp_max",
        "sin",
        "cos",
        "floor",
        "ceil",
        "round",
        "erf",
        "maximum",
        "minimum",
        "cumsum",
        "tril",
        "triu",
        "fft2",
        "ifft2",
        "rfft2",
        "irfft2",
        "fft",
        "ifft",
        "fftshift",
        "ifftshift",
        "rfft",
        "irfft",
        "view_as_real",
        "view_as_complex",
        "real",
        "imag",
        "angle",
        "complex",
        "floor_divide",
        "fmod",
        "remainder",
        "sign",
        "cumprod",
        "bucketize",
        "softsign",
        "logit",
        "expm1",
        "atan2",
    ],
    "arithmetic",
)
_NAMES |= dict.fromkeys(
    ["sum", "max", "min", "amax", "amin", "var", "std", "var_mean", "std_mean", "prod", "any", "all", "logsumexp"],
    "reduce",
)
_NAMES |= dict.fromkeys(
    [
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "__eq__",
        "__ne__",
        "__lt__",
        "__le__",
        "__gt__",
        "__ge__",
        "logical_and",
        "logical_or",
        "logical_not",
        "__and__",
        "__or__",
        "__invert__",
        "argmax",
        "argmin",
        "topk",
        "sort",
        "argsort",
        "bitwise_not",
        "isnan",
        "isinf",
        "one_hot",
    ],
    "compare",
)
_NAMES |= {name: name for name in [*RELEASED, *EXTRA] if name not in _NAMES and name not in ("input", "reduce")}

_KEEPS_SHAPE = frozenset(
    ["batch_norm", "layer_norm", "group_norm", "relu", "gelu", "silu", "hardswish", "hardsigmoid", "sigmoid"]
)
"""Calls whose output is like their input: on the meta device most of the time would go into finding that out."""

_WEIGHTED = frozenset(
    [
        "conv",
        "sep_conv",
        "dil_conv",
        "conv1d",
        "conv3d",
        "conv_transpose",
        "bn",
        "ln",
        "gn",
        "rms_norm",
        "embedding",
        "rnn",
    ]
)
_NORMS = frozenset(["bn", "ln", "gn", "rms_norm"])
_JOINS = frozenset({"sum", "sub", "mul", "div", "concat", "stack"})
"""Operators that say something only where several flows of data, or data and a weight, meet."""


class _Recorder(TorchFunctionMode):
    """Keeps every call that data flows through.

    Args:
        weights: tensors that are parameters or buffers of the network.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.types: list[str] = ["input"]
        self.shapes: list[Shape] = [()]
        self.edges: set[tuple[int, int]] = set()
        self.unknown: Counter[str] = Counter()
        self.macs = 0
        self.node: dict[int, int] = {}  # id of a tensor with data -> the node that made it
        self.weight: set[int] = {id(w) for w in weights}  # ids of weights and of what is computed from them alone
        self.alive: list[Any] = list(weights)  # an id stays the tensor's own

    def feed(self, value: Any) -> None:
        """Mark the tensors of an input."""
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor):
                self.alive.append(tensor)
                self.node[id(tensor)] = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if any(isinstance(t, Tensor) and not t.is_meta for t in (*args, *kwargs.values())):
            args, kwargs = tree_map_only(Tensor, _ghost, (args, kwargs))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        sources = dict.fromkeys(self.node[id(t)] for t in given if id(t) in self.node)
        weights = [t for t in given if id(t) in self.weight]
        name = _name(func)
        made = _like_input(getattr(func, "__name__", ""), args, kwargs)
        made = func(*args, **kwargs) if made is None else made
        outputs = [t for t in tree_leaves(made) if isinstance(t, Tensor)]
        if name == "__setitem__":
            outputs = [args[0]]
        if not outputs or (not sources and not weights):
            return made
        self.alive += outputs
        if not sources:
            self.weight.update(id(t) for t in outputs)
            return made
        node = self._record(name, args, kwargs, list(sources), weights, given, outputs)
        for tensor in outputs:
            self.node[id(tensor)] = node
        return made

    def _record(
        self,
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        sources: list[int],
        weights: list[Tensor],
        given: list[Tensor],
        outputs: list[Tensor],
    ) -> int:
        """The node whose data the outputs are."""
        if name == "multi_head_attention_forward":
            return self._attention(args, kwargs, sources, outputs)
        first = args[0] if args and isinstance(args[0], Tensor) else given[0]
        kind = _kind(name, args, kwargs, first, outputs[0], weights, given)
        if kind is None or (kind in _JOINS and len(sources) == 1 and not weights):
            return sources[-1]
        shape: Shape = ()
        if kind == "mul" and len(sources) > 1 and _gates(given, outputs[0]):
            kind = "cse"
        elif kind in ("sum", "sub") and weights and len(sources) == 1:
            shape = tuple(weights[-1].shape)
            kind = "bias" if max(shape, default=1) == weights[-1].numel() else "pos_enc"
        elif kind in ("mul", "div") and weights and len(sources) == 1:
            kind, shape = "mul", tuple(weights[-1].shape)
        elif kind in ("bmm", "mm") and weights and len(sources) == 1:
            kind, shape = "conv", tuple(weights[-1].shape)
        elif kind in _WEIGHTED:
            return self._layer(kind, name, args, kwargs, sources, weights, outputs[0])
        elif kind in ("max_pool", "avg_pool", "avgpool1d"):
            shape = _window(args, kwargs, 1 if "1d" in name else 2)
        if kind in ("bmm", "mm", "scaled_dot_product", "conv") and len(given) > 1:
            self._count_products(kind, given, outputs[0])
        if kind == UNKNOWN:
            self.unknown[name] += 1
        return self._add(kind, shape, sources)

    def _layer(
        self,
        kind: str,
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        sources: list[int],
        weights: list[Tensor],
        output: Tensor,
    ) -> int:
        """A node for the weight, and one behind it for the bias, which norms don't get."""
        order = {"bn": 3, "ln": 2, "gn": 2, "rms_norm": 2}.get(kind, 1)
        if name == "instance_norm":
            order = 3
        weight = kwargs.get("weight", args[order] if len(args) > order else None)
        if kind == "rnn":
            weight = weights[0] if weights else None
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else ()
        if kind not in _NORMS and isinstance(weight, Tensor) and kind not in ("embedding", "rnn"):
            rows = weight.shape[1] if kind == "conv_transpose" else weight.shape[0]
            self.macs += output.numel() * weight.numel() // max(1, rows)
        node = self._add(kind, shape, sources)
        bias = kwargs.get("bias", args[order + 1] if len(args) > order + 1 else None)
        if kind not in _NORMS and kind != "embedding" and isinstance(bias, Tensor):
            node = self._add("bias", tuple(bias.shape), [node])
        return node

    def _attention(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], sources: list[int], outputs: list[Tensor]
    ) -> int:
        """Torch's multi-head attention in one call: projections in, attention, projection out."""
        signature = inspect.signature(nn.functional.multi_head_attention_forward)
        call = signature.bind(*args, **kwargs).arguments
        entry = call.get("in_proj_weight")
        entry = call.get("q_proj_weight") if entry is None else entry
        node = self._add("conv", tuple(entry.shape) if entry is not None else (), sources)
        if call.get("in_proj_bias") is not None:
            node = self._add("bias", tuple(call["in_proj_bias"].shape), [node])
        node = self._add("msa", (), [node])
        node = self._add("conv", tuple(call["out_proj_weight"].shape), [node])
        length, batch, width = call["query"].shape if call["query"].ndim == 3 else (len(call["query"]), 1, 0)
        steps = call["key"].shape[0]
        self.macs += batch * (2 * length * width * width + 2 * steps * width * width + 2 * length * steps * width)
        if call.get("out_proj_bias") is not None:
            node = self._add("bias", tuple(call["out_proj_bias"].shape), [node])
        return node

    def _add(self, kind: str, shape: Shape, sources: Sequence[int]) -> int:
        node = len(self.types)
        self.types.append(kind)
        self.shapes.append(shape)
        self.edges.update((a, node) for a in sources)
        return node

    def _count_products(self, kind: str, given: list[Tensor], output: Tensor) -> None:
        if kind == "scaled_dot_product":
            query, key = given[0], given[1]
            self.macs += 2 * query.numel() * key.shape[-2]
        elif given[0].ndim:
            self.macs += output.numel() * given[0].shape[-1]


def _like_input(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a simple call gives, without calling it; None for other calls."""
    if name not in _KEEPS_SHAPE or not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
        return None
    if len(args) > 1 and not name.endswith("_norm"):
        return None  # `inplace` may be among them
    return args[0] if kwargs.get("inplace") else torch.empty_like(args[0])


def _ghost(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else tensor.to("meta")


def _name(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", str(func))
    if name == "__get__":  # a property such as x.T
        return getattr(getattr(func, "__self__", None), "__name__", name)
    if name == "__set__":
        return "data"
    return name if name.startswith("__") else name.strip("_")


def _kind(
    name: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    first: Tensor,
    output: Tensor,
    weights: list[Tensor],
    given: list[Tensor],
) -> str | None:
    """The operator of a call; None for one that passes its data on."""
    if name in _SAME or name in ("shape", "size", "dtype", "device", "ndim", "is_meta"):
        return None
    if name in ("conv2d", "convolution"):
        return _convolution(args, kwargs)
    if name == "sum" and (len(given) == 1):
        return "reduce"
    if name.startswith("adaptive_"):
        whole = output.numel() == output.shape[0] * output.shape[1] if output.ndim > 2 else False
        return "max_pool" if "max" in name else "glob_avg" if whole else "avg_pool"
    if name in ("mean", "nanmean"):
        # over positions, of a map or a sequence; the mean over channels of each position is arithmetic
        axes = kwargs.get("dim", args[1] if len(args) > 1 else None)
        axes = (axes,) if isinstance(axes, int) else axes
        channel = first.ndim - 1 if first.ndim == 3 else 1
        return "glob_avg" if axes is None or channel not in [a % first.ndim for a in axes] else "reduce"
    if name == "interpolate" or name.startswith("upsample"):
        smooth = kwargs.get("mode", args[3] if len(args) > 3 else "nearest") not in ("nearest", "nearest-exact")
        return "upsamplebilinear2d" if smooth or "linear" in name or "cubic" in name else "upsamplenearest2d"
    if name == "__getitem__":
        return _indexing(args[1])
    return _NAMES.get(name, UNKNOWN)


def _convolution(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    def option(name: str, place: int) -> Any:
        return kwargs.get(name, args[place] if len(args) > place else 1)

    dilation = option("dilation", 5)
    if option("groups", 6) == 1:
        return "conv"
    return "dil_conv" if (dilation if isinstance(dilation, int) else min(dilation)) > 1 else "sep_conv"


def _indexing(index: Any) -> str:
    parts = index if isinstance(index, tuple) else (index,)
    if any(isinstance(part, Tensor | list) for part in parts):
        return "index"
    if any(isinstance(part, int) and not isinstance(part, bool) for part in parts):
        return "select"
    return "unsqueeze" if any(part is None for part in parts) else "slice"


def _window(args: Sequence[Any], kwargs: Mapping[str, Any], axes: int) -> Shape:
    """(1, 1, height, width) of a pooling's window."""
    size = kwargs.get("kernel_size", args[1] if len(args) > 1 else None)
    if isinstance(size, int):
        return (1, 1, size, size if axes == 2 else 1)
    return (1, 1, *tuple(size)[-2:]) if isinstance(size, Sequence) and len(size) > 1 else ()


def _gates(given: Sequence[Tensor], output: Tensor) -> bool:
    """Whether one factor has a single value for each channel of a map: squeeze and excitation."""
    maps = [t for t in given if t.ndim == 4]
    return output.ndim == 4 and len(maps) > 1 and any(t.shape[2:] == (1, 1) != output.shape[2:] for t in maps)


def trace(
    network: nn.Module,
    inputs: Sequence[Any] | None = None,
    *,
    keywords: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> ArchitectureGraph:
    """The graph of any network. Its weights are neither read nor changed, and nothing is computed.

    Args:
        network: as it is; on whichever device, in whichever mode (it is traced in evaluation mode).
        inputs: positional arguments of its forward, e.g. tensors of the right shape and kind; None is one picture,
            float (1, 3, 224, 224).
        keywords: keyword arguments of its forward.
        name: of the network; by default its class.

    Raises:
        DataError: the forward pass fails with these inputs or depends on values, which the meta device has not.
    """
    inputs = (torch.empty(1, 3, 224, 224, device="meta"),) if inputs is None else inputs
    arguments, named = tree_map_only(Tensor, _ghost, (tuple(inputs), dict(keywords or {})))
    label = name or type(network).__name__
    own = [*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)]
    ghosts = {id(value): torch.empty_like(value, device="meta") for _, value in own}
    state = {key: ghosts[id(value)] for key, value in own}  # shared weights stay shared
    recorder = _Recorder(list(state.values()))
    recorder.feed((arguments, named))
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad(), torch.device("meta"), recorder:
            outputs = torch.func.functional_call(network, state, arguments, named, tie_weights=False)
    except Exception as error:  # a foreign forward may raise anything
        lines = str(error).strip().splitlines() or [""]
        raise DataError(
            f"{label}: its forward fails on the meta device with inputs "
            f"{[tuple(t.shape) for t in tree_leaves((arguments, named)) if isinstance(t, Tensor)]}: "
            f"{type(error).__name__}: {lines[0][:200]}. Give `trace` inputs that it takes; control flow that "
            "depends on values can't be followed"
        ) from error
    finally:
        for module, mode in modes:
            module.training = mode
    ends = {recorder.node[id(t)] for t in tree_leaves(outputs) if isinstance(t, Tensor) and id(t) in recorder.node}
    if not ends:
        raise DataError(f"{label}: no output depends on the inputs; expected tensors, or lists or dicts of them")
    return _finished(recorder, ends, network, label)


def _finished(recorder: _Recorder, ends: set[int], network: nn.Module, name: str) -> ArchitectureGraph:
    """The part of the record that leads to an output."""
    before: dict[int, list[int]] = {}
    for a, b in recorder.edges:
        before.setdefault(b, []).append(a)
    needed, open_ = set(ends), list(ends)
    while open_:
        for a in before.get(open_.pop(), ()):
            if a not in needed:
                needed.add(a)
                open_.append(a)
    place = {node: i for i, node in enumerate(sorted(needed))}
    return ArchitectureGraph(
        tuple(recorder.types[n] for n in place),
        tuple(recorder.shapes[n] for n in place),
        tuple(sorted((place[a], place[b]) for a, b in recorder.edges if a in place and b in place)),
        name,
        sum(p.numel() for p in network.parameters()),
        recorder.macs,
        dict(Counter(type(m).__name__ for m in network.modules())),
        dict(recorder.unknown),
    )
