"""The forms in which people keep pictures with texts, each read into a list of `Picture`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from mmpt.errors import DataError
from mmpt.files import TABLE_SUFFIXES, Member, Table, contained, expand_shards, index_tar, read_member, read_table
from mmpt.source import Split

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
IMAGE_COLUMNS = ("file", "filepath", "file_path", "file_name", "filename", "path", "image", "image_path", "img")
TEXT_COLUMNS = ("text", "caption", "title", "description", "sentence", "name")
CLASS_COLUMNS = ("class", "label", "category")
SPLITS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture, not opened.

    Attributes:
        file: the image file, or the archive that holds it.
        member: its place in the archive.
        name: for lists and errors; relative to the data.
        text: its caption; may be empty.
        label: the name of its class.
        split: as the data say.
    """

    file: Path
    member: Member | None
    name: str
    text: str
    label: str | None = None
    split: Split | None = None


class Layout(NamedTuple):
    """How the user describes their data; see `mmpt.datasets.image.ImageText`."""

    image_column: str | None
    text_column: str | None
    class_column: str | None
    root: str | None
    template: str

    def class_text(self, name: str) -> str:
        """The text for a class."""
        return self.template.format(name.replace("_", " "))


def read_pictures(path: str, layout: Layout) -> list[Picture]:
    """List the pictures at a path, whichever form it has.

    Raises:
        DataError: no such path, no pictures in it, or a form that is none of the known ones.
    """
    place = Path(path)
    if "{" in path or place.suffix.lower() == ".tar":
        return read_shards(path, layout)
    if place.is_dir():
        return read_folder(place, layout)
    if place.suffix.lower() in TABLE_SUFFIXES:
        return read_image_table(place, layout)
    known = f"a folder, a table ({', '.join(TABLE_SUFFIXES)}) or .tar shards (uncompressed)"
    raise DataError(f"{path} {'is not' if place.exists() else 'does not exist; expected'} {known}")


# Folders


def read_folder(folder: Path, layout: Layout) -> list[Picture]:
    """A folder of split folders, of class folders, of captioned pictures or of shards."""
    entries = [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith((".", "__MACOSX"))]
    folders = [entry for entry in entries if entry.is_dir()]
    names = {entry.name.lower() for entry in folders}
    if "train" in names and names <= SPLITS.keys():
        return [
            replace(picture, split=SPLITS[part.name.lower()], name=f"{part.name}/{picture.name}")
            for part in folders
            for picture in read_folder(part, layout)
        ]
    images = [entry for entry in entries if _is_image(entry)]
    if images:
        return _read_captioned(folder, entries, images)
    pictures = [
        Picture(file, None, str(file.relative_to(folder)), layout.class_text(part.name), part.name)
        for part in folders
        for file in images_below(part)
    ]
    if pictures:
        return pictures
    archives = [entry.name for entry in entries if entry.suffix.lower() == ".tar"]
    tables = [entry.name for entry in entries if entry.suffix.lower() in TABLE_SUFFIXES]
    if archives and tables:
        raise DataError(
            f"{folder} holds archives and a table; give the table {tables[0]} as the path with root {archives[0]}, or "
            "the archives alone, e.g. shards-{000..009}.tar"
        )
    if archives:
        return read_shards(str(folder), layout)
    raise DataError(f"{folder} {_what_is_there(entries)}")


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def images_below(folder: Path) -> Iterator[Path]:
    """All picture files of a folder and its folders, in order."""
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES):
                yield Path(place, name)


def _read_captioned(folder: Path, entries: Sequence[Path], images: Sequence[Path]) -> list[Picture]:
    tables = [entry.name for entry in entries if entry.suffix.lower() in TABLE_SUFFIXES]
    if not any(entry.suffix.lower() == ".txt" for entry in entries):
        other = (
            f"give its table {tables[0]} as the path" if tables else "or class folders, or a table of paths and texts"
        )
        raise DataError(f"{folder} holds {len(images)} pictures without texts; expected 1.txt beside 1.jpg, {other}")
    return [_captioned(image) for image in images]


def _captioned(image: Path) -> Picture:
    caption = image.with_suffix(".txt")
    try:
        text = caption.read_text(encoding="utf-8-sig") if caption.is_file() else ""
    except UnicodeDecodeError as error:
        raise DataError(f"{caption} is not UTF-8 text; save it as UTF-8") from error
    return Picture(image, None, image.name, " ".join(text.split()))


def _what_is_there(entries: Sequence[Path]) -> str:
    if not entries:
        return "is empty; expected pictures, class folders, or .tar shards"
    tables = [entry.name for entry in entries if entry.suffix.lower() in TABLE_SUFFIXES]
    if tables:
        return f"holds no pictures or class folders, but the table {tables[0]}; give the table as the path"
    kinds = sorted({entry.suffix.lower() or "no suffix" for entry in entries if entry.is_file()}) or ["folders only"]
    return f"holds no pictures ({', '.join(IMAGE_SUFFIXES)}), in class folders or otherwise; it has {', '.join(kinds)}"


# Tables


def read_image_table(path: Path, layout: Layout) -> list[Picture]:
    """A table with a picture's path and its text, its class, or both on each row."""
    table = read_table(path)
    image = table.column(layout.image_column, IMAGE_COLUMNS, "image")
    text = table.column(layout.text_column, TEXT_COLUMNS, "text")
    label = table.column(layout.class_column, CLASS_COLUMNS, "class")
    split = table.column(None, ("split",), "split")
    if image is None or (text is None and label is None):
        wanted = "image_column" if image is None else "text_column or class_column"
        usual = IMAGE_COLUMNS if image is None else TEXT_COLUMNS + CLASS_COLUMNS
        raise DataError(
            f"{path} has the columns {', '.join(table.columns)}; expected one of {', '.join(usual)}. Name yours with "
            f"{wanted}"
        )
    root = Path(layout.root) if layout.root is not None else path.parent
    members = _members_by_name(root) if root.suffix.lower() == ".tar" and root.is_file() else None
    pictures = []
    for row, line in zip(table.rows, table.lines, strict=True):
        name = _cell(row, image)
        if not name:
            raise DataError(
                f"{path}, line {line}: the cell of column {image!r} is empty; expected the path of a picture"
            )
        file, member = _locate(root, name, members, path, line)
        kind = _cell(row, label) or None
        caption = _cell(row, text) or ("" if text is not None or kind is None else layout.class_text(kind))
        pictures.append(Picture(file, member, name, caption, kind, _split_of(row, split, table, line)))
    if members is None and not any(picture.file.is_file() for picture in pictures):
        raise DataError(
            f"none of the {len(pictures)} pictures of {path} exists, e.g. {pictures[0].file}; paths begin at {root}, "
            "set root if they begin elsewhere"
        )
    return pictures


def _cell(row: Mapping[str, Any], column: str | None) -> str:
    value = row.get(column) if column is not None else None
    return "" if value is None else " ".join(str(value).split()) if not isinstance(value, str) else value.strip()


def _locate(
    root: Path, name: str, members: Mapping[str, Member] | None, table: Path, line: int
) -> tuple[Path, Member | None]:
    if members is not None:
        if name.removeprefix("./") not in members:
            raise DataError(f"{table}, line {line}: {root} has no member {name!r}")
        return root, members[name.removeprefix("./")]
    if Path(name).is_absolute():
        return Path(name), None
    try:
        return contained(root, name), None
    except DataError as error:
        raise DataError(f"{table}, line {line}: {error}; use an absolute path, or set root") from error


def _split_of(row: Mapping[str, Any], column: str | None, table: Table, line: int) -> Split | None:
    if column is None:
        return None
    value = _cell(row, column).lower()
    if value not in SPLITS:
        raise DataError(f"{table.path}, line {line}: split is {value!r}; expected one of {', '.join(SPLITS)}")
    return SPLITS[value]


def _members_by_name(archive: Path) -> dict[str, Member]:
    return {member.name.removeprefix("./"): member for member in index_tar(archive)}


# Shards


def read_shards(pattern: str, layout: Layout) -> list[Picture]:
    """WebDataset shards: members that share their path up to the first dot of the file name belong together."""
    pictures = [picture for path in expand_shards(pattern) for picture in _read_shard(path, layout)]
    if not pictures:
        raise DataError(f"{pattern}: the archives hold no pictures ({', '.join(IMAGE_SUFFIXES)})")
    return pictures


def _read_shard(path: Path, layout: Layout) -> Iterator[Picture]:
    examples: dict[str, dict[str, Member]] = {}
    for member in index_tar(path):
        folder, _, name = member.name.removeprefix("./").rpartition("/")
        stem, _, extension = name.partition(".")
        if stem:
            key = f"{folder}/{stem}" if folder else stem
            examples.setdefault(key, {})[f".{extension.lower()}"] = member
    for key, parts in examples.items():
        image = next((parts[suffix] for suffix in IMAGE_SUFFIXES if suffix in parts), None)
        if image is not None:
            text, label = _describe(path, parts, layout)
            yield Picture(path, image, f"{path.name}/{key}", text, label)


def _describe(path: Path, parts: Mapping[str, Member], layout: Layout) -> tuple[str, str | None]:
    """Text and class of an example from its .txt, .json and .cls members."""
    fields: dict[str, Any] = {}
    if ".json" in parts:
        try:
            loaded = json.loads(read_member(path, parts[".json"]))
        except ValueError as error:
            raise DataError(f"{path}: {parts['.json'].name} is not JSON ({error})") from error
        fields = loaded if isinstance(loaded, dict) else {}
    label = _field(fields, layout.class_column, CLASS_COLUMNS) or None
    if ".cls" in parts:
        label = _text(path, parts[".cls"])
    if ".txt" in parts and layout.text_column is None:
        return _text(path, parts[".txt"]), label
    text = _field(fields, layout.text_column, TEXT_COLUMNS)
    return text or (layout.class_text(label) if label is not None else ""), label


def _field(fields: Mapping[str, Any], wanted: str | None, candidates: Sequence[str]) -> str:
    return _cell(fields, wanted or next((name for name in candidates if fields.get(name)), None))


def _text(path: Path, member: Member) -> str:
    return " ".join(read_member(path, member).decode("utf-8-sig", errors="replace").split())
