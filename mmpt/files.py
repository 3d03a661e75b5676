"""Files that several modalities read: tables that name files, tar shards, cache files, and safe paths."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from mmpt.errors import DataError

TABLE_SUFFIXES = (".tsv", ".csv", ".jsonl")


def cache_folder() -> Path:
    """Where derived data may be kept between runs: `$MMPT_CACHE`, else `~/.cache/mmpt`."""
    return Path(os.environ.get("MMPT_CACHE") or Path.home() / ".cache" / "mmpt")


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Make a file appear whole or not at all, whoever writes it at the same time.

    Args:
        path: of the file; its folder is made if need be.
        write: writes the content to an open binary file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_cache(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """`write_atomically` for a path below `cache_folder`.

    Raises:
        DataError: the cache can't be written.
    """
    try:
        write_atomically(path, write)
    except OSError as error:
        raise DataError(
            f"the cache {path.parent} can't be written ({error}); set MMPT_CACHE to a folder that can"
        ) from error


def contained(folder: Path, name: str) -> Path:
    """The path that a file of a dataset names, which must stay within the dataset's folder.

    Args:
        folder: of the dataset.
        name: relative path as the dataset has it; both kinds of slashes separate.

    Raises:
        DataError: the path is absolute or leads out of the folder.
    """
    normal = os.path.normpath(name.replace("\\", "/"))
    if os.path.isabs(normal) or re.match(r"[A-Za-z]:", normal) or normal.split("/")[0] == "..":
        raise DataError(f"{name!r} leads out of {folder}; expected a path below it")
    return folder / normal


def hash_fraction(name: str, seed: int = 0) -> float:
    """A number in [0, 1) that depends on the name and the seed alone, for splits that added files don't reshuffle."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


# Tables


@dataclass(frozen=True)
class Table:
    """A table with a header, read whole.

    Attributes:
        path: where it was read.
        columns: names, in the order of the file.
        rows: cells by column; text, and whatever JSON holds in a .jsonl file.
        lines: the line of the file on which each row ends.
    """

    path: Path
    columns: tuple[str, ...]
    rows: Sequence[Mapping[str, Any]]
    lines: Sequence[int]

    def column(self, wanted: str | None, candidates: Sequence[str], role: str) -> str | None:
        """The name of the column that plays a role.

        Args:
            wanted: as the user named it, or None to choose.
            candidates: usual names, the best first; capitals don't matter.
            role: for the message, e.g. "image path".

        Returns:
            None if none was wanted and the table has no candidate.

        Raises:
            DataError: the wanted column does not exist.
        """
        if wanted is not None:
            if wanted not in self.columns:
                present = ", ".join(self.columns)
                raise DataError(f"{self.path} has no {role} column {wanted!r}; its columns are {present}")
            return wanted
        by_name = {column.strip().lower(): column for column in reversed(self.columns)}
        return next((by_name[candidate] for candidate in candidates if candidate in by_name), None)


def read_table(path: Path) -> Table:
    """Read a .tsv or .csv file with a header line, or a .jsonl file with an object on each line (all UTF-8).

    Raises:
        DataError: no such file, another format, a line that does not fit the header, or no rows.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    suffix = path.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        raise DataError(f"{path} ends in {suffix or 'nothing'}; expected a table: {', '.join(TABLE_SUFFIXES)}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            parse = _parse_json_lines if suffix == ".jsonl" else _parse_delimited
            numbered = list(parse(path, file))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    if not numbered:
        raise DataError(f"{path} has no rows; expected a header line and at least one row")
    columns = dict.fromkeys(key for _, row in numbered for key in row)
    return Table(path, tuple(columns), [row for _, row in numbered], [line for line, _ in numbered])


def _parse_delimited(path: Path, file: IO[str]) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    try:
        header = next(reader, [])
        for cells in reader:
            if not any(cells):
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells, but the header has {len(header)} "
                    f"({', '.join(header)}); quote cells that hold separators or line ends"
                )
            yield reader.line_num, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from error


def _parse_json_lines(path: Path, file: IO[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error.msg})") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: a {type(row).__name__}; expected an object with named fields")
        yield number, row


# Tar shards (WebDataset)


class Member(NamedTuple):
    """A file inside an uncompressed tar archive.

    Attributes:
        name: its path inside the archive.
        offset: where its content begins in the archive.
        size: bytes of content.
    """

    name: str
    offset: int
    size: int


def expand_shards(pattern: str) -> list[Path]:
    """The archives that a file name, a folder, or a brace pattern such as `shards-{000..009}.tar` stands for.

    Raises:
        DataError: a folder without .tar files, or archives that don't exist.
    """
    if Path(pattern).is_dir():
        paths = sorted(Path(pattern).glob("*.tar"))
        if not paths:
            raise DataError(f"{pattern} holds no .tar files")
        return paths
    paths = [Path(name) for name in _expand_braces(pattern)]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"{len(missing)} of {len(paths)} archives don't exist, the first is {missing[0]}")
    return paths


def _expand_braces(pattern: str) -> list[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    first, last, alternatives = match.groups()
    if first is not None:
        width = len(first) if first.startswith("0") else 0
        choices = [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
    else:
        choices = alternatives.split(",")
    return [
        name
        for choice in choices
        for name in _expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])
    ]


def index_tar(path: Path) -> list[Member]:
    """The regular files of an archive in its order, from its headers alone.

    The index is kept in the cache folder and used again while the archive's size and time of change stay the same.

    Raises:
        DataError: compressed, cut short, or not a tar archive.
    """
    state = path.stat()
    key = f"{path.resolve()}\0{state.st_size}\0{state.st_mtime_ns}"
    kept = cache_folder() / "tar" / f"{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.json"
    if kept.is_file():
        return [Member(*entry) for entry in json.loads(kept.read_bytes())]
    try:
        with tarfile.open(path, "r:") as archive:
            members = [Member(m.name, m.offset_data, m.size) for m in archive if m.isreg() and not m.issparse()]
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{path} can't be read as an uncompressed tar archive: {error}") from error
    write_cache(kept, lambda file: file.write(json.dumps(members).encode()))
    return members


def read_member(path: Path, member: Member) -> bytes:
    """The content of a member of an archive."""
    with path.open("rb") as file:
        file.seek(member.offset)
        return file.read(member.size)
