"""Pictures with texts or classes: the default emoji, or the user's own folder, table or tar shards."""

from __future__ import annotations

import io
import warnings
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from mmpt.datasets.emoji import Emoji
from mmpt.datasets.image_layouts import Layout, Picture, images_below, read_pictures
from mmpt.errors import ConfigError, DataError, SampleError
from mmpt.files import read_member
from mmpt.source import Examples, Sample, Source, Split
from mmpt.splits import hash_split


class ImageText(Source):
    """Pictures and texts.

    `path` may be

    - None: emoji in several art styles, see `mmpt.datasets.emoji.Emoji`;
    - a folder of class folders (`cats/1.jpg`): the text is `template` with the folder's name, the label `class` its
      number;
    - a flat folder of pictures with a caption each (`1.jpg` and `1.txt`);
    - a folder of `train`, `validation` and `test` folders, each as one of the two above;
    - a table (.tsv, .csv, .jsonl) with a column of paths and a column of texts or classes, or both;
    - a .tar file, a folder of them, or a pattern `shards-{000..009}.tar`: WebDataset shards with, for each key, a
      picture and a .txt, .json or .cls file. They are read in place.

    A `split` column or split folders decide the splits. Without them, a hash of each picture's name or text does, so
    that added files don't move the others; data with a training part but no validation part give the latter a share of
    the former. Classes are spread over the splits file by file; captions are kept together, so that no text of the
    training split appears in another.

    The label `group` is equal for pictures with the same text.

    Args:
        path: see above.
        emoji: the default data, used while `path` is None.
        image_column: column of picture paths; by default `file`, `filepath`, `path`, `image` or similar.
        text_column: column (or JSON field) of texts; by default `text`, `caption`, `title` or similar.
        class_column: column (or JSON field) of classes; by default `class`, `label` or `category`.
        root: where the paths of a table begin: a folder, or a .tar file that holds the pictures. By default the
            table's folder.
        template: the text for a class, with `{}` for its name.
        validation_fraction: part of the pictures for validation, where the data don't say.
        test_fraction: part of the pictures for the test, where the data have no splits at all.
        seed: of the split.
        duplicates: a picture that a table names several times is taken once, with its `first` text, or each time
            (`all`: several captions for a picture; they share a group and a split).

    Raises:
        ConfigError: fractions or a template that can't work.
    """

    def __init__(
        self,
        path: str | None = None,
        emoji: Emoji | None = None,
        image_column: str | None = None,
        text_column: str | None = None,
        class_column: str | None = None,
        root: str | None = None,
        template: str = "a photo of a {}",
        validation_fraction: float = 0.1,
        test_fraction: float = 0.1,
        seed: int = 0,
        duplicates: Literal["first", "all"] = "first",
    ) -> None:
        if "{}" not in template:
            raise ConfigError(f"template is {template!r}; expected a text with {{}} where the name of the class goes")
        if min(validation_fraction, test_fraction) < 0 or validation_fraction + test_fraction >= 1:
            raise ConfigError(
                f"validation_fraction {validation_fraction} and test_fraction {test_fraction} leave nothing to train "
                "on; expected numbers from 0 whose sum is below 1"
            )
        self.path = path
        self.emoji = emoji or Emoji()
        self.layout = Layout(image_column, text_column, class_column, root, template)
        self.validation_fraction = validation_fraction
        self.test_fraction = test_fraction
        self.seed = seed
        self.duplicates = duplicates
        self._read: tuple[str, _Collection] | None = None

    def split(self, name: Split) -> Examples:
        """The samples of one split; empty if the data have splits, but not this one.

        Each has the modalities `image` (a path, or a PIL image from a shard) and `text`, and the labels `group` and,
        where there are classes, `class`.

        Raises:
            DataError: nothing readable at `path`, or columns that are missing.
        """
        if self.path is None:
            return self.emoji.split(name)
        collection = self._collection()
        chosen = [number for number, split in enumerate(collection.splits) if split == name]
        return Pictures(collection, chosen)

    def everything(self) -> Examples:
        """All pictures in order, for embedding them; those of a folder need no texts."""
        if self.path is not None and Path(self.path).is_dir():
            folder = Path(self.path)
            pictures = [Sample({"image": str(file)}, str(file.relative_to(folder))) for file in images_below(folder)]
            if pictures:
                return pictures
        return super().everything()

    def label_names(self, label: str) -> Sequence[str]:
        """The names of the classes for the label `class`."""
        if self.path is None:
            return self.emoji.label_names(label)
        return self._collection().classes if label == "class" else ()

    def texts(self) -> Sequence[str]:
        """The texts of the training split; no picture is opened for them."""
        if self.path is None:
            return self.emoji.texts()
        collection = self._collection()
        pairs = zip(collection.pictures, collection.splits, strict=True)
        return [picture.text for picture, split in pairs if split == "train" and picture.text]

    def _collection(self) -> _Collection:
        assert self.path is not None
        if self._read is None or self._read[0] != self.path:
            pictures = read_pictures(self.path, self.layout)
            if self.duplicates == "first":
                pictures = _first_of_each(pictures, self.path)
            if not any(picture.text for picture in pictures):
                raise DataError(f"{self.path}: all {len(pictures)} texts are empty; expected a text for each picture")
            groups = text_groups(pictures)
            splits = self._assign(pictures, groups)
            self._read = (self.path, _Collection(pictures, groups, splits))
        return self._read[1]

    def _assign(self, pictures: Sequence[Picture], groups: Sequence[int]) -> list[Split]:
        given = [picture.split for picture in pictures]
        divided = any(split is not None for split in given)
        if divided and "validation" in given:
            return [split or "train" for split in given]
        caption: dict[int, str] = {}
        for picture, group in zip(pictures, groups, strict=True):
            if picture.text:
                caption[group] = min(caption.get(group, picture.text), picture.text)
        # files with nothing but a class are stratified by it, captions stay together
        places = [
            (picture.label, picture.name)
            if picture.label is not None and picture.text == self.layout.class_text(picture.label)
            else ("", caption.get(group, picture.name))
            for picture, group in zip(pictures, groups, strict=True)
        ]
        open_places = {place for place, split in zip(places, given, strict=True) if split in (None, "train")}
        decided = hash_split(open_places, self.validation_fraction, 0.0 if divided else self.test_fraction, self.seed)
        return [
            decided[place] if split is None or split == "train" else split
            for place, split in zip(places, given, strict=True)
        ]


class _Collection:
    """All pictures of a source with their groups, splits and classes."""

    def __init__(self, pictures: Sequence[Picture], groups: Sequence[int], splits: Sequence[Split]) -> None:
        self.pictures = pictures
        self.groups = groups
        self.splits = splits
        names = {picture.label for picture in pictures if picture.label is not None}
        numbers = all(name.isdecimal() for name in names)
        self.classes = sorted(names, key=lambda name: (int(name) if numbers else 0, name))
        self.class_index = {name: index for index, name in enumerate(self.classes)}


class Pictures:
    """Some of the pictures of a collection as samples; files are opened when they are asked for."""

    def __init__(self, collection: _Collection, chosen: Sequence[int]) -> None:
        self.collection = collection
        self.chosen = chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`.

        Raises:
            SampleError: no text, or an archive member that is not an image.
        """
        number = self.chosen[index]
        picture = self.collection.pictures[number]
        if not picture.text:
            raise SampleError(picture.name, "has no text", "a caption or a class")
        labels: dict[str, int | float] = {"group": self.collection.groups[number]}
        if picture.label is not None:
            labels["class"] = self.collection.class_index[picture.label]
        image: Any = str(picture.file) if picture.member is None else _open_member(picture)
        return Sample({"image": image, "text": picture.text}, picture.name, labels)


def _open_member(picture: Picture) -> Image.Image:
    assert picture.member is not None
    try:
        image = Image.open(io.BytesIO(read_member(picture.file, picture.member)))
    except Exception as error:  # decoders of damaged files raise nearly anything
        problem = f"can't be opened ({type(error).__name__}: {error})"
        raise SampleError(picture.name, problem, "a whole image file") from error
    image.filename = picture.name  # named by the processor's errors
    return image


def _first_of_each(pictures: Sequence[Picture], path: str) -> list[Picture]:
    kept: dict[Hashable, Picture] = {}
    repeated: dict[str, None] = {}
    for picture in pictures:
        if kept.setdefault((picture.file, picture.member), picture) is not picture:
            repeated[picture.name] = None
    if repeated:
        shown = ", ".join(list(repeated)[:10]) + (", ..." if len(repeated) > 10 else "")
        warnings.warn(
            f"{path} names {len(repeated)} pictures more than once; the first text of each is kept (duplicates: all "
            f"keeps every one): {shown}",
            stacklevel=2,
        )
    return list(kept.values())


def text_groups(pictures: Sequence[Picture]) -> list[int]:
    """Number the groups of pictures that are positives of each other: linked by a common text or a common file."""
    parent = list(range(len(pictures)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    seen: dict[Hashable, int] = {}
    for number, picture in enumerate(pictures):
        for key in ((picture.file, picture.member), picture.text or None):
            if key is not None:
                parent[root(number)] = root(seen.setdefault(key, number))
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(number), len(numbers)) for number in range(len(pictures))]
