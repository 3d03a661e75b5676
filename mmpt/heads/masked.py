"""The masked head: hide units of any modality and predict what was there."""

from __future__ import annotations

from mmpt.errors import ConfigError
from mmpt.features import Features
from mmpt.heads.head import Head, HeadOutput
from mmpt.masking import MaskingPolicy, Uniform
from mmpt.model import MultimodalModel


class MaskedHead(Head):
    """Masked modelling of one modality: word pieces, patches, frames, genes, notes, nodes.

    Which units are hidden is the policy's business, how a unit is hidden and what is predicted the encoder's. A
    modality that goes through the text transformer is predicted from its tokens there (ArchBERT's masked nodes).

    Args:
        modality: which.
        policy: None is BERT's: 15 % of the units, of which 80 % hidden, 10 % random, 10 % kept.
    """

    def __init__(self, modality: str = "text", policy: MaskingPolicy | None = None) -> None:
        super().__init__()
        self.modalities = (modality,)
        self.policy = policy or Uniform()

    def bind(self, model: MultimodalModel) -> None:
        """See `Head`."""
        super().bind(model)
        modality = model.modality(self.modalities[0])
        if modality.through_text and modality.encoder.width != model.text.width:
            raise ConfigError(
                f"modality {self.modalities[0]!r} is predicted after the text transformer, whose width "
                f"{model.text.width} must equal the encoder's {modality.encoder.width}"
            )

    def forward(self, features: Features) -> HeadOutput:
        """See `Head`."""
        modality = self.modalities[0]
        encoder = features.model.modality(modality).encoder
        inputs = features.inputs(modality)
        corruption = self.policy(encoder.units(inputs), encoder.groups(inputs), encoder.max_units(inputs))
        through_text = features.model.modality(modality).through_text
        tokens = (features.tokens if through_text else features.encoded)(modality, corruption)
        loss, logs = encoder.reconstruction_loss(encoder.reconstruct(tokens, corruption), inputs, corruption)
        return HeadOutput(loss, logs)
