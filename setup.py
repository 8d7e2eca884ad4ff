"""Packaging of feedback_transformers; exact tested versions are pinned in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "feedback_transformers" / "__init__.py").read_text()).group(1)

TRAIN = [
    "accelerate>=1.15,<2",
    "datasets>=5.2,<6",
    "evaluate>=0.4.6,<0.5",
    "matplotlib>=3.9,<4",
    "pillow>=10",
    "peft>=0.21,<1",
    "pycocotools>=2.0.8,<3",
    "rouge-score>=0.1.2,<0.2",
    "sacrebleu>=2.5,<3",
    "scikit-learn>=1.5,<2",
    "tensorboard>=2.18,<3",
]
QUANTIZATION = ["accelerate>=1.15,<2", "bitsandbytes>=0.50,<1", "torchao>=0.18,<1"]
FAST = ["numba>=0.62,<1"]
MINGRU = ["minGRU-pytorch>=0.2.1,<0.3"]
BENCH = ["feedback-transformer-pytorch>=0.0.11,<0.1", *MINGRU, "tiny-recursive-model>=0.0.15,<0.1"]
DATA = ["datasets>=5.2,<6", "pillow>=10"]
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10", "mkdocstrings[python]>=1,<2"]
NOTEBOOKS = ["ipykernel>=7,<8", "jupytext>=1.19,<2", "nbmake>=1.5,<2"]
GGUF = ["gguf>=0.19,<1"]
ONNX = ["onnx>=1.23,<2", "onnxruntime>=1.32,<2", "onnxscript>=0.7,<0.8"]
CHATS = ["trl>=1.16,<2"]
DEV = [
    *DOCS,
    *NOTEBOOKS,
    *ONNX,
    *GGUF,
    *CHATS,
    "parameterized>=0.9",  # of the test suites of transformers and PEFT
    *("build>=1.2", "mypy>=1.15", "ruff>=0.12"),
    *("hypothesis>=6.130,<7", "pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6"),
]

setup(
    name="feedback_transformers",
    version=VERSION,
    description="Feedback neural networks as ordinary Hugging Face models",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["feedback_transformers", "feedback_transformers.*"]),
    package_data={"feedback_transformers": ["py.typed", "card_template.md"]},
    entry_points={"console_scripts": ["feedback-transformers = feedback_transformers.cli:main"]},
    install_requires=["torch>=2.13,<3", "transformers>=5.23,<6"],
    # The data packages themselves are installed by `python -m feedback_transformers.data`, without their dependencies.
    extras_require={
        "train": TRAIN,
        "data": DATA,
        "fast": FAST,
        "quantization": QUANTIZATION,
        "docs": DOCS,
        "notebooks": NOTEBOOKS,
        "onnx": ONNX,
        "gguf": GGUF,
        "chats": CHATS,
        "bench": BENCH + FAST,
        "dev": TRAIN + FAST + MINGRU + QUANTIZATION + DEV,
    },
)
