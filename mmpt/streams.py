"""Rows written as they come: constant memory, in the order of the input, going on where a killed process stopped.

Rows are collected in parts beside the output, `NAME.parts/`; `finish` makes the file of them: .parquet, .npz, .csv or
.h5ad.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from mmpt.errors import ConfigError
from mmpt.files import write_atomically

SUFFIXES = (".parquet", ".npz", ".csv", ".h5ad")
ROWS = 4096
"""Rows of a part: what is kept in memory, and at most repeated after a crash."""


class RowStream:
    """Rows with names, columns of plain values and of vectors.

    Args:
        output: the file to be made.
        settings: what makes the rows what they are (model, data). Parts of other settings are thrown away.
        rows: of a part.

    Attributes:
        consumed: samples (or batches) of the input that the parts hold already.
        count: rows so far.
        skipped: what could not be used.

    Raises:
        ConfigError: an output of another kind.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any], rows: int = ROWS) -> None:
        if output.suffix not in SUFFIXES:
            raise ConfigError(f"--output {output}: expected a name that ends in {', '.join(SUFFIXES)}")
        self.output, self.rows = output, rows
        self.folder = output.with_name(f"{output.name}.parts")
        self.consumed = self.count = 0
        self.skipped: list[dict[str, Any]] = []
        wanted = json.dumps(dict(settings), sort_keys=True, default=str)
        manifest = self.folder / "settings.json"
        if not manifest.is_file() or manifest.read_text(encoding="utf-8") != wanted:
            shutil.rmtree(self.folder, ignore_errors=True)
            write_atomically(manifest, lambda file: file.write(wanted.encode()))
        self.parts = sorted(self.folder.glob("*.parquet"))
        if self.parts:
            told = json.loads(pq.read_schema(self.parts[-1]).metadata[b"mmpt"])
            self.consumed, self.count, self.skipped = told["consumed"], told["count"], told["skipped"]
        self._tables: list[pa.Table] = []
        self._seen = self.consumed

    def add(
        self,
        columns: Mapping[str, Sequence[Any] | Tensor],
        consumed: int,
        skipped: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Add the rows of a batch.

        Args:
            columns: name -> a value for each row, or a tensor (rows, width).
            consumed: samples (or batches) of the input that led to them, those that could not be used included.
            skipped: what could not be used.
        """
        self._seen += consumed
        self.skipped += skipped
        if columns and len(next(iter(columns.values()))):
            table = pa.table({name: _column(values) for name, values in columns.items()})
            self._tables.append(table)
            self.count += len(table)
        if sum(len(table) for table in self._tables) >= self.rows:
            self._flush()

    def _flush(self) -> None:
        if not self._tables:
            return
        told = {"consumed": self._seen, "count": self.count, "skipped": self.skipped}
        table = pa.concat_tables(self._tables)
        table = table.replace_schema_metadata({b"mmpt": json.dumps(told, default=str).encode()})
        path = self.folder / f"{len(self.parts):06d}.parquet"
        write_atomically(path, lambda file: pq.write_table(table, file))
        self.parts.append(path)
        self.consumed, self._tables = self._seen, []

    def finish(self, *outputs: Path) -> None:
        """Make the output, and further ones of the same rows, and remove the parts.

        Args:
            outputs: further files, of any of the kinds.
        """
        self._flush()
        for output in (self.output, *outputs):
            unfinished = output.with_name(f".{output.name}.part")
            write = {".parquet": _parquet, ".npz": _npz, ".csv": _csv, ".h5ad": _h5ad}[output.suffix]
            write(unfinished, self.parts)
            os.replace(unfinished, output)
        shutil.rmtree(self.folder)

    @property
    def has_vectors(self) -> bool:
        """Whether some column holds vectors."""
        self._flush()
        return bool(self.parts) and bool(_vectors(pq.read_schema(self.parts[0])))


def fingerprint(module: nn.Module) -> str:
    """A number that other weights don't have."""
    digest = hashlib.blake2b(digest_size=12)
    for name, value in module.state_dict().items():
        if torch.is_tensor(value):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _column(values: Sequence[Any] | Tensor) -> pa.Array:
    if isinstance(values, Tensor):
        flat = values.detach().float().cpu().numpy()
        return pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1])
    return pa.array(list(values))


def _vectors(schema: pa.Schema) -> dict[str, int]:
    return {f.name: f.type.list_size for f in schema if pa.types.is_fixed_size_list(f.type)}


def _tables(parts: Sequence[Path]) -> Iterator[pa.Table]:
    for part in parts:
        yield pq.read_table(part).replace_schema_metadata(None)


def _array(table: pa.Table, name: str, width: int) -> np.ndarray:
    return table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, width)


def _parquet(path: Path, parts: Sequence[Path]) -> None:
    writer: pq.ParquetWriter | None = None
    for table in _tables(parts):
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def _csv(path: Path, parts: Sequence[Path]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        for number, table in enumerate(_tables(parts)):
            names = [name for name in table.column_names if name not in _vectors(table.schema)]
            if number == 0:
                writer.writerow(names)
            writer.writerows(zip(*(table[name].to_pylist() for name in names), strict=True))


def _npz(path: Path, parts: Sequence[Path]) -> None:
    """As `numpy.savez` would, an array after the other, a part at a time."""
    schema = pq.read_schema(parts[0])
    count = sum(pq.read_metadata(part).num_rows for part in parts)
    longest = max((len(name) for t in _tables(parts) for name in t["names"].to_pylist()), default=1)
    arrays: dict[str, tuple[np.dtype, tuple[int, ...]]] = {
        name: (np.dtype(np.float32), (count, width)) for name, width in _vectors(schema).items()
    }
    arrays["names"] = np.dtype(f"<U{max(longest, 1)}"), (count,)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, (dtype, shape) in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for table in _tables(parts):
                    values = np.array(table[name].to_pylist()) if name == "names" else _array(table, name, shape[1])
                    file.write(values.astype(dtype).tobytes())


def _h5ad(path: Path, parts: Sequence[Path]) -> None:
    """The first vector column as X, other vectors in obsm, the rest in obs. Vectors are never in memory together."""
    try:
        import anndata
        import h5py
        import pandas as pd
    except ImportError as error:
        raise ConfigError("an .h5ad output needs anndata: pip install 'mmpt[cell]'") from error
    vectors = _vectors(pq.read_schema(parts[0]))
    if not vectors:
        raise ConfigError("an .h5ad output needs vectors; take .csv or .parquet")
    first = next(iter(vectors))
    obs = pd.concat([table.drop_columns(list(vectors)).to_pandas() for table in _tables(parts)])
    obs.index = pd.Index(obs.pop("names").astype(str))
    found = anndata.AnnData(obs=obs, shape=(len(obs), vectors[first]))
    found.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        if "X" in file:
            del file["X"]
        for name, width in vectors.items():
            place = file.create_dataset(
                "X" if name == first else f"obsm/{name}", (len(obs), width), np.float32, chunks=True
            )
            place.attrs["encoding-type"], place.attrs["encoding-version"] = "array", "0.2.0"
            start = 0
            for table in _tables(parts):
                place[start : start + len(table)] = _array(table, name, width)
                start += len(table)
