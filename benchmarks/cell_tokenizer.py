"""Rank-value tokenisation: mmpt's batch operation against loops over cells of the same algorithm.

    python benchmarks/cell_tokenizer.py [--cells 10000] [--rounds 5]

`loop` reads a row, ranks its genes with numpy and goes on, as Geneformer's released tokenizer does within a chunk;
`python` sorts (value, token) pairs of a cell in Python. All three give the same tokens, which is checked. They take
turns, and the median of each round's ratio is printed. Seconds are those of the processor, all on one thread, so that
other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from mmpt.encoders.cell_processor import rank_tokens

LIMIT = 2047
EXPRESSED = {765: 250, 20_000: 1_000, 30_000: 2_500}
"""Genes of a study, and about how many of them a cell expresses."""


def corpus(cells: int, genes: int, expressed: int) -> sparse.csr_matrix:
    """Counts as a droplet study has them: most are 1, genes of very different frequency."""
    generator = np.random.default_rng(0)
    frequency = generator.dirichlet(np.full(genes, 0.3))
    chance = np.minimum(1.0, expressed * frequency)
    chance *= expressed / chance.sum()
    blocks = []
    for first in range(0, cells, 1000):
        rows = min(1000, cells - first)
        hit = generator.random((rows, genes)) < chance
        blocks.append(sparse.csr_matrix(hit * generator.geometric(0.6, (rows, genes)).astype(np.float64)))
    return sparse.csr_matrix(sparse.vstack(blocks))


def loop(rows: sparse.csr_matrix, columns: NDArray[np.int64], medians: NDArray[np.float64]) -> list[NDArray[np.int64]]:
    """One cell after the other, with numpy inside a cell."""
    result = []
    for number in range(rows.shape[0]):
        row = rows[number]
        tokens = columns[row.indices]
        known = tokens >= 0
        tokens, values = tokens[known], row.data[known]
        order = np.lexsort((tokens, -values / medians[tokens - 2]))
        result.append(tokens[order][:LIMIT])
    return result


def python(
    rows: sparse.csr_matrix, columns: NDArray[np.int64], medians: NDArray[np.float64]
) -> list[NDArray[np.int64]]:
    """One cell after the other, one gene after the other."""
    result = []
    token_of, median_of = columns.tolist(), medians.tolist()
    for number in range(rows.shape[0]):
        start, end = rows.indptr[number], rows.indptr[number + 1]
        pairs = []
        for column, value in zip(rows.indices[start:end].tolist(), rows.data[start:end].tolist(), strict=True):
            token = token_of[column]
            if token >= 0:
                pairs.append((-value / median_of[token - 2], token))
        result.append(np.array([token for _, token in sorted(pairs)[:LIMIT]], dtype=np.int64))
    return result


def check(rows, columns, medians, ours, *others) -> None:
    """The same tokens, up to the order of values that differ in the last bits only: mmpt takes those for ties."""
    for number, own in enumerate(ours):
        value = np.zeros(columns.max() + 1)
        value[columns[rows[number].indices]] = rows[number].data
        for other in (found[number] for found in others):
            assert len(own) == len(other)
            gap = value[own] / medians[own - 2] - value[other] / medians[other - 2]
            assert np.abs(gap).max() < 1e-8


def timed(function, *arguments) -> tuple[float, object]:
    began = time.process_time()
    result = function(*arguments)
    return time.process_time() - began, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--genes", type=int, nargs="+", default=list(EXPRESSED), choices=list(EXPRESSED))
    options = parser.parse_args()
    print(f"{options.cells} cells; seconds of the fastest round, ratios as medians over {options.rounds} rounds")
    for genes in options.genes:
        rows = corpus(options.cells, genes, EXPRESSED[genes])
        generator = np.random.default_rng(1)
        columns = generator.permutation(genes).astype(np.int64) + 2
        columns[::20] = -1
        medians = generator.choice(np.round(np.geomspace(0.5, 20, 200), 3), genes)
        results = []
        for _ in range(options.rounds):
            ours, (tokens, lengths) = timed(rank_tokens, rows, columns, medians, LIMIT)
            looped, expected = timed(loop, rows, columns, medians)
            plain, also = timed(python, rows, columns, medians)
            results.append((ours, looped, plain))
        check(rows, columns, medians, [tokens[i, : lengths[i]] for i in range(options.cells)], expected, also)
        best = [min(column) for column in zip(*results, strict=True)]
        ratio = statistics.median(looped / ours for ours, looped, _ in results)
        slower = statistics.median(plain / ours for ours, _, plain in results)
        print(
            f"{genes:6} genes, {int(np.diff(rows.indptr).mean()):5} expressed: mmpt {best[0]:.3f} s, "
            f"loop {best[1]:.2f} s ({ratio:.1f}x), python {best[2]:.2f} s ({slower:.1f}x)"
        )


if __name__ == "__main__":
    main()
