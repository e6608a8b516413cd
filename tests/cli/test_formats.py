"""Files of other tools on the command line, one of each: what is printed of them, and a loss on single responses."""

from __future__ import annotations

from pathlib import Path

import pytest
from agent_templates import PLAIN, build_agent_tokenizer
from command_line_in_process import run

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "formats"

LINES = {
    "trl/unpaired.jsonl": "rows of one response were gathered by their prompt: 3 rows, 2 groups",
    "llama_factory/sharegpt_kto.json": "the last of `conversations` is taken as the response that `kto_tag` rates",
    "axolotl/llama3_icr.jsonl": "`input` is taken as the prompt, since there is no `prompt` (2 rows)",
    "ms_swift/kto.jsonl": "the last of `messages` is taken as the response that `label` rates",
    "ultrafeedback/binarized.jsonl": "`score_chosen` and `score_rejected` are the scores of `chosen`",
}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_agent_tokenizer(PLAIN).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", LINES)
def test_inspect_says_what_was_done(name: str, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("data", "inspect", FOLDER / name, "--tokenizer", tokenizer_folder)
    assert LINES[name] in capsys.readouterr().out
