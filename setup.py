"""Where the packages lie; everything else is in pyproject.toml.

`kernels/` is a source root (like `src/`) for the import package `gpt2_kernels`, never a package itself: the name
`kernels` belongs to a package of Hugging Face's that transformers imports. The C++ sources travel inside the wheel and
are compiled on the machine that uses them.
"""

from setuptools import setup

setup(
    packages=[
        "gpt2_kernels",
        "gpt2_kernels.compat",
        "gpt2_kernels.integrations",
        "gpt2_kernels.csrc",
        "gpt2",
        "gpt2.explorer",
        "gpt2.storybook",
    ],
    package_dir={
        "gpt2_kernels": "kernels/gpt2_kernels",
        "gpt2_kernels.csrc": "csrc",
        "gpt2": "gpt2",
        "gpt2.explorer": "gpt2/explorer",
        "gpt2.storybook": "gpt2/storybook",
    },
    package_data={
        "gpt2_kernels": ["py.typed"],
        "gpt2_kernels.csrc": ["*.cpp", "*.h"],
        "gpt2": ["py.typed"],
        "gpt2.explorer": ["*.html", "*.css", "*.js"],
        "gpt2.storybook": ["*.json", "*.safetensors", "*.tiktoken", "*.md"],
    },
)
