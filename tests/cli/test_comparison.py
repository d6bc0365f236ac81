"""The parts behind the commands: policies and budgets, prompts, agreement, maps, scores."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np
import pytest

from sparse_dlm_attn import InvalidArgumentError, UnknownNameError
from sparse_dlm_attn_tiny import plots, prompts, report
from sparse_dlm_attn_tiny.comparison import DecodeSettings, PolicyResult, agreement
from sparse_dlm_attn_tiny.evaluate import Evaluation, Sample, choices_of, scores_of
from sparse_dlm_attn_tiny.policy_choice import DEFAULT_POLICIES, choose_policies, choose_policy
from sparse_dlm_attn_tiny.records import PassRecord, TrafficTotal


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("losa", "losa:budget=64"),
        ("losa:active=2", "losa:active=2,budget=64"),
        ("losa:budget=128", "losa:budget=128"),
        ("sliding-window", "sliding-window:window=64"),
        ("streaming-llm", "streaming-llm:window=48"),  # four sinks cost one page of 16
        ("streaming-llm:sinks=20", "streaming-llm:sinks=20,window=32"),
        ("snapkv:window=16", "snapkv:window=16,capacity=64"),
        ("flashblock", "flashblock"),
        ("dense", "dense"),
    ],
)
def test_a_common_budget_goes_to_every_policy_that_sets_none(text: str, label: str) -> None:
    assert choose_policy(text, 64, 16).label == label


def test_the_label_of_a_choice_builds_the_same_policy_again() -> None:
    for text in DEFAULT_POLICIES:
        choice = choose_policy(text, 96, 16)
        assert choose_policy(choice.label, 1, 16).policy == choice.policy


def test_dense_comes_first_and_nothing_runs_twice() -> None:
    labels = [choice.label for choice in choose_policies(["losa", "losa:budget=64", "quest"], 64, 16)]
    assert labels == ["dense", "losa:budget=64", "quest:budget=64"]


def test_an_evaluation_runs_policies_without_a_budget_once() -> None:
    evaluation = Evaluation(("single-key",), 1, 256, 0, ("quest", "flashblock", "dense"), (64, 128))
    labels = [choice.label for choice in choices_of(evaluation)]
    assert labels == ["dense", "quest:budget=64", "flashblock", "quest:budget=128"]


@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_below_one_is_refused(budget: int) -> None:
    with pytest.raises(InvalidArgumentError, match="--budget must be at least 1"):
        choose_policy("losa", budget, 16)


@pytest.mark.parametrize(
    ("output", "reference", "share"),
    [(b"", b"", 1.0), (b"abc", b"abc", 1.0), (b"abd", b"abc", 2 / 3), (b"ab", b"abcd", 0.5), (b"", b"a", 0)],
)
def test_agreement_is_the_share_of_equal_bytes(output: bytes, reference: bytes, share: float) -> None:
    assert agreement(output, reference) == pytest.approx(share)
    assert agreement(reference, output) == pytest.approx(share)


def test_the_default_prompt_hides_its_fact_far_from_the_question() -> None:
    prompt = prompts.prompt_of_task(prompts.DEFAULT_TASK, 4096, prompts.DEFAULT_SEED, block_length=16)
    assert len(prompt.text) == 4096
    assert prompt.answer is not None
    for _, end in prompt.facts:
        assert len(prompt.text) - end > 1024, "beyond any window of a quarter of the text"
    stated = b" ".join(prompt.text[start:end] for start, end in prompt.facts)
    assert all(word.rstrip(".").encode() in stated for word in prompt.answer.split(" is "))


def test_an_unknown_task_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'chained'"):
        prompts.prompt_of_task("chain", 512, 0, block_length=16)


def test_a_question_is_put_in_the_form_the_model_knows(tmp_path: Any) -> None:
    path = tmp_path / "text"
    path.write_text("The code of Rimon is 48213.\n\n")
    prompt = prompts.read_prompt(str(path), " What is the code of Rimon? ", "48213.", 1000)
    assert prompt.text.endswith(b"48213.\nQuestion: What is the code of Rimon?\nAnswer: ")
    with pytest.raises(InvalidArgumentError, match="together with the question"):
        prompts.read_prompt(str(path), "What is the code of Rimon?", None, 40)


def record(loaded: np.ndarray, *, index: int = 0, is_save: bool = False) -> PassRecord:
    zeros = np.zeros(loaded.shape[0])
    return PassRecord(0, index, is_save, (), (), total(0, 0), zeros, zeros, loaded, 0.0)


def test_the_map_shows_the_share_of_layers_and_heads_that_loaded_a_page() -> None:
    loaded = np.zeros((2, 2, 4), dtype=bool)
    loaded[0, 0, 1] = loaded[:, :, 2] = True
    assert plots.heatmap([record(loaded)]).tolist() == [[0.0, 0.25, 1.0, 0.0]]
    lines = plots.ascii_heatmap([record(loaded), record(loaded, index=1, is_save=True)], 80, [2])
    quarter = plots.SHADES[3]  # of ten shades, rounded up
    assert lines == [f" pass 0 | {quarter}@ |", f"   save | {quarter}@ |", " " * 11 + "^"]


@pytest.mark.parametrize(("pages", "width"), [(5, 13), (8, 13), (1000, 60), (7, 80)])
def test_a_mark_points_at_the_column_that_shows_its_page(pages: int, width: int) -> None:
    for page in range(pages):
        loaded = np.zeros((1, 1, pages), dtype=bool)
        loaded[0, 0, page] = True
        shown, marks = plots.ascii_heatmap([record(loaded)], width, [page])
        (column,) = (place for place, shade in enumerate(shown.partition("|")[2]) if shade not in " |")
        assert marks.index("^") == shown.index("|") + 1 + column


def test_a_page_read_once_stays_visible_where_pages_share_a_column() -> None:
    loaded = np.zeros((8, 2, 1000), dtype=bool)
    loaded[3, 1, 500] = True
    (line,) = plots.ascii_heatmap([record(loaded)], 60)
    assert len(line) <= 60
    assert line.count(plots.SHADES[1]) == 1


def total(read: float, dense: float) -> TrafficTotal:
    return TrafficTotal(9, read, dense, 4 * read, 2 * read, 0.0, 4 * dense, read, dense, 144, 144)


def result(exact: bool, read: float, dense: float = 100.0) -> PolicyResult:
    return PolicyResult(
        choose_policy("losa", 64, 16), b"48213.", exact, 0.5, 1, 9, total(read, dense),
        total(read / 2, dense / 2), 0.25,
    )


def test_scores_add_up_bytes_before_they_divide() -> None:
    samples = [
        Sample("single-key", 0, "48213.", 0.1, (result(True, 10.0, 100.0),)),
        Sample("multi-key", 0, "48213.", 0.1, (result(False, 90.0, 300.0),)),
    ]
    (score,) = scores_of(samples)
    assert (score.prompts, score.exact) == (2, 1)
    assert score.tasks == {"single-key": {"prompts": 1, "exact": 1}, "multi-key": {"prompts": 1, "exact": 0}}
    assert score.density == pytest.approx(100 / 400)
    assert score.byte_share == pytest.approx(600 / 1600)
    assert score.later_byte_share == pytest.approx(300 / 800)
    assert score.seconds == pytest.approx(0.5)
    assert scores_of([]) == []


def test_a_picture_has_a_line_for_each_policy_with_its_parameters_and_a_point_for_each_budget() -> None:
    evaluation = Evaluation(
        ("single-key",), 1, 256, 0, ("losa", "losa:active=2", "losa:budget=16", "losa:budget=32"), (64, 128)
    )
    results = tuple(
        dataclasses.replace(result(True, 10.0), choice=choice) for choice in choices_of(evaluation)
    )
    lines = plots.accuracy_lines(scores_of([Sample("single-key", 0, "48213.", 0.1, results)]))
    assert {label: [budget for _, _, budget in points] for label, points in lines.items()} == {
        "dense": [None], "losa": [64, 128], "losa:active=2": [64, 128], "losa:budget=16": [None],
        "losa:budget=32": [None],
    }


def test_an_accuracy_picture_is_a_png_and_reproducible() -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra 'plot'")
    scores = scores_of([Sample("single-key", 0, "48213.", 0.1, (result(True, 10.0),))])
    first = plots.accuracy_picture(scores, "title")
    assert first.startswith(b"\x89PNG")
    assert first == plots.accuracy_picture(scores, "title")


@pytest.mark.parametrize("width", [80, 120, 160])
def test_tables_fit_their_width(width: int) -> None:
    from rich.console import Console

    console = Console(width=width, record=True, file=io.StringIO())
    console.print(report.comparison_table([result(True, 10.0), result(False, 90.0)], width))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert "losa:budget=64" in text and "NO" in text and "48213." in text


def test_control_bytes_are_shown_as_escapes() -> None:
    assert report.printable(b"\x1dA\n\xff") == "\\x1dA\\n\\xff"
    assert report.printable(b"x" * 100, 10) == "xxxxxxx..."


def test_as_many_blocks_are_decoded_as_the_answer_needs() -> None:
    settings = DecodeSettings(block_length=16)
    assert settings.blocks_for("x" * 15) == 1, "with its stop byte it fills one block"
    assert settings.blocks_for("x" * 16) == 2
    assert DecodeSettings(max_blocks=3).blocks_for("x") == 3
