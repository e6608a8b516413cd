"""Options as transformers and TRL spell them, and answers to typos that need no torch."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from kvpref.cli.app import app
from kvpref.cli.command_line import read_words
from kvpref.errors import InputError

COMMANDS = typer.main.get_command(app)


def read(line: str) -> str:
    return shlex.join(read_words(COMMANDS, shlex.split(line)))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("train m d --output o --lora-r 8", "train m d --output o --lora-r 8"),
        ("train m d --learning_rate 1e-6", "train m d --learning-rate 1e-6"),
        ("train --num_train_epochs=2 --per-device-train-batch-size 4", "train --epochs=2 --batch-size 4"),
        ("train --output_dir o --max_tokens_per_micro_batch 64", "train --output o --max-tokens 64"),
        ("train --model_name_or_path m --dataset_name d", "train --model-name-or-path m --dataset-name d"),
        ("train --warmup-steps 0.1 m", "train --set warmup_steps=0.1 m"),
        ("train --gradient-accumulation-steps=4", "train --set gradient_accumulation_steps=4"),
        # A name stays text, whatever YAML makes of it.
        ("train --run_name 2024-01-01", """train --set 'run_name="2024-01-01"'"""),
        ("train --tf32", "train --set tf32=true"),
        ("train --use-cpu --output o", "train --set use_cpu=true --output o"),
        ("train --use-cpu True m", "train --set use_cpu=True m"),
        ("train --no_dataloader_pin_memory m", "train --set dataloader_pin_memory=false m"),
        ("train --bf16 true m", "train --bf16 m"),
        ("train --bf16 False m", "train --no-bf16 m"),
        ("train --gradient_checkpointing False m", "train --set gradient_checkpointing=false m"),
        ("train --set a=--b --output --odd -- --lr", "train --set a=--b --output --odd -- --lr"),
        ("train --loss-arg beta=-1 --learning-rate -1", "train --loss-arg beta=-1 --learning-rate -1"),
        ("data inspect d --model_name_or_path m", "data inspect d --model m"),
        ("--version", "--version"),
        ("score -h", "score -h"),
        ("", ""),
    ],
)
def test_words_become_the_commands_own(given: str, expected: str) -> None:
    assert read(given) == expected


TYPOS = {
    "trian": "kvpref: there is no command 'trian'; did you mean train?",
    "data inspct x": "kvpref data: there is no command 'inspct'; did you mean inspect?",
    "xyz": "kvpref: there is no command 'xyz'; choose from: train, ",
    "--hlep": "kvpref: there is no option --hlep; did you mean --help?",
    "train --lr 1e-5": "kvpref train: there is no option --lr; did you mean --learning-rate?",
    "train --los dpo": "kvpref train: there is no option --los; did you mean --loss?",
    "train --weigth-decay 0.1": "there is no option --weigth-decay; did you mean --weight-decay?",
    "train --warmup-ratio 0.1": "did you mean --warmup-steps? below 1 it is a share of all steps",
    "train --beta 0.1": "there is no option --beta; it is a setting of the loss: --loss-arg beta=VALUE",
    "train --zzzzzz 1": "there is no option --zzzzzz; kvpref train --help lists the options",
    "train --resume-from-checkpoint x": "--resume-from-checkpoint: has no effect in kvpref train; give --resume",
    "train --weight-decay": "--weight-decay: expected a value",
    "score m d --modes packed": "kvpref score: there is no option --modes; did you mean --mode?",
    "score --model-name-or-path m d": "there is no option --model-name-or-path; give MODEL by its position: MODEL DATA",
    "check --config x.json": "kvpref check: there is no option --config; did you mean --model-config?",
}


@pytest.mark.parametrize("line", TYPOS)
def test_a_typo_is_answered_with_the_nearest_name(line: str) -> None:
    with pytest.raises(InputError) as caught:
        read(line)
    assert TYPOS[line] in str(caught.value)


WITHOUT_TORCH = {
    "trian": "did you mean train?",
    "train --lr 1": "did you mean --learning-rate?",
    "train m d --output o --set warmup_ratio=0.1": "--set warmup_ratio: there is no setting 'warmup_ratio'",
    "train m d --output o --loss-arg betta=0.1": "did you mean beta?",
    "train m d --output o --loss ddpo": "did you mean dpo?",
    "train m d --output o --checkpoint al": "one of none, prefix, all; got 'al'; did you mean all?",
    "train --config run.yaml": "run.yaml:2: learning_rat: there is no setting",
    "score m d --output s.jsonl --dtype float": "--dtype: expected one of float32, ",
    "check --model-config run.yaml": "the YAML of a run is given to --config",
    "losses dppo": "did you mean dpo?",
    "--help": "Preference training",
    "train --help": "--model-name-or-path",
}


def test_answers_need_no_torch(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('torch was imported')\n")
    (tmp_path / "run.yaml").write_text("model: m\nlearning_rat: 1e-6\n")
    # One process for all, since each takes a second to start.
    script = (
        "import contextlib, sys\nfrom kvpref.cli import main\n"
        "for line in sys.stdin.read().splitlines():\n"
        "    sys.argv = ['kvpref', *line.split()]\n"
        "    print('>', line)\n"
        "    with contextlib.redirect_stderr(sys.stdout), contextlib.suppress(SystemExit):\n"
        "        main()\n"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", script],
        input="\n".join(WITHOUT_TORCH),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), root]), "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr
    answers = dict(part.split("\n", 1) for part in done.stdout.removeprefix("> ").split("\n> "))
    assert answers.keys() == WITHOUT_TORCH.keys()
    for line, expected in WITHOUT_TORCH.items():
        assert expected in answers[line], answers[line]
