"""The README's Python examples run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from gpt2.tokenizer import STORYBOOK

SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


# What stands in for nanoGPT's file when a snippet imports it.
NANOGPT = """
import dataclasses, nanogpt

@dataclasses.dataclass
class GPTConfig:
    n_layer: int = 2

def GPT(config):
    return nanogpt.GPT(n_layer=config.n_layer)
"""


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet(number: int, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(NANOGPT)
    if "transformers" in SNIPPETS[number]:
        pytest.importorskip("transformers")
    if "storybook" in SNIPPETS[number] and not (STORYBOOK / "model.safetensors").exists():
        pytest.skip("the shipped model is not in this checkout")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = map(str, (ROOT / "kernels", ROOT, ROOT / "tests", tmp_path))
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SNIPPETS[number]]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "print" not in SNIPPETS[number] or done.stdout.strip()


def test_every_file_of_the_tree_is_named() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for folder in ("kernels/gpt2_kernels", "gpt2"):
        for path in (ROOT / folder).glob("*.py"):
            if not path.name.startswith("__"):
                assert path.name in readme, f"{folder}/{path.name} is missing in README's tree"
