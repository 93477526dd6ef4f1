"""The README's Python examples run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from gpt2.tokenizer import STORYBOOK

SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet(number: int) -> None:
    if "storybook" in SNIPPETS[number] and not (STORYBOOK / "model.safetensors").exists():
        pytest.skip("the shipped model is not in this checkout")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SNIPPETS[number]], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "print" not in SNIPPETS[number] or done.stdout.strip()


def test_every_file_of_the_tree_is_named() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for folder in ("kernels/gpt2_kernels", "gpt2"):
        for path in (ROOT / folder).glob("*.py"):
            if not path.name.startswith("__"):
                assert path.name in readme, f"{folder}/{path.name} is missing in README's tree"
