"""mmpt: pretraining, probing and fine-tuning of multimodal models around one shared text transformer.

Importing this package is cheap: the public names below import torch only when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mmpt.data import MultimodalData as MultimodalData
    from mmpt.encoder import Encoder as Encoder
    from mmpt.encoder import Processor as Processor
    from mmpt.model import Modality as Modality
    from mmpt.model import MultimodalModel as MultimodalModel
    from mmpt.pretraining import Pretraining as Pretraining
    from mmpt.text import TextTransformer as TextTransformer
    from mmpt.tokens import Tokens as Tokens

_HOMES = {
    "Encoder": "mmpt.encoder",
    "FineTuning": "mmpt.finetuning",
    "Modality": "mmpt.model",
    "MultimodalData": "mmpt.data",
    "MultimodalModel": "mmpt.model",
    "Pretraining": "mmpt.pretraining",
    "Processor": "mmpt.encoder",
    "TextTransformer": "mmpt.text",
    "Tokens": "mmpt.tokens",
}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mmpt' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
