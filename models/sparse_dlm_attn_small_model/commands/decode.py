"""The command `decode`: one prompt, several policies, what each answers and reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated

import typer

from sparse_dlm_attn import InvalidArgumentError
from sparse_dlm_attn.cli.console import print_json, progress, result_console
from sparse_dlm_attn.cli.options import named_as_options
from sparse_dlm_attn_small_model.commands import options
from sparse_dlm_attn_small_model.commands.report import comparison_table, printable, share_text, verdict
from sparse_dlm_attn_small_model.comparison import DecodeSettings, PolicyResult, Sample, compare
from sparse_dlm_attn_small_model.decoding import check_new_tokens, decode_full_sequence
from sparse_dlm_attn_small_model.model import TinyModel
from sparse_dlm_attn_small_model.policy_choice import PolicyChoice, choose_policies
from sparse_dlm_attn_small_model.records import PassRecord
from sparse_dlm_attn_small_model.retrieval import Prompt

FULL_SEQUENCE_LENGTH = 1024


def decode(
    prompt: options.PromptFile = None,
    question: options.Question = None,
    answer: options.Answer = None,
    task: options.Task = None,
    length: options.Length = None,
    seed: options.Seed = None,
    policy: options.Policies = None,
    budget: options.Budget = options.DEFAULT_BUDGET,
    backend: options.BackendName = "reference",
    device: options.Device = None,
    block_length: options.BlockLength = 16,
    steps: options.Steps = None,
    threshold: options.Threshold = None,
    page_size: options.PageSize = 16,
    max_blocks: options.MaxBlocks = None,
    weights: options.Weights = None,
    full_sequence: Annotated[
        bool,
        typer.Option(
            "--full-sequence",
            help="Decode over the whole sequence, as LLaDA does: every token sees every "
            "other, slow. With one --policy, dense by default; the default prompt has 1024 bytes.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone on standard output.")] = False,
) -> None:
    """Decode a long prompt with the small model under several policies, and compare them.

    The dense policy always runs first: agreement is measured against it.
    """
    if full_sequence and policy and len(policy) > 1:
        raise InvalidArgumentError("--policy", "must be given once with --full-sequence", ", ".join(policy))
    backend = options.placed(backend, device)
    settings = options.check_settings(block_length, steps, threshold, page_size, max_blocks)
    chosen = policy or (["dense"] if full_sequence else [])
    choices = choose_policies(chosen, [budget], page_size, baseline=not full_sequence)
    model = options.load_model(backend, weights, settings)
    default_length = FULL_SEQUENCE_LENGTH if full_sequence else options.DEFAULT_LENGTH
    asked = options.pick_prompt(
        prompt, question, answer, task, length, seed, block_length, model.config.max_context, default_length
    )
    report = {
        "environment": options.environment_record(backend, weights, model, page_size),
        "prompt": asked.as_json(),
        "settings": dataclasses.asdict(settings),
    }
    if full_sequence:
        long = "--max-blocks" if max_blocks is not None else "--length" if prompt is None else "--prompt"
        result = _full_sequence(model, asked, settings, choices[0], long)
        if as_json:
            print_json(
                {
                    **report,
                    "full_sequence": {
                        "policy": result.choice.label,
                        "pair_share": result.everything.pair_share,
                        "row_share": result.everything.row_share,
                        "answer": result.output.decode("latin-1"),
                        "exact": result.exact,
                        "passes": result.passes,
                        "seconds": round(result.seconds, 4),
                    },
                }
            )
        else:
            _print_full_sequence(result, asked)
        return
    sample = compare_with_progress(model, asked, choices, settings)
    if as_json:
        results = [{**each.as_json(), **each.choice.as_json()} for each in sample.results]
        print_json({**report, "prefill_seconds": round(sample.prefill_seconds, 4), "results": results})
    else:
        _print(sample)


def compare_with_progress(
    model: TinyModel,
    prompt: Prompt,
    choices: list[PolicyChoice],
    settings: DecodeSettings,
    on_pass: Callable[[PolicyChoice, PassRecord], None] | None = None,
) -> Sample:
    """Decode a prompt with several policies, with a progress bar on standard error."""
    with progress() as bars:
        bar = bars.add_task(f"reading {len(prompt.text)} bytes", total=len(choices))

        def show(choice: PolicyChoice, record: PassRecord) -> None:
            description = f"{choice.label}: block {record.block}, pass {record.index}"
            bars.update(bar, description=description, completed=choices.index(choice))
            if on_pass is not None:
                on_pass(choice, record)

        (sample,) = compare(model, [prompt], choices, settings, show)
        return sample


def _print(sample: Sample) -> None:
    """Print the comparison for people."""
    console = result_console()
    _print_story(sample.prompt.story())
    console.print(comparison_table(sample.results, console.width))
    for line in verdict(sample.results):
        console.print(line, markup=False, soft_wrap=True)
    prefill = sample.prefill_seconds
    total = prefill + sum(result.seconds for result in sample.results)
    console.print(f"The prompt was read once for all of them ({prefill:.1f} s); {total:.1f} s in all.")


def _print_story(lines: list[tuple[str, str]]) -> None:
    """Print headings with their texts."""
    console = result_console()
    for heading, text in lines:
        console.print(f"{heading:>9}  {text}", markup=False, soft_wrap=True)


def _full_sequence(
    model: TinyModel, prompt: Prompt, settings: DecodeSettings, choice: PolicyChoice, long: str
) -> PolicyResult:
    """Fill in masks behind the prompt, window by window; ``long`` is the option behind a lack of room."""
    new_tokens = settings.blocks_for(prompt.answer) * settings.block_length
    with named_as_options(new_tokens=long):
        check_new_tokens(model, len(prompt.text), new_tokens)
    with progress() as bars:
        bar = bars.add_task(f"{len(prompt.text)} bytes, {choice.label}", total=None)
        decoded = decode_full_sequence(
            model,
            prompt.text,
            policy=choice.policy,
            page_size=settings.page_size,
            new_tokens=new_tokens,
            steps=settings.steps,
            threshold=settings.threshold,
            block_length=settings.block_length,
            on_pass=lambda record: bars.advance(bar),
        )
    return PolicyResult.of(choice, decoded, prompt.answer)


def _print_full_sequence(result: PolicyResult, prompt: Prompt) -> None:
    """Print a decoding over the whole sequence for people."""
    mark = {None: "", True: "  (exact)", False: "  (NOT the expected answer)"}[result.exact]
    total = result.everything
    rows, pairs = share_text(total.row_share), share_text(total.pair_share)
    _print_story(
        [
            *prompt.story(),
            ("answer", printable(result.output) + mark),
            ("passes", f"{result.passes} over the whole sequence, {result.seconds:.1f} s"),
            ("computed", f"{rows} of the rows, {pairs} of the row-key pairs"),
        ]
    )
