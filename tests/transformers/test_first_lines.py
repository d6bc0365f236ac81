"""The first lines of the documentation, on a small model in a folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny_models import VOCABULARY, diffusion_gemma
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import sparse_dlm_attn_transformers

if not hasattr(transformers, "DiffusionGemmaConfig"):
    pytest.skip("DiffusionGemma came with transformers 5.17", allow_module_level=True)

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "use-in-transformers.md"


def test_the_first_lines_of_the_page_lead_to_sparse_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)[0]
    words = {"[UNK]": 0, "Once": 1, "upon": 2, "a": 3, "time": 4}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[UNK]")
    wrapped.save_pretrained(tmp_path)
    diffusion_gemma().save_pretrained(tmp_path)

    reports: list[Any] = []
    attached = sparse_dlm_attn_transformers.SparseAttention

    def counting(*args: Any, **kwargs: Any) -> Any:
        return attached(*args, **kwargs, on_pass=reports.append)

    monkeypatch.setattr(sparse_dlm_attn_transformers, "SparseAttention", counting)
    lines = code.replace("google/diffusiongemma-26B-A4B-it", str(tmp_path))
    lines = lines.replace("max_new_tokens=512", "max_new_tokens=16, max_denoising_steps=2")
    names: dict[str, Any] = {}
    exec(compile(lines, str(PAGE), "exec"), names)
    assert names["output"].sequences.shape[1] > 4 and int(names["output"].sequences.max()) < VOCABULARY
    assert len(reports) >= 2 and all(report.traffic for report in reports)
