"""Image datasets: folders, tables, shards and emoji become samples with texts, groups, classes and splits."""

import importlib.metadata
import io
import json
import pickle
import tarfile
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image

from mmpt.batches import MixtureSampler
from mmpt.config import from_config
from mmpt.datasets import emoji_art
from mmpt.datasets.emoji import Emoji, EmojiCategories, TrainingEmoji, emoji_categories
from mmpt.datasets.image import ImageText
from mmpt.encoders.image import ImageProcessor
from mmpt.errors import ConfigError, DataError, SampleError
from mmpt.splits import hash_split

SPLITS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MMPT_CACHE", str(tmp_path_factory.mktemp("cache")))


def paint(path, colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)


def png(colour="red"):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def make_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return str(path)


def samples(source, *splits):
    return [
        sample
        for split in splits or SPLITS
        for sample in map(source.split(split).__getitem__, range(len(source.split(split))))
    ]


def by_name(source, *splits):
    return {sample.name: sample for sample in samples(source, *splits)}


# Folders


def test_class_folders_give_templates_classes_and_groups(tmp_path):
    for name in ("golden_retriever/1.jpg", "golden_retriever/deep er/ä 2.PNG", "cat/1.png"):
        paint(tmp_path / name)
    (tmp_path / "cat" / "notes.md").write_text("not a picture")
    (tmp_path / ".hidden").mkdir()
    paint(tmp_path / ".hidden" / "1.png")
    source = ImageText(str(tmp_path), validation_fraction=0, test_fraction=0)
    found = by_name(source)
    assert sorted(found) == ["cat/1.png", "golden_retriever/1.jpg", "golden_retriever/deep er/ä 2.PNG"]
    dogs = found["golden_retriever/1.jpg"], found["golden_retriever/deep er/ä 2.PNG"]
    assert dogs[0].modalities["text"] == "a photo of a golden retriever"
    assert source.label_names("class") == ["cat", "golden_retriever"]
    assert [dog.labels["class"] for dog in dogs] == [1, 1]
    assert dogs[0].labels["group"] == dogs[1].labels["group"] != found["cat/1.png"].labels["group"]
    assert ImageProcessor(8)([dogs[1].modalities["image"]])["pixels"].shape == (1, 3, 8, 8)
    assert source.texts() == [sample.modalities["text"] for sample in samples(source, "train")]


def test_class_folders_are_divided_within_each_class(tmp_path):
    for name in ("a", "b"):
        for number in range(40):
            paint(tmp_path / name / f"{number}.png")
    paint(tmp_path / "rare" / "only.png")
    for number in range(3):
        paint(tmp_path / "small" / f"{number}.png")
    source = ImageText(str(tmp_path), validation_fraction=0.2, test_fraction=0.2)
    parts = {split: list(by_name(source, split)) for split in SPLITS}
    assert sum(map(len, parts.values())) == 84 == len({name for part in parts.values() for name in part})
    for split in SPLITS:
        assert {name.split("/")[0] for name in parts[split]} >= {"a", "b", "small"}
    assert 0.08 < len(parts["test"]) / 84 < 0.35


def test_split_folders_are_respected(tmp_path):
    for name in ("train/cat/1.png", "train/dog/2.png", "val/cat/3.png", "test/dog/4.png"):
        paint(tmp_path / name)
    source = ImageText(str(tmp_path))
    assert sorted(by_name(source, "train")) == ["train/cat/1.png", "train/dog/2.png"]
    assert list(by_name(source, "validation")) == ["val/cat/3.png"]
    assert list(by_name(source, "test")) == ["test/dog/4.png"]


def test_captions_stand_beside_the_pictures(tmp_path):
    paint(tmp_path / "one.jpg")
    (tmp_path / "one.txt").write_text("a  «red»\nsquare ", encoding="utf-8")
    paint(tmp_path / "two.v2.png")
    (tmp_path / "two.v2.txt").write_text("another")
    paint(tmp_path / "three.png")
    source = ImageText(str(tmp_path), validation_fraction=0, test_fraction=0)
    train = source.split("train")
    assert train[0].modalities["text"] == "a «red» square"
    assert train[2].modalities["text"] == "another"
    with pytest.raises(SampleError, match=r"three.png: has no text"):
        train[1]
    assert source.texts() == ["a «red» square", "another"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "empty"),
        (["notes.pdf"], r"\.pdf"),
        (["data.tsv"], "give the table"),
        (["data.tsv", "pictures.tar"], r"data.tsv as the path with root pictures\.tar"),
        (["1.png", "2.png"], "without texts"),
        (["1.png", "data.tsv"], "data.tsv as the path"),
        (["class/readme.md"], "no pictures"),
    ],
)
def test_folders_without_usable_pictures_say_what_is_there(tmp_path, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=message):
        ImageText(str(tmp_path)).split("train")


@pytest.mark.parametrize("name", ["nothing", "data.xlsx", "data.tar.gz", "missing.tsv", "missing.tar", "s-{0..3}.tar"])
def test_paths_that_are_no_dataset_are_typed_errors(tmp_path, name):
    if name in ("data.xlsx", "data.tar.gz"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError):
        ImageText(str(tmp_path / name)).split("train")


# Tables


def write_table(path, *rows):
    path.write_text("\n".join("\t".join(row) for row in rows) + "\n", encoding="utf-8")
    return str(path)


def test_a_table_of_paths_captions_classes_and_splits(tmp_path):
    rows = [
        ("filepath", "Caption", "class", "split"),
        ("a b/ü.png", "a red thing", "x", "train"),
        ("2.png", "a blue thing", "y", "val"),
        ("3.png", "a red thing", "x", "test"),
    ]
    for row in rows[1:]:
        paint(tmp_path / row[0])
    source = ImageText(write_table(tmp_path / "t.tsv", *rows))
    train, validation, test = (samples(source, split) for split in SPLITS)
    assert [len(part) for part in (train, validation, test)] == [1, 1, 1]
    assert train[0].modalities == {"image": str(tmp_path / "a b/ü.png"), "text": "a red thing"}
    assert train[0].labels == {"group": 0, "class": 0}
    assert validation[0].labels == {"group": 1, "class": 1}
    assert test[0].labels == {"group": 0, "class": 0}


def test_a_table_of_classes_gets_texts_from_the_template_and_validation_from_training(tmp_path):
    rows = [
        (f"{number}.png", ("long_sleeve", "hat")[number % 2], "test" if number < 10 else "train")
        for number in range(60)
    ]
    for row in rows:
        paint(tmp_path / row[0])
    path = write_table(tmp_path / "t.tsv", ("file", "class", "split"), *rows)
    source = ImageText(path, template="a picture of {}", validation_fraction=0.2)
    parts = {split: samples(source, split) for split in SPLITS}
    assert {sample.name for sample in parts["test"]} == {row[0] for row in rows[:10]}
    assert 5 <= len(parts["validation"]) <= 16
    assert len(parts["train"]) + len(parts["validation"]) == 50
    assert {sample.modalities["text"] for sample in parts["validation"]} == {
        "a picture of long sleeve",
        "a picture of hat",
    }
    assert len(ImageText(path, validation_fraction=0).split("validation")) == 0


def test_captions_of_one_split_never_appear_in_another(tmp_path):
    rows = [(f"{number}.png", f"text {number // 4}") for number in range(200)]
    for row in rows:
        paint(tmp_path / row[0])
    source = ImageText(
        write_table(tmp_path / "t.tsv", ("file", "text"), *rows), validation_fraction=0.2, test_fraction=0.2
    )
    texts = [{sample.modalities["text"] for sample in samples(source, split)} for split in SPLITS]
    assert all(texts)
    assert sum(map(len, texts)) == 50 == len(set.union(*texts))
    groups = {sample.modalities["text"]: sample.labels["group"] for sample in samples(source)}
    assert len(set(groups.values())) == 50


def test_captions_stay_together_also_where_there_are_classes(tmp_path):
    rows = [(f"{number}.png", f"text {number // 4}", "9" if number % 2 else "10") for number in range(200)]
    for row in rows:
        paint(tmp_path / row[0])
    path = write_table(tmp_path / "t.tsv", ("file", "text", "class"), *rows)
    source = ImageText(path, validation_fraction=0.2, test_fraction=0.2)
    texts = [{sample.modalities["text"] for sample in samples(source, split)} for split in SPLITS]
    assert sum(map(len, texts)) == 50 == len(set.union(*texts))
    assert source.label_names("class") == ["9", "10"]  # numbers in their order


def test_repeated_pictures_are_kept_once_with_a_warning_or_all_in_one_group(tmp_path):
    rows = [("1.png", "a"), ("2.png", "b"), ("./1.png", "c"), ("3.png", "c"), ("4.png", "d")]
    for row in rows:
        paint(tmp_path / row[0])
    path = write_table(tmp_path / "t.tsv", ("file", "text"), *rows)
    with pytest.warns(UserWarning, match=r"1 pictures more than once.*1\.png"):
        once = samples(ImageText(path))
    assert sorted(sample.modalities["text"] for sample in once) == ["a", "b", "c", "d"]
    every = samples(ImageText(path, duplicates="all"))
    groups = {sample.modalities["text"]: sample.labels["group"] for sample in every}
    assert len(every) == 5
    assert groups["a"] == groups["c"]  # the same picture
    assert len({groups[text] for text in "abd"}) == 3


def test_rows_without_a_text_are_bad_samples_and_tables_without_any_are_bad_data(tmp_path):
    paint(tmp_path / "1.png")
    paint(tmp_path / "2.png")
    rows = [("file", "text"), ("1.png", "a"), ("2.png", "  ")]
    source = ImageText(write_table(tmp_path / "t.tsv", *rows), validation_fraction=0, test_fraction=0)
    with pytest.raises(SampleError, match="no text"):
        source.split("train")[1]
    write_table(tmp_path / "t.tsv", rows[0], rows[2])
    with pytest.raises(DataError, match="all 1 texts are empty"):
        ImageText(str(tmp_path / "t.tsv")).split("train")


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([("where", "text"), ("1.png", "a")], {}, "where, text.*image_column"),
        ([("file", "remark"), ("1.png", "a")], {}, "file, remark.*text_column"),
        ([("file", "text"), ("1.png", "a")], {"text_column": "title"}, "no text column 'title'.*file, text"),
        ([("file", "text"), ("../1.png", "a")], {}, "line 2.*leads out"),
        ([("file", "text"), ("", "a")], {}, "line 2.*empty"),
        ([("file", "text"), ("7.png", "a")], {}, "none of the 1 pictures.*root"),
        ([("file", "text", "split"), ("1.png", "a", "later")], {}, "line 2: split is 'later'"),
    ],
)
def test_unusable_tables_say_what_to_change(tmp_path, rows, arguments, message):
    paint(tmp_path / "1.png")
    with pytest.raises(DataError, match=message):
        ImageText(write_table(tmp_path / "t.tsv", *rows), **arguments).split("train")


def test_paths_of_a_table_may_begin_elsewhere_or_inside_a_tar(tmp_path):
    paint(tmp_path / "pictures" / "1.png", "blue")
    (tmp_path / "tables").mkdir()
    path = write_table(tmp_path / "tables" / "t.tsv", ("file", "text"), ("1.png", "a"))
    everything = {"validation_fraction": 0, "test_fraction": 0}
    with_root = ImageText(path, root=str(tmp_path / "pictures"), **everything).split("train")[0]
    archive = make_tar(tmp_path / "pictures.tar", {"./1.png": png("blue")})
    in_tar = ImageText(path, root=archive, **everything).split("train")[0]
    write_table(tmp_path / "tables" / "t.tsv", ("file", "text"), (str(tmp_path / "pictures" / "1.png"), "a"))
    absolute = ImageText(path, **everything).split("train")[0]
    pixels = [ImageProcessor(8)([sample.modalities["image"]])["pixels"] for sample in (with_root, in_tar, absolute)]
    assert torch.equal(pixels[0], pixels[1])
    assert torch.equal(pixels[0], pixels[2])
    write_table(tmp_path / "tables" / "t.tsv", ("file", "text"), ("2.png", "a"))
    with pytest.raises(DataError, match=r"no member .2\.png"):
        ImageText(path, root=archive).split("train")


# Shards


def test_shards_are_read_in_place_and_grouped_by_key(tmp_path):
    make_tar(
        tmp_path / "s-0.tar",
        {
            "dir/1.png": png("red"),
            "dir/1.txt": b"a red\nsquare",
            "dir/1.json": b'{"caption": "unused"}',
            "dir/2.txt": b"no picture",
        },
    )
    make_tar(
        tmp_path / "s-1.tar",
        {
            "1.json": b'{"caption": "blue", "label": 3}',
            "1.png": png("blue"),
            "2.seg.png": png(),
            "2.cls": b"3",
            "2.JPG": png(),
        },
    )
    for form in (tmp_path, tmp_path / "s-{0..1}.tar"):
        source = ImageText(str(form), validation_fraction=0, test_fraction=0)
        train = samples(source, "train")
        assert [sample.name for sample in train] == ["s-0.tar/dir/1", "s-1.tar/1", "s-1.tar/2"]
        assert [sample.modalities["text"] for sample in train] == ["a red square", "blue", "a photo of a 3"]
        assert "class" not in train[0].labels
        assert train[1].labels["class"] == train[2].labels["class"] == 0
    pixels = ImageProcessor(8)([sample.modalities["image"] for sample in train])["pixels"]
    assert pixels[0].mean((1, 2)).argmax() == 0
    assert pixels[1].mean((1, 2)).argmax() == 2
    assert not list(tmp_path.glob("**/*.png"))  # nothing was extracted
    chosen = ImageText(str(tmp_path / "s-0.tar"), text_column="caption", validation_fraction=0, test_fraction=0)
    assert chosen.split("train")[0].modalities["text"] == "unused"


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_divide_shards_of_uneven_lengths_without_loss_or_repetition(tmp_path, world_size):
    for shard, count in enumerate((7, 1, 4)):
        files = {f"{n}.{kind}": png() if kind == "png" else b"a" for n in range(count) for kind in ("png", "txt")}
        make_tar(tmp_path / f"s-{shard}.tar", files)
    train = ImageText(str(tmp_path), validation_fraction=0, test_fraction=0).split("train")
    names = sorted(f"s-{shard}.tar/{n}" for shard, count in enumerate((7, 1, 4)) for n in range(count))

    def read(**options):
        parts = [MixtureSampler({"a": 12}, 2, rank=r, world_size=world_size, **options) for r in range(world_size)]
        return [[train[key.index].name for batch in part for key in batch] for part in parts]

    assert sorted(chain(*read(shuffle=False))) == names
    for epoch in (read(shuffle=True), read(shuffle=True, seed=1)):
        assert sorted(chain(*epoch)) == names  # 12 divides by both
        assert len({len(part) for part in epoch}) == 1


def test_a_damaged_member_is_a_bad_sample_of_that_name(tmp_path):
    cut = png()[:50]
    path = make_tar(tmp_path / "s.tar", {"1.png": b"", "1.txt": b"a", "2.png": cut, "2.txt": b"b"})
    train = ImageText(path, validation_fraction=0, test_fraction=0).split("train")
    with pytest.raises(SampleError, match=r"s\.tar/1"):
        train[0]
    with pytest.raises(SampleError, match=r"s\.tar/2"):
        ImageProcessor(8)([train[1].modalities["image"]])


def test_archives_without_pictures_are_refused(tmp_path):
    with pytest.raises(DataError, match="no pictures"):
        ImageText(make_tar(tmp_path / "s.tar", {"1.txt": b"a"})).split("train")


# The source as a whole


def test_added_files_do_not_move_the_others():
    names = [("", f"name {number}") for number in range(500)]
    before = hash_split(names[:250], 0.2, 0.2, seed=0)
    after = hash_split(names, 0.2, 0.2, seed=0)
    assert all(after[name] == split for name, split in before.items())
    assert {0.1 < list(after.values()).count(split) / 500 < 0.3 for split in ("validation", "test")} == {True}
    assert hash_split(names, 0.2, 0.2, seed=1) != after
    assert set(hash_split(names[:3], 0.01, 0.01, seed=0).values()) == set(SPLITS)
    assert set(hash_split(names[:9], 0.0, 0.0, seed=0).values()) == {"train"}
    for size in range(3, 12):
        assert "train" in hash_split(names[:size], 0.49, 0.49, seed=0).values()


def test_the_source_follows_its_path_and_survives_pickling_and_configuration(tmp_path):
    paint(tmp_path / "one" / "cat" / "1.png")
    paint(tmp_path / "two" / "dog" / "1.png")
    source = from_config(ImageText(str(tmp_path / "one"), test_fraction=0.3, emoji=Emoji(size=36)).config())
    assert source.emoji.size == 36
    assert source.label_names("class") == ["cat"]
    source.path = str(tmp_path / "two")
    assert source.label_names("class") == ["dog"]
    train = pickle.loads(pickle.dumps(source.split("train")))
    assert [train[i].name for i in range(len(train))] == ["dog/1.png"]


@pytest.mark.parametrize(
    "arguments", [{"template": "a photo"}, {"validation_fraction": 0.5, "test_fraction": 0.5}, {"test_fraction": -0.1}]
)
def test_settings_that_cannot_work_are_refused(arguments):
    with pytest.raises(ConfigError, match="expected"):
        ImageText(**arguments)


# Emoji

SOME = (
    "red apple",
    "thumbs up",
    "waving hand dark skin tone",
    "wales",
    "france",
    "woman astronaut",
    "white heart",
)


@pytest.fixture
def some_emoji(monkeypatch):
    """Draw a handful of emoji instead of 3,900."""
    chosen = tuple(emoji for emoji in emoji_art.emoji_names() if emoji.name in SOME)
    assert len(chosen) == len(SOME)
    monkeypatch.setattr(emoji_art, "emoji_names", lambda: chosen)
    monkeypatch.setattr("mmpt.datasets.emoji.emoji_names", lambda: chosen)
    return chosen


def test_emoji_have_names_aliases_and_marks():
    emoji = {e.name: e for e in emoji_art.emoji_names()}
    assert len(emoji) == len(emoji_art.emoji_names()) > 3900
    assert "+1" in emoji["thumbs up"].aliases
    assert emoji["thumbs up"].code_points == "1f44d"
    assert emoji["red heart"].code_points == "2764"  # without the variation selector
    assert emoji["woman astronaut"].code_points == "1f469-200d-1f680"
    assert emoji["man's shoe"].name == "man's shoe"
    assert emoji["france"].is_country_flag
    assert not emoji["wales"].is_country_flag
    assert not emoji["black flag"].is_country_flag
    assert emoji["waving hand dark skin tone"].has_skin_tone
    assert not emoji["waving hand"].has_skin_tone
    assert sum(e.is_country_flag for e in emoji.values()) > 250


def test_every_style_draws_the_same_emoji_under_the_same_number(some_emoji):
    drawn = {style: emoji_art.drawings(style, 48) for style in emoji_art.STYLES}
    plain = [number for number, e in enumerate(some_emoji) if not (e.has_skin_tone or e.is_country_flag)]
    for style, art in drawn.items():
        expected = plain if emoji_art.STYLES[style].monochrome else list(range(len(some_emoji)))
        if style == "openmoji_flat":  # nothing is left of a white heart without its outline
            expected = [number for number in expected if some_emoji[number].name != "white heart"]
        assert art.numbers == expected, style
        for number in art.numbers:
            picture = art[number]
            assert picture.shape == (48, 48, 4)
            assert picture.dtype == np.uint8
            ink = picture[..., 3] > 8
            assert 0.05 < ink.mean() < 0.95
            assert not ink[0].any()
            assert not ink[:, 0].any()
    apple = [e.name for e in some_emoji].index("red apple")
    for style in ("openmoji", "openmoji_flat", "noto_color", "twemoji"):
        red, _, blue, _ = drawn[style][apple].reshape(-1, 4)[drawn[style][apple].reshape(-1, 4)[:, 3] > 128].mean(0)
        assert red > blue + 50, style
    for style in ("openmoji_line", "noto_mono"):
        colours = drawn[style][apple][..., :3][drawn[style][apple][..., 3] > 128]
        assert np.ptp(colours.astype(int), axis=1).max() <= 2, style


def test_drawings_are_drawn_once(some_emoji, monkeypatch):
    first = emoji_art.drawings("twemoji", 24)
    monkeypatch.setattr(emoji_art, "_draw_all", lambda *a: pytest.fail("drawn again"))
    second = emoji_art.drawings("twemoji", 24)
    assert np.array_equal(first[0], second[0])
    assert np.array_equal(pickle.loads(pickle.dumps(second))[0], first[0])
    index = first.path.with_suffix(".json")
    assert json.loads(index.read_text()) == first.numbers
    with pytest.raises(BaseException, match="drawn again"):
        emoji_art.drawings("twemoji", 25)


def test_a_drawing_is_cropped_centred_and_keeps_its_proportions():
    canvas = np.zeros((40, 60, 4), dtype=np.uint8)
    canvas[5:15, 10:50] = (255, 0, 0, 255)  # 10 x 40
    fitted = emoji_art.fit(canvas, 48)
    ink = fitted[..., 3] > 128
    assert np.flatnonzero(ink.any(0))[[0, -1]].tolist() == [2, 45]
    assert np.flatnonzero(ink.any(1))[[0, -1]].tolist() == [18, 28]
    assert emoji_art.fit(np.zeros((9, 9, 4), dtype=np.uint8), 48) is None


def test_emoji_splits_share_names_but_no_drawings(some_emoji):
    source = ImageText(emoji=Emoji(size=24))
    train = samples(source, "train")
    assert len(train) == 2 * len(some_emoji)
    styles = {split: {sample.name.split("/")[0] for sample in samples(source, split)} for split in SPLITS}
    assert styles["test"] == {"twemoji"}
    assert styles["validation"] == {"noto_color"}
    assert styles["train"] <= {"openmoji", "openmoji_flat", "openmoji_line", "noto_color", "noto_mono"}
    for sample in [*train, *samples(source, "test")]:
        emoji = some_emoji[sample.labels["group"]]
        assert sample.modalities["text"] in (emoji.name, *emoji.aliases)
        assert sample.labels["flag"] == emoji.is_country_flag
        assert sample.labels["tone"] == emoji.has_skin_tone
        assert source.label_names("group")[sample.labels["group"]] == emoji.name
    assert [sample.modalities["text"] for sample in samples(source, "test")] == [e.name for e in some_emoji]
    assert set(source.texts()) >= {e.name for e in some_emoji}
    assert ImageProcessor(16)([train[0].modalities["image"]])["pixels"].shape == (1, 3, 16, 16)


def test_styles_and_names_of_a_training_sample_follow_torchs_generator(some_emoji):
    train = Emoji(size=24, alias_probability=0.3).split("train")
    assert isinstance(train, TrainingEmoji)
    place = train.places.index((0, [e.name for e in some_emoji].index("thumbs up")))
    torch.manual_seed(0)
    first = [train[place] for _ in range(200)]
    torch.manual_seed(0)
    assert [train[place].name for _ in range(200)] == [sample.name for sample in first]
    styles = [sample.name.split("/")[0] for sample in first]
    assert 0.5 < styles.count("openmoji") / 200 < 0.8
    assert 0.02 < styles.count("openmoji_line") / 200 < 0.2
    texts = [sample.modalities["text"] for sample in first]
    assert 0.6 < texts.count("thumbs up") / 200 < 0.85
    assert "+1" in texts


def test_a_style_that_lacks_an_emoji_leaves_it_to_its_family(some_emoji):
    train = Emoji(size=24, styles=[{"noto_mono": 0.99, "noto_color": 0.01}]).split("train")
    flag = [e.name for e in some_emoji].index("france")
    assert {train[train.places.index((0, flag))].name for _ in range(20)} == {"noto_color/france"}


@pytest.mark.parametrize(
    "arguments",
    [
        {"test_style": "noto_mono"},
        {"test_style": "openmoji_line"},
        {"styles": [{"twemoji": 1.0}]},
        {"styles": [{"openmoji": 0.0}]},
        {"alias_probability": 1.5},
    ],
)
def test_emoji_settings_that_cannot_work_are_refused(arguments):
    with pytest.raises(ConfigError):
        Emoji(**arguments)


def test_unknown_styles_name_the_known_ones():
    with pytest.raises(ConfigError, match="twemoji"):
        Emoji(validation_style="cave painting").split("validation")


def test_missing_packages_are_named_with_the_way_to_install_them(monkeypatch):
    def gone(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(emoji_art, "version", gone)
    with pytest.raises(DataError, match=r'pip install "mmpt\[image\]"'):
        Emoji().split("test")


def test_everything_of_a_folder_needs_no_texts(tmp_path):
    for name in ("b.png", "a.jpg", "c/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "notes.md").write_text("not a picture")
    everything = ImageText(str(tmp_path)).everything()
    assert [everything[i].name for i in range(len(everything))] == ["a.jpg", "b.png", "c/d.png"]
    assert all(set(everything[i].modalities) == {"image"} for i in range(3))


def test_categories_are_divided_whole_or_with_few_labels():
    whole, few = EmojiCategories(), EmojiCategories(shots=10)
    for source in (whole, few):
        parts = [set(source._numbers(split)) for split in SPLITS]
        assert set.union(*parts) == set(emoji_categories())
        assert sum(map(len, parts)) == len(emoji_categories())  # none in two splits
    kinds = [emoji_categories()[number] for number in few._numbers("train")]
    assert {kinds.count(kind) for kind in kinds} == {10}
    assert len(whole._numbers("train")) == pytest.approx(0.6 * len(emoji_categories()), abs=9)
