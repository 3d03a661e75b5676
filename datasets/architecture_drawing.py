"""Pictures of networks, for reports: operators as coloured dots from left to right, joined by the flow of data."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from mmpt.encoders.architecture_graph import ACTIVATIONS, NORMS, ArchitectureGraph, condensed

KINDS = {
    "convolution": ("#3b6fb6", {"conv", "sep_conv", "dil_conv", "conv1d", "conv3d", "conv_transpose", "attn_conv"}),
    "attention": ("#c23b75", {"msa", "scaled_dot_product", "softmax", "bmm"}),
    "norm": ("#8f8f8f", set(NORMS)),
    "activation": ("#e0a020", set(ACTIVATIONS) - {"softmax", "cse"}),
    "pooling": ("#3f9e4d", {"max_pool", "avg_pool", "glob_avg", "avgpool1d"}),
    "join": ("#7a4fb5", {"sum", "concat", "cse"}),
}
OTHER = "#cccccc"


def draw(graph: ArchitectureGraph, max_nodes: int = 160) -> Image.Image:
    """A picture of a network, wrapped into rows of 40 steps; large networks are condensed first.

    Args:
        graph: any.
        max_nodes: the most dots.
    """
    small = condensed(graph, max_nodes)
    depth = [0] * len(small)
    for a, b in small.edges:  # sorted by the node that data come from
        depth[b] = max(depth[b], depth[a] + 1)
    lanes: dict[int, int] = {}
    places = []
    for step in depth:
        lane = lanes[step] = lanes.get(step, -1) + 1
        places.append((step % 40, -(step // 40) * 4.0 - 0.8 * min(lane, 3)))
    rows = max(depth) // 40 + 1
    figure = Figure(figsize=(8, 0.7 * rows + 0.6), dpi=80)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.88))
    for a, b in small.edges:
        (x, y), (u, v) = places[a], places[b]
        if depth[a] // 40 == depth[b] // 40:
            way = np.linspace(0.0, 1.0, 2 if u - x == 1 else 20)  # what skips a step is an arc
            height = 0.0 if u - x == 1 else 0.25 * (u - x) ** 0.6
            heights = y + way * (v - y) + height * 4 * way * (1 - way)
            axes.plot(x + way * (u - x), heights, color="#999999", linewidth=0.7, zorder=1)
    colours = {kind: colour for colour, kinds in KINDS.values() for kind in kinds}
    xs, ys = zip(*places, strict=True)
    axes.scatter(xs, ys, s=22, c=[colours.get(kind, OTHER) for kind in small.types], zorder=2)
    for name, (colour, _) in KINDS.items():
        axes.scatter([], [], s=22, c=colour, label=name)
    axes.set_xlim(-1, 40)
    axes.set_ylim(-4.0 * rows + 0.8, 1.0)
    axes.axis("off")
    figure.legend(loc="upper center", ncol=len(KINDS), fontsize=7, frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    stream.seek(0)
    return Image.open(stream).convert("RGB")
