"""The command `decode`: one prompt, several policies, what each answers and reads."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparse_dlm_attn import InvalidArgumentError
from sparse_dlm_attn.cli.console import print_json, progress, result_console
from sparse_dlm_attn.cli.options import named_as_options
from sparse_dlm_attn_tiny.commands import options

if TYPE_CHECKING:
    from sparse_dlm_attn_tiny.comparison import Comparison, DecodeSettings
    from sparse_dlm_attn_tiny.policy_choice import PolicyChoice
    from sparse_dlm_attn_tiny.prompts import Prompt
    from sparse_dlm_attn_tiny.records import PassRecord

__all__ = ["compare_with_progress", "decode"]

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
        typer.Option("--full-sequence", help="Decode over the whole sequence, as LLaDA does: every token "
                     "sees every other, slow. With one --policy, dense by default; the default prompt has "
                     "1024 bytes."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone on standard output.")] = False,
) -> None:
    """Decode a long prompt with the small model under several policies, and compare them.

    The dense policy always runs first: agreement is measured against it.
    """
    from sparse_dlm_attn_tiny.policy_choice import choose_policies

    if full_sequence and policy and len(policy) > 1:
        raise InvalidArgumentError(
            "--policy", "must be given once with --full-sequence", ", ".join(policy),
        )
    backend = options.placed(backend, device)
    settings = options.check_settings(block_length, steps, threshold, page_size, max_blocks)
    choices = choose_policies(policy or (), budget, page_size)
    model = options.load_model(backend, weights, settings)
    default_length = FULL_SEQUENCE_LENGTH if full_sequence else options.DEFAULT_LENGTH
    asked = options.pick_prompt(
        prompt, question, answer, task, length, seed, block_length, model.config.max_context, default_length
    )
    environment = options.environment_record(backend, weights, model, page_size)
    if full_sequence:
        from sparse_dlm_attn_tiny.decoding import check_new_tokens

        chosen = choose_policies(policy or ("dense",), budget, page_size, baseline=False)[0]
        long = "--prompt" if prompt is not None else "--length"
        with named_as_options(new_tokens=long if max_blocks is None else "--max-blocks"):
            check_new_tokens(model, len(asked.text), settings.blocks_for(asked.answer) * block_length)
        _decode_full_sequence(model, asked, settings, chosen, environment, as_json)
        return
    comparison = compare_with_progress(model, asked, choices, settings)
    if as_json:
        print_json(_record(comparison, asked, settings, environment))
    else:
        _print(comparison, asked)


def compare_with_progress(
    model: Any, prompt: Prompt, choices: list[PolicyChoice], settings: DecodeSettings
) -> Comparison:
    """Run a comparison with a progress bar on standard error.

    Parameters
    ----------
    model : TinyModel
        The model.
    prompt : Prompt
        What to continue.
    choices : list of PolicyChoice
        The policies, `dense` first.
    settings : DecodeSettings
        How to decode.
    """
    from sparse_dlm_attn_tiny.comparison import compare

    with progress() as bars:
        bar = bars.add_task(f"reading {len(prompt.text)} bytes", total=len(choices) + 1)

        def on_pass(choice: PolicyChoice, record: PassRecord) -> None:
            bars.update(bar, description=f"{choice.label}: block {record.block}, pass {record.index}")

        return compare(
            model, prompt.text, choices, settings, answer=prompt.answer,
            on_prefill=lambda seconds: bars.advance(bar), on_pass=on_pass,
            on_result=lambda result: bars.advance(bar),
        )


def _record(
    comparison: Comparison, prompt: Prompt, settings: DecodeSettings, environment: dict[str, Any]
) -> dict[str, Any]:
    return {
        "environment": environment,
        "prompt": prompt.as_json(),
        "settings": dataclasses.asdict(settings),
        "prefill_seconds": round(comparison.prefill_seconds, 4),
        "results": [result.as_json() for result in comparison.results],
    }


def _print(comparison: Comparison, prompt: Prompt) -> None:
    from sparse_dlm_attn_tiny.report import comparison_table, verdict

    console = result_console()
    for heading, text in prompt.story():
        console.print(f"{heading:>9}  {text}", markup=False, soft_wrap=True)
    console.print(comparison_table(comparison.results, console.width))
    for line in verdict(comparison.results):
        console.print(line, markup=False, soft_wrap=True)
    total = comparison.prefill_seconds + sum(result.seconds for result in comparison.results)
    prefill = comparison.prefill_seconds
    console.print(f"The prompt was read once for all of them ({prefill:.1f} s); {total:.1f} s in all.")


def _decode_full_sequence(
    model: Any, prompt: Prompt, settings: DecodeSettings, choice: PolicyChoice, environment: dict[str, Any],
    as_json: bool,
) -> None:
    """Fill in masks behind the prompt, window by window from the left, and print what came out."""
    from sparse_dlm_attn_tiny.decoding import decode_full_sequence
    from sparse_dlm_attn_tiny.report import printable, share_text

    with progress() as bars:
        bar = bars.add_task(f"{len(prompt.text)} bytes, {choice.label}", total=None)
        decoded = decode_full_sequence(
            model, prompt.text, policy=choice.policy, page_size=settings.page_size,
            new_tokens=settings.blocks_for(prompt.answer) * settings.block_length,
            steps=settings.steps, threshold=settings.threshold, block_length=settings.block_length,
            on_pass=lambda record: bars.advance(bar),
        )
    exact = None if prompt.answer is None else decoded.output == prompt.answer.encode()
    if as_json:
        print_json({
            "environment": environment, "prompt": prompt.as_json(), "settings": dataclasses.asdict(settings),
            "full_sequence": {
                "policy": choice.label, "pair_share": decoded.traffic().pair_share,
                "row_share": decoded.traffic().row_share,
                "answer": decoded.output.decode("latin-1"), "exact": exact, "passes": len(decoded.passes),
                "seconds": round(decoded.seconds, 4),
            },
        })
        return
    console = result_console()
    verdict = {None: "", True: "  (exact)", False: "  (NOT the expected answer)"}[exact]
    lines = [*prompt.story(), ("answer", printable(decoded.output) + verdict)]
    lines.append(("passes", f"{len(decoded.passes)} over the whole sequence, {decoded.seconds:.1f} s"))
    total = decoded.traffic()
    shares = share_text(total.row_share), share_text(total.pair_share)
    lines.append(("computed", "{} of the rows, {} of the row-key pairs".format(*shares)))
    for heading, text in lines:
        console.print(f"{heading:>9}  {text}", markup=False, soft_wrap=True)
