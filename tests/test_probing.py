"""Tasks, scores and tests of probes: numbers worked out by hand."""

import csv
import os

import numpy as np
import pytest
from probes import write

from mmpt.errors import ConfigError, DataError
from mmpt.probing.comparison import compare, compare_groups, exact_test
from mmpt.probing.embedders import FunctionEmbedder
from mmpt.probing.linear import LinearWordProbe
from mmpt.probing.loading import load_embedder
from mmpt.probing.masked_lm import MaskedLmProbe
from mmpt.probing.scoring import (
    calibrated,
    correlations,
    macro_accuracy,
    recall_at,
    spread,
    summary,
)
from mmpt.probing.stroop import ProbeResult, StroopProbe, StroopSettings
from mmpt.probing.task import Item, Task, from_word_pieces, load_task, shipped_tasks


def vectors(table: dict[str, tuple[float, ...]]) -> FunctionEmbedder:
    return FunctionEmbedder(lambda texts: [table[text] for text in texts])


PLANE = {
    "a  flag": (3, 4),
    "a red flag": (6, 8),
    "a green flag": (4, 3),
    "a blue flag": (-3, 4),
}


def test_the_score_is_the_cosine_with_the_base_sentence():
    probe = StroopProbe(vectors(PLANE))
    scores = probe.score_from_options("a MASK flag", ["red", "green", "blue"])
    np.testing.assert_allclose(scores, [1.0, 0.96, 0.28], atol=1e-6)
    dots = StroopProbe(vectors(PLANE), StroopSettings(normalize=False)).score("a  flag", ["a green flag"])
    np.testing.assert_allclose(dots, [24.0])


def test_a_sentence_equal_to_the_base_scores_one():
    assert StroopProbe(vectors(PLANE)).score("a  flag", ["a  flag"])[0] == pytest.approx(1.0, abs=1e-6)


def test_the_neutral_text_stands_for_mask_in_the_base_sentence():
    seen = []

    def watch(texts):
        seen.extend(texts)
        return np.ones((len(texts), 2))

    StroopProbe(FunctionEmbedder(watch)).score_from_options("what is the shape of a flag? MASK", ["circle"])
    assert seen == ["what is the shape of a flag? ", "what is the shape of a flag? circle"]
    seen.clear()
    StroopProbe(FunctionEmbedder(watch), StroopSettings(neutral="thing")).score_from_options("a MASK b", ["red"])
    assert seen == ["a thing b", "a red b"]


@pytest.mark.parametrize(
    ("prompt", "word", "base", "option", "candidate"),
    [
        ("a MASK shaped WORD", "wedge", "a  shaped wedge", "triangle", "a triangle shaped wedge"),
        ("WORDs have a MASK shape", "box", "boxs have a  shape", "circle", "boxs have a circle shape"),
        ("A MASK colored WORD", "banana", "A  colored banana", "yellow", "A yellow colored banana"),
    ],
)
def test_slots_are_replaced_verbatim(prompt, word, base, option, candidate):
    item = Item({"WORD": word}, (option, "other"), 0)
    task = Task("t", "choice", (item,), (prompt,))
    seen = []

    def watch(texts):
        seen.extend(texts)
        return np.ones((len(texts), 2))

    StroopProbe(FunctionEmbedder(watch)).run(task)
    assert seen[:2] == [base, candidate]


def test_a_prompt_without_mask_is_a_value_error():
    with pytest.raises(ValueError, match="MASK"):
        StroopProbe(vectors(PLANE)).score_from_options("a red flag", ["red"])
    with pytest.raises(ValueError, match="MASK"):
        load_task("color", ["a WORD"])


def test_the_first_of_equal_options_is_given():
    task = Task("t", "choice", (Item({"WORD": "x"}, ("a", "b"), 1),), ("MASK WORD",))
    result = StroopProbe(FunctionEmbedder(lambda texts: np.ones((len(texts), 2)))).run(task)
    assert result.predictions.tolist() == [[0]]


def test_macro_accuracy_is_the_mean_recall():
    answers, given = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 1, 0])
    assert (answers == given).mean() == pytest.approx(2 / 3)
    assert macro_accuracy(answers, given) == pytest.approx(0.5556, abs=1e-4)


def test_recall_at_five_counts_the_five_best_and_does_not_exist_for_five_options():
    scores = np.array([[0.1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [0.7, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]])
    assert recall_at(scores, np.array([0, 3])) == 0.5
    assert recall_at(scores[:, :5], np.array([0, 3])) is None


def test_spread_over_prompts_divides_by_n_minus_one():
    found = spread(np.array([0.4, 0.5, 0.6]))
    assert (found.mean, found.std, found.max) == pytest.approx((0.5, 0.1, 0.6))
    assert spread(np.array([0.4])).std == 0


def test_correlations_are_signed():
    found = correlations(np.array([0.90, 0.80, 0.95, 0.70]), np.array([2.0, 3.5, 1.5, 5.0]))
    assert found["pearson"] == pytest.approx(-0.9983, abs=1e-4)
    assert found["spearman"] == pytest.approx(-1)
    assert found["kendall"] == pytest.approx(-1)


def test_equal_scores_have_no_correlation_and_equal_ratings_are_an_error():
    assert correlations(np.ones(3), np.arange(3.0)) == {"pearson": 0, "spearman": 0, "kendall": 0}
    with pytest.raises(DataError, match="equal"):
        correlations(np.arange(3.0), np.ones(3))


def test_the_exact_test_is_two_sided():
    assert exact_test(15, 5) == pytest.approx(0.0414, abs=1e-4)
    assert exact_test(1, 9) == pytest.approx(0.0215, abs=1e-4)
    assert exact_test(0, 0) == 1


def test_calibration_takes_away_what_an_option_gets_for_any_item():
    scores = np.array([[0.9, 0.5], [0.8, 0.6]])  # the first option always wins
    assert calibrated(scores).argmax(1).tolist() == [0, 1]
    # items and options that disturb by factors leave nothing to choose by, and what is added to them is seen
    factors = 1 - np.array([[1.0], [2.0], [3.0]]) * np.array([[0.1, 0.3]])
    np.testing.assert_allclose(calibrated(factors)[:, 0], calibrated(factors)[:, 1], atol=1e-9)
    factors[1, 0] += 0.01
    assert calibrated(factors)[1, 0] > calibrated(factors)[1, 1]


def result_of(model: str, scores: np.ndarray, task: Task) -> ProbeResult:
    return ProbeResult(model, "stroop", {"pooling": "mean"}, task, tuple(scores))


@pytest.fixture
def pair():
    """Twenty items whose options are turned round in every second one; two prompts."""
    items = tuple(Item({"WORD": str(i)}, ("a", "b") if i % 2 else ("b", "a"), (i + (i < 8)) % 2) for i in range(20))
    task = Task("t", "choice", items, ("MASK WORD", "WORD MASK"))
    answers = task.answers
    right = np.where(np.arange(2) == answers[:, None], 1.0, 0.0)
    wrong = 1 - right
    first = np.where(np.arange(20)[:, None] < 15, right, wrong)  # right on 15
    second = np.where(np.arange(20)[:, None] < 5, right, wrong)  # on 5 of these
    return task, result_of("one", np.stack([first, right]), task), result_of("two", np.stack([second, wrong]), task)


def test_summary_counts_each_prompt_and_the_spread(pair):
    task, first, _ = pair
    found = summary(first)
    assert [row["accuracy"] for row in found["prompts"]] == [0.75, 1.0]
    assert found["over_prompts"]["accuracy"] == pytest.approx({"mean": 0.875, "std": 0.17678, "max": 1.0}, abs=1e-5)
    low, high = found["accuracy_interval"]
    assert low < 0.875 < high
    counts = [item.options[item.answer] for item in task.items].count("a")
    assert found["majority"] == max(counts, 20 - counts) / 20
    assert found["chance"] == 0.5
    # macro accuracy is over options, whatever their place in an item
    names = np.array([item.options[item.answer] for item in task.items])
    hit = np.arange(20) < 15
    assert found["prompts"][0]["macro_accuracy"] == pytest.approx(np.mean([hit[names == o].mean() for o in "ab"]))


def test_comparison_pairs_items(pair):
    _, first, second = pair
    found = compare(first, second)
    assert found.difference == pytest.approx(0.875 - 0.125)
    # by scores averaged over prompts the first is right on 15 and ties on 5, the second ties on 5 and is wrong on 15;
    # a tie goes to the option that stands first, which is the same for both
    tie = (first.task.answers == 0).astype(int)
    right = [np.r_[np.ones(15), tie[15:]], np.r_[tie[:5], np.zeros(15)]]
    assert found.only_first == int((right[0] > right[1]).sum())
    assert found.only_second == int((right[1] > right[0]).sum())
    assert found.p == exact_test(found.only_first, found.only_second)
    assert found.interval[0] > 0
    mirrored = compare(second, first)
    assert mirrored.difference == -found.difference
    assert mirrored.p == found.p


def test_seeds_are_averaged_before_they_are_compared(pair):
    _, first, second = pair
    found = compare_groups([first, second], [second, second], "accuracy")
    assert found.difference == pytest.approx((0.875 + 0.125) / 2 - 0.125)
    assert found.seed_differences == pytest.approx((0.75, 0.0))
    same = compare_groups([first, second], [second, first], "accuracy")
    assert (same.difference, same.interval, same.p) == (0, (0, 0), 1)


def test_calibrated_comparison_ignores_the_bias_for_an_option(pair):
    task, first, second = pair
    bias = np.array([[10.0 if option == "a" else 0.0 for option in item.options] for item in task.items])
    biased = result_of("biased", np.stack(first.scores) + bias, task)
    assert compare_groups([biased], [second], "accuracy").difference < 0.6
    plain = compare_groups([first], [second], "accuracy_calibrated")
    found = compare_groups([biased], [second], "accuracy_calibrated")
    assert found.difference == pytest.approx(plain.difference)
    assert (
        summary(biased)["over_prompts"]["accuracy_calibrated"] == summary(first)["over_prompts"]["accuracy_calibrated"]
    )


def test_results_of_different_items_are_not_paired(pair):
    task, first, _ = pair
    other = Task("t", "choice", task.items[::-1], task.prompts)
    with pytest.raises(DataError, match="paired"):
        compare(first, result_of("three", np.stack(first.scores), other))


def test_ratings_are_correlated_and_compared():
    items = tuple(Item({"WORD": str(i)}, rating=float(i)) for i in range(8))
    task = Task("r", "rating", items, ("I see MASK",))
    up, down = np.arange(8.0)[None], -np.arange(8.0)[None]
    found = summary(result_of("one", up, task))
    assert found["over_prompts"]["spearman"]["mean"] == pytest.approx(1)
    assert found["prompts"][0]["pearson_absolute"] == pytest.approx(1)
    assert compare(result_of("one", up, task), result_of("two", down, task)).difference == pytest.approx(2)


def test_concreteness_compares_the_sentence_with_the_word_to_the_one_without():
    table = {"I see the ": (1.0, 0.0), "I see the banana": (1.0, 0.0)}
    table |= {"I see the idea": (0.6, 0.8), "I see the pen": (0.8, 0.6)}
    items = tuple(Item({"WORD": w}, rating=r) for w, r in (("banana", 5.0), ("idea", 1.0), ("pen", 4.8)))
    result = StroopProbe(vectors(table)).run(Task("c", "rating", items, ("I see the MASK",)))
    np.testing.assert_allclose(result.scores[0], [1.0, 0.6, 0.8], atol=1e-6)


# Task files


def save(path, header, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_the_published_format_is_read(tmp_path):
    rows = [
        ["wedge", "triangle", "['triangle', 'rectangle', 'circle']"],
        ["slice of cake", "circle", '["triangle", "rectangle", "circle"]'],
    ]
    path = save(tmp_path / "shapes.csv", ["word", "gt", "options"], rows)
    task = load_task(path, ["a MASK WORD"])
    assert task.kind == "choice"
    assert task.answers.tolist() == [0, 2]
    assert task.items[1].slots == {"WORD": "slice of cake"}
    (tmp_path / "shapes.json").write_text(
        '{"setup_params": {"dataset_path": "./datasets/shapes.csv", "task": "choice"}, "prompts": ["MASK WORD"]}'
    )
    assert load_task(tmp_path / "shapes.json").prompts == ("MASK WORD",)


def test_a_cloze_brings_its_own_sentences(tmp_path):
    path = save(tmp_path / "c.csv", ["sentence", "gt", "options"], [["He MASK it.", "ate", "['ate', 'was']"]])
    task = load_task(path)
    assert (task.kind, task.prompts) == ("cloze", ("",))
    assert task.sentence(task.items[0], "") == "He MASK it."
    with pytest.raises(ConfigError, match="no prompt"):
        load_task(path, ["a MASK WORD"])


@pytest.mark.parametrize("header", [["word", "rating"], ["Word", "Conc.M"], ["Word", "Concreteness", "Brysbaert"]])
def test_concreteness_tables_are_read_and_gaps_left_out(header, tmp_path):
    values = [["banana", "5.0"], ["wedge", "4.41"], ["justice", "1.45"], ["gap", ""]]
    rows = values if len(header) == 2 else [[w, "3.3", r] for w, r in values]
    task = load_task(save(tmp_path / "r.csv", header, rows))
    assert task.kind == "rating"
    assert task.ratings.tolist() == [5.0, 4.41, 1.45]
    assert task.prompts == load_task("concreteness").prompts


def test_more_columns_are_more_slots(tmp_path):
    row = ["cat", "cow", "smaller", "['larger', 'smaller']"]
    path = save(tmp_path / "s.csv", ["word", "other", "gt", "options"], [row])
    task = load_task(path, ["a WORD is MASK than a OTHER"])
    assert task.sentence(task.items[0], task.prompts[0]) == "a cat is MASK than a cow"


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        (["word", "gt", "options"], ["x", "red", "['blue', 'green']"], "among"),
        (["word", "gt", "options"], ["x", "red", "__import__('os').getcwd()"], "list"),
        (["word", "gt", "options"], ["x", "red", "['red', 'red']"], "twice"),
        (["word", "gt"], ["x", "red"], "columns"),
        (["word", "rating"], ["x", "much"], "number"),
    ],
)
def test_bad_items_are_explained_with_their_line(header, row, message, tmp_path):
    with pytest.raises(DataError, match=message):
        load_task(save(tmp_path / "t.csv", header, [row]), None)


def test_rows_with_different_numbers_of_options_are_refused(tmp_path):
    rows = [["x", "a", "['a', 'b']"], ["y", "a", "['a', 'b', 'c']"]]
    with pytest.raises(DataError, match=r"line 3: 3 options"):
        load_task(save(tmp_path / "t.csv", ["word", "gt", "options"], rows), ["MASK WORD"])


def test_a_file_without_prompts_says_what_to_do(tmp_path):
    path = save(tmp_path / "t.csv", ["word", "gt", "options"], [["x", "a", "['a', 'b']"]])
    with pytest.raises(ConfigError, match="--prompt"):
        load_task(path)
    with pytest.raises(ConfigError, match="slots"):
        load_task(path, ["a MASK THING"])
    with pytest.raises(DataError, match="color"):
        load_task("colour")


def test_word_piece_text_becomes_a_sentence(tmp_path):
    text = "[CLS] is a [MASK] or beet ##le more dangerous ? [SEP]"
    path = save(tmp_path / "c.csv", ["sentence", "gt", "options"], [[text, "ant", "['ant', 'bee']"]])
    assert load_task(path).items[0].sentence == "is a MASK or beetle more dangerous ?"
    assert from_word_pieces("He MASK it  ##twice. ") == "He MASK it  ##twice. "


@pytest.mark.skipif("MMPT_SHAPEIT" not in os.environ, reason="needs MMPT_SHAPEIT=folder of the published items")
@pytest.mark.parametrize(
    ("name", "options"),
    [("shapes", "circle rectangle triangle"), ("shapes_adj", "circular rectangular triangular")],
)
def test_the_published_shapes_have_109_items(name, options):
    task = load_task(os.path.join(os.environ["MMPT_SHAPEIT"], f"{name}.json"))
    answers = [item.options[item.answer] for item in task.items]
    assert (len(task.items), len(task.prompts)) == (109, 10)
    assert [answers.count(option) for option in options.split()] == [47, 37, 25]


# The items that ship with mmpt

CHOICES = [name for name in shipped_tasks() if load_task(name).kind != "rating"]


def test_there_are_enough_items_each_once_with_licence_and_origin():
    assert {"shape", "color", "size", "concreteness", "facts", "sentiment", "cloze"} <= set(shipped_tasks())
    for name in shipped_tasks():
        task = load_task(name)
        assert len(task.items) >= (200 if name == "color" else 100), name
        assert len({item.name for item in task.items}) == len(task.items), name
        assert task.about["license"], name
        assert task.about["origin"], name
    assert {load_task(name).visual for name in shipped_tasks()} == {True, False}


@pytest.mark.parametrize("name", CHOICES)
def test_the_place_of_the_answer_tells_nothing(name):
    task = load_task(name)
    count = len(task.items[0].options)
    places = np.bincount(task.answers, minlength=count) / len(task.items)
    assert abs(places - 1 / count).max() < 0.05
    answers = [item.options[item.answer] for item in task.items]
    if task.fixed_options is not None:
        assert max(answers.count(option) for option in task.fixed_options) / len(answers) < 1.15 / count


@pytest.mark.parametrize("name", CHOICES)
def test_no_item_names_an_option(name):
    for item in load_task(name).items:
        for option in item.options:
            assert option.lower() not in item.name.lower(), item.name


@pytest.mark.parametrize("name", shipped_tasks())
def test_word_frequency_tells_nothing(name):
    frequency = pytest.importorskip("wordfreq").zipf_frequency
    task = load_task(name)
    if task.kind != "cloze":
        words = np.array([np.mean([frequency(w, "en") for w in item.slots.values()]) for item in task.items])
        classes = np.array([item.rating if task.kind == "rating" else item.options[item.answer] for item in task.items])
        between = sum((classes == c).sum() * (words[classes == c].mean() - words.mean()) ** 2 for c in set(classes))
        assert between / ((words - words.mean()) ** 2).sum() < 0.06  # share of variance that the class explains
    if task.kind != "rating":
        options = np.array([[frequency(option, "en") for option in item.options] for item in task.items])
        chance = 1 / options.shape[1]
        assert (options.argmax(1) == task.answers).mean() < chance + 0.05
    if "OTHER" in task.items[0].slots:
        first = {"larger": True, "smaller": False, "earlier": True, "later": False}
        more = [frequency(item.slots["WORD"], "en") > frequency(item.slots["OTHER"], "en") for item in task.items]
        said = [first[item.options[item.answer]] for item in task.items]
        assert 0.44 < np.mean(np.array(more) == np.array(said)) < 0.56


# Masked language models


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlm")
    return folder, write("bert-mlm", folder)


def test_one_piece_has_the_log_probability_of_fill_mask(bert):
    import torch

    folder, model = bert
    probe = MaskedLmProbe.from_folder(folder)
    batch = probe.tokenizer("the flag is [MASK]", return_tensors="pt")
    with torch.no_grad():
        wanted = model(**batch).logits.log_softmax(-1)[0, batch["input_ids"][0] == probe.tokenizer.mask_token_id][0]
    ids = probe.tokenizer.convert_tokens_to_ids(["red", "circle"])
    found = probe.score_from_options("the flag is MASK", ["red", "circle"])
    np.testing.assert_allclose(found, wanted[ids].numpy(), atol=1e-5)


def test_several_pieces_are_refused_or_scored_one_by_one(bert):
    import torch

    folder, model = bert
    option = "redgreen"  # red ##g ... : several pieces
    tokenizer = load_embedder_tokenizer(folder)
    pieces = tokenizer(option, add_special_tokens=False)["input_ids"]
    assert len(pieces) > 1
    with pytest.raises(ConfigError, match="pseudo_likelihood"):
        MaskedLmProbe.from_folder(folder).score_from_options("the flag is MASK", [option])
    ids = tokenizer(f"the flag is {option}", return_tensors="pt")["input_ids"]
    places = list(range(4, 4 + len(pieces)))
    assert ids[0, places].tolist() == pieces
    scores = []
    for place in places:
        hidden = ids.clone()
        hidden[0, place] = tokenizer.mask_token_id
        with torch.no_grad():
            scores.append(float(model(input_ids=hidden).logits.log_softmax(-1)[0, place, ids[0, place]]))
    found = MaskedLmProbe.from_folder(folder, "pseudo_likelihood").score_from_options("the flag is MASK", [option])
    assert found[0] == pytest.approx(np.mean(scores), abs=1e-5)
    # one mask in the place of the whole option, and its first piece
    one = tokenizer("the flag is [MASK]", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        wanted = float(model(input_ids=one).logits.log_softmax(-1)[0, 4, pieces[0]])
    found = MaskedLmProbe.from_folder(folder, "first_piece").score_from_options("the flag is MASK", [option])
    assert found[0] == pytest.approx(wanted, abs=1e-5)


def load_embedder_tokenizer(folder):
    return MaskedLmProbe.from_folder(folder).tokenizer


def test_byte_level_pieces_keep_the_blank_before_them(tmp_path):
    import torch

    model = write("roberta-mlm", tmp_path)
    probe = MaskedLmProbe.from_folder(tmp_path)
    tokenizer = probe.tokenizer
    ids = tokenizer("the flag is red", return_tensors="pt")["input_ids"]
    place = [i for i, piece in enumerate(tokenizer.convert_ids_to_tokens(ids[0])) if piece == "Ġred"]
    assert len(place) == 1
    hidden = ids.clone()
    hidden[0, place] = tokenizer.mask_token_id
    with torch.no_grad():
        wanted = float(model(input_ids=hidden).logits.log_softmax(-1)[0, place[0], ids[0, place[0]]])
    assert probe.score_from_options("the flag is MASK", ["red"])[0] == pytest.approx(wanted, abs=1e-5)


def test_a_folder_without_the_head_is_refused(tmp_path):
    write("bert", tmp_path)
    with pytest.raises(ConfigError, match="no masked-language-model head"):
        MaskedLmProbe.from_folder(tmp_path)


# The linear probe


def test_a_linear_probe_reads_what_is_in_the_embedding_and_not_what_is_not():
    task = load_task("shape")
    answers = {item.name: item.options[item.answer] for item in task.items}
    options = sorted(set(answers.values()))

    def telling(texts):
        noise = np.random.default_rng(0).normal(size=(len(texts), 8))
        noise[:, 0] = [3 * options.index(answers[text]) for text in texts]
        noise[:, 1] = [3 * (answers[text] == options[1]) for text in texts]
        return noise

    assert LinearWordProbe(FunctionEmbedder(telling)).run(task).correct.mean() > 0.9
    silent = FunctionEmbedder(lambda texts: np.random.default_rng(1).normal(size=(len(texts), 8)))
    found = LinearWordProbe(silent).run(task)
    assert found.correct.mean() < 0.5
    assert found.summary()["chance"] == pytest.approx(1 / 3)
    with pytest.raises(ConfigError, match="same options"):
        LinearWordProbe(silent).run(load_task("cloze"))


def test_all_prompts_and_items_are_scored(tmp_path):
    write("bert", tmp_path)
    result = StroopProbe(load_embedder(tmp_path)).run(load_task("shape").sample(12))
    assert np.stack(result.scores).shape == (8, 12, 3)
    assert (np.abs(np.stack(result.scores)) <= 1 + 1e-9).all()
