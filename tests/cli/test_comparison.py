"""The parts behind the commands: policies and budgets, prompts, agreement, maps, scores."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

from sparse_dlm_attn import InvalidArgumentError
from sparse_dlm_attn_small_model import plots
from sparse_dlm_attn_small_model.commands import report
from sparse_dlm_attn_small_model.comparison import DecodeSettings, PolicyResult, PolicyScore, agreement
from sparse_dlm_attn_small_model.evaluate import Evaluation, evaluate
from sparse_dlm_attn_small_model.policy_choice import DEFAULT_POLICIES, choose_policies, choose_policy
from sparse_dlm_attn_small_model.records import PassRecord, TrafficTotal


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
    def labels(*names: str, budgets: Any = (64,)) -> list[str]:
        return [choice.label for choice in choose_policies(names, budgets, 16)]

    assert labels("losa", "losa:budget=64", "dense") == ["dense", "losa:budget=64"]
    assert labels("quest", "flashblock", budgets=(64, 128)) == [
        "dense",
        "quest:budget=64",
        "flashblock",
        "quest:budget=128",
    ]


@pytest.mark.parametrize(
    ("output", "reference", "share"),
    [(b"", b"", 1.0), (b"abc", b"abc", 1.0), (b"abd", b"abc", 2 / 3), (b"ab", b"abcd", 0.5), (b"", b"a", 0)],
)
def test_agreement_is_the_share_of_equal_bytes(output: bytes, reference: bytes, share: float) -> None:
    assert agreement(output, reference) == pytest.approx(share)
    assert agreement(reference, output) == pytest.approx(share)


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


def test_a_page_read_once_stays_visible_where_pages_share_a_column() -> None:
    loaded = np.zeros((8, 2, 1000), dtype=bool)
    loaded[3, 1, 500] = True
    (line,) = plots.ascii_heatmap([record(loaded)], 60)
    assert len(line) <= 60
    assert line.count(plots.SHADES[1]) == 1


def total(read: float, dense: float) -> TrafficTotal:
    return TrafficTotal(9, read, dense, 4 * read, 2 * read, 0.0, 4 * dense, read, dense, 144, 144)


def result(exact: bool, read: float, dense: float = 100.0, policy: str = "losa", budget: int = 64) -> PolicyResult:
    return PolicyResult(
        choose_policy(policy, budget, 16),
        b"48213.",
        exact,
        0.5,
        1,
        9,
        total(read, dense),
        total(read / 2, dense / 2),
        0.25,
    )


def test_scores_add_up_bytes_before_they_divide() -> None:
    results = [("single-key", result(True, 10.0, 100.0)), ("multi-key", result(False, 90.0, 300.0))]
    score = PolicyScore.of(results)
    assert (score.prompts, score.exact) == (2, 1)
    assert score.tasks == {"single-key": {"prompts": 1, "exact": 1}, "multi-key": {"prompts": 1, "exact": 0}}
    assert score.everything.density == pytest.approx(100 / 400)
    assert score.everything.byte_share == pytest.approx(600 / 1600)
    assert score.after_first_pass.byte_share == pytest.approx(300 / 800)
    assert score.seconds == pytest.approx(0.5)


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_evaluate_gives_the_same_samples_however_many_prompts_go_together(threshold: float | None) -> None:
    evaluation = Evaluation(
        ("single-key", "chained"),
        2,
        512,
        0,
        ("losa", "dkv-cache"),
        (64,),
        DecodeSettings(steps=2 if threshold is None else None, threshold=threshold),
    )
    ones, threes = evaluate(evaluation, together=1), evaluate(evaluation, together=3)
    assert [(each.prompt.task, each.prompt.seed) for each in threes] == evaluation.jobs()
    for one, three in zip(ones, threes, strict=True):
        for alone, joint in zip(one.results, three.results, strict=True):
            assert alone.output == joint.output
            # Products of other shapes round otherwise, which may turn the choice of a page.
            assert joint.everything.bytes_read == pytest.approx(alone.everything.bytes_read, rel=0.01)
    with pytest.raises(InvalidArgumentError, match="together"):
        evaluate(evaluation, together=0)


def test_a_picture_has_a_line_for_each_policy_with_its_parameters_and_a_point_for_each_budget() -> None:
    chosen = [("losa", 64), ("losa:active=2", 64), ("losa:budget=16", 64), ("losa", 128), ("losa:active=2", 128)]
    scores = [PolicyScore.of([("chained", result(True, 10.0, policy=name, budget=budget))]) for name, budget in chosen]
    lines = plots.accuracy_lines(scores)
    assert {label: [budget for _, _, budget in points] for label, points in lines.items()} == {
        "losa": [64, 128],
        "losa:active=2": [64, 128],
        "losa:budget=16": [None],
    }
    pytest.importorskip("matplotlib", reason="pictures need the extra 'plot'")
    picture = plots.accuracy_picture(scores, "title")
    assert picture.startswith(b"\x89PNG") and picture == plots.accuracy_picture(scores, "title")


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
