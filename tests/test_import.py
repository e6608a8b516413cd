"""`import kvpref` in a fresh process: fast, free of side effects, without optional packages."""

from __future__ import annotations

import subprocess
import sys


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr


def test_import_loads_neither_torch_nor_transformers() -> None:
    run("import sys, kvpref; assert not {'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)")


def test_the_engine_needs_no_extras_and_registers_nothing_until_attach() -> None:
    run(
        "import sys\n"
        "for name in ('peft', 'trl', 'flash_attn', 'xformers', 'matplotlib'):\n"
        "    sys.modules[name] = None  # importing it now raises ImportError\n"
        "import kvpref, torch\n"
        "threads, dtype = torch.get_num_threads(), torch.get_default_dtype()\n"
        "kvpref.attach, kvpref.collate, kvpref.response_logps, kvpref.PrefixCache\n"
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS\n"
        "from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS\n"
        "assert 'kvpref' not in ALL_ATTENTION_FUNCTIONS.valid_keys()\n"
        "assert 'kvpref' not in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()\n"
        "assert (threads, dtype) == (torch.get_num_threads(), torch.get_default_dtype())\n"
    )


def test_unknown_names_are_refused() -> None:
    run("import kvpref\ntry: kvpref.nonsense\nexcept AttributeError: pass\nelse: raise SystemExit(1)")
