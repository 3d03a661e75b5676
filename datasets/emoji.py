"""The default pictures: emoji in several art styles, with one style that is never trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mmpt.datasets.emoji_art import Drawings, drawings, emoji_categories, emoji_names
from mmpt.errors import ConfigError
from mmpt.files import hash_fraction
from mmpt.source import Examples, Sample, Source, Split

TRAINING_STYLES: list[dict[str, float]] = [
    {"openmoji": 0.65, "openmoji_flat": 0.25, "openmoji_line": 0.1},
    {"noto_color": 0.75, "noto_mono": 0.25},
]


class Emoji(Source):
    """Emoji and their English names (about 3,900, skin tones and flags included).

    The training split holds each emoji once for each family of styles; which style of the family it is shown in changes
    from epoch to epoch. The validation split shows all emoji in one style of the training, the test split in a style by
    other artists. So the names of the test are known and their drawings are not: it asks whether the model has learnt
    what things are, or only what they look like in one hand.

    Samples hold `image`, uint8 (size, size, 4) with opacity, and `text`. Labels: `group`, the number of the emoji in
    every style; `flag`, 1 for country flags; `tone`, 1 for a chosen skin tone.

    Args:
        size: height and width of the drawings.
        styles: families of training styles, see `mmpt.datasets.emoji_art.STYLES`: style -> how often it is shown. By
            default OpenMoji in three variants, and the two Noto fonts.
        validation_style: the style of the validation split.
        test_style: the style of the test split, which must come from other artists than the training styles.
        alias_probability: how often a training sample has another of the emoji's names (`"+1"` for thumbs up), where
            it has any.

    Raises:
        ConfigError: no styles, the test style among the others, or a probability outside 0 to 1.
    """

    def __init__(
        self,
        size: int = 72,
        styles: Sequence[Mapping[str, float]] | None = None,
        validation_style: str = "noto_color",
        test_style: str = "twemoji",
        alias_probability: float = 0.1,
    ) -> None:
        self.families: list[dict[str, float]] = [dict(family) for family in styles or TRAINING_STYLES]
        if not all(sum(family.values()) > 0 and min(family.values()) >= 0 for family in self.families):
            raise ConfigError(f"styles is {self.families}; expected families with positive weights")
        seen = [style for family in self.families for style in family] + [validation_style]
        if test_style.split("_")[0] in {style.split("_")[0] for style in seen}:
            raise ConfigError(f"test_style {test_style!r} shows drawings of a training style ({', '.join(seen)})")
        if not 0 <= alias_probability <= 1:
            raise ConfigError(f"alias_probability is {alias_probability}; expected a number from 0 to 1")
        self.size = size
        self.validation_style = validation_style
        self.test_style = test_style
        self.alias_probability = alias_probability

    def split(self, name: Split) -> Examples:
        """The emoji of one split.

        Raises:
            DataError: a package is missing: `pip install "mmpt[image]"`.
        """
        if name == "train":
            families = [[(drawings(style, self.size), weight) for style, weight in f.items()] for f in self.families]
            return TrainingEmoji(families, self.alias_probability)
        style = self.validation_style if name == "validation" else self.test_style
        return EmojiInStyle(style, drawings(style, self.size))

    def label_names(self, label: str) -> Sequence[str]:
        """The names of all emoji for `group`."""
        return [emoji.name for emoji in emoji_names()] if label == "group" else ()

    def texts(self) -> Sequence[str]:
        """Each name, and each alias, of the training split once."""
        shown = {
            number for family in self.families for style in family for number in drawings(style, self.size).numbers
        }
        texts: dict[str, None] = {}
        for number in sorted(shown):
            emoji = emoji_names()[number]
            texts[emoji.name] = None
            if self.alias_probability > 0:
                texts.update(dict.fromkeys(emoji.aliases))
        return list(texts)


class EmojiCategories(Emoji):
    """Emoji with the nine Unicode categories (animals, food, symbols, ...) as classes.

    Three fifths of each category are the training split, in every training family; a fifth the validation split, in the
    validation style; the rest the test split, in the test style. With `shots`, training and validation have so many of
    each category and the test has all others. No emoji is in two splits, and skin tones, which would be near copies of
    each other, are in none. The label is `class`.

    Args:
        shots: emoji of each category for training; None is three fifths.
        size: height and width of the drawings.
        seed: of the choice of emoji.
        validation_style: see `Emoji`.
        test_style: see `Emoji`.

    Raises:
        ConfigError: a number of shots below 1.
    """

    def __init__(
        self,
        shots: int | None = None,
        size: int = 72,
        seed: int = 0,
        validation_style: str = "noto_color",
        test_style: str = "twemoji",
    ) -> None:
        super().__init__(size=size, validation_style=validation_style, test_style=test_style, alias_probability=0.0)
        if shots is not None and shots < 1:
            raise ConfigError(f"shots is {shots}; expected at least 1 emoji of each category")
        self.shots = shots
        self.seed = seed

    def split(self, name: Split) -> Examples:
        """The emoji of one split, with the label `class`."""
        numbers = self._numbers(name)
        names = self.label_names("class")
        classes = {number: names.index(emoji_categories()[number]) for number in numbers}
        if name == "train":
            shown = [(drawings(style, self.size), number) for style in self._colour_styles() for number in numbers]
        else:
            style = self.validation_style if name == "validation" else self.test_style
            shown = [(drawings(style, self.size), number) for number in numbers]
        return [
            _sample(number, drawn, drawn.path.stem.split("-")[0], emoji_names()[number].name, classes[number])
            for drawn, number in shown
            if number in drawn.row
        ]

    def label_names(self, label: str) -> Sequence[str]:
        """The nine categories for `class`."""
        return sorted(set(emoji_categories().values())) if label == "class" else ()

    def _colour_styles(self) -> list[str]:
        """The style of each training family that is shown most."""
        return [max(family, key=lambda style: family[style]) for family in self.families]

    def _numbers(self, name: Split) -> list[int]:
        chosen: list[int] = []
        for category in self.label_names("class"):
            members = [number for number, own in emoji_categories().items() if own == category]
            members.sort(key=lambda number: hash_fraction(emoji_names()[number].name, self.seed))
            ends = (self.shots, 2 * self.shots) if self.shots else (len(members) * 3 // 5, len(members) * 4 // 5)
            part = {
                "train": members[: ends[0]],
                "validation": members[ends[0] : ends[1]],
                "test": members[ends[1] :],
            }[name]
            chosen += part
        return chosen


class EmojiInStyle:
    """All emoji of one style, in order."""

    def __init__(self, style: str, drawn: Drawings) -> None:
        self.style = style
        self.drawn = drawn

    def __len__(self) -> int:
        return len(self.drawn.numbers)

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`."""
        number = self.drawn.numbers[index]
        return _sample(number, self.drawn, self.style, emoji_names()[number].name)


class TrainingEmoji:
    """Each emoji once for each family; style and name are drawn from torch's global generator, seeded for the sample.

    The families of an emoji are neighbours, and so are emoji that are alike: skin tones, professions, clock faces.

    Args:
        families: the drawings of the styles of each family, with their weights.
        alias_probability: see `Emoji`.
    """

    def __init__(self, families: Sequence[Sequence[tuple[Drawings, float]]], alias_probability: float) -> None:
        self.families = families
        self.alias_probability = alias_probability
        shown = [{number for drawn, _ in styles for number in drawn.numbers} for styles in families]
        self.places = [
            (family, number)
            for number in sorted(set().union(*shown))
            for family in range(len(families))
            if number in shown[family]
        ]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`."""
        family, number = self.places[index]
        emoji = emoji_names()[number]
        shown = [(drawn, weight) for drawn, weight in self.families[family] if number in drawn.row]
        choice, alias, which = torch.rand(3).tolist()
        drawn = _choose(shown, choice)
        text = emoji.name
        if emoji.aliases and alias < self.alias_probability:
            text = emoji.aliases[int(which * len(emoji.aliases))]
        return _sample(number, drawn, drawn.path.stem.split("-")[0], text)


def _choose(weighted: Sequence[tuple[Drawings, float]], point: float) -> Drawings:
    """The item that a point in [0, 1) falls on when the items share it by weight."""
    left = point * sum(weight for _, weight in weighted)
    for item, weight in weighted:
        left -= weight
        if left < 0:
            return item
    return weighted[-1][0]


def _sample(number: int, drawn: Drawings, style: str, text: str, category: int | None = None) -> Sample:
    emoji = emoji_names()[number]
    labels = {"group": number, "flag": int(emoji.is_country_flag), "tone": int(emoji.has_skin_tone)}
    if category is not None:
        labels["class"] = category
    return Sample({"image": drawn[number], "text": text}, f"{style}/{emoji.name}", labels)
