"""Generation: write the text of a sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.functional.text import chrf_score

from mmpt.evaluation.answers import exact_match
from mmpt.evaluation.record import Evaluation
from mmpt.features import Features
from mmpt.generation import generate
from mmpt.heads.alignment import CaptioningHead
from mmpt.heads.head import HeadOutput
from mmpt.model import TEXT, MultimodalModel
from mmpt.tasks.pairs import refuse_label_options
from mmpt.tasks.task import Task, TaskOptions

WRITTEN = 256
"""Most samples of an evaluation whose texts are written out; writing costs a pass for every token."""


class Generation(Task):
    """The text of a sample, token by token behind the sample as a visible prefix (or its context).

    The loss is that of captioning. Metrics are of the texts that are written greedily for the first 256 samples.
    """

    name, monitor = "generation", "chrf"

    def __init__(self, model: MultimodalModel, options: TaskOptions) -> None:
        super().__init__(model, options)
        refuse_label_options(options, self.name)
        self.head = CaptioningHead(self.modality, options.label_smoothing)
        self.head.bind(model)
        self.notes: list[tuple[str, str, str]] = []

    def trained(self, model: MultimodalModel) -> list[nn.Module]:
        """The tower and the text transformer that writes."""
        return [model.modality(self.modality), model.modality(TEXT)]

    def forward(self, features: Features) -> HeadOutput:
        """See `Task`."""
        return self.head(features)

    def evaluate(self, features: Features) -> dict[str, Tensor]:
        """See `Task`."""
        output = self.head(features)
        missing = WRITTEN - len(self.notes)
        if missing > 0:
            tokenizer = features.model.text.tokenizer
            wanted = tokenizer.batch_decode(features.inputs(TEXT)["ids"], skip_special_tokens=True)
            written = self.write(features)
            rows = list(zip(features.batch.names, wanted, written, strict=True))
            self.notes += rows[:missing]
        return {"loss": output.loss, "token_accuracy": output.logs["accuracy"]}

    def finish(self) -> Evaluation:
        """Exact matches, and chrF (Popović 2015), the F score of character n-grams, between 0 and 1."""
        notes = list(self.notes)
        self.notes.clear()
        if not notes:
            return Evaluation()
        names, wanted, written = (list(column) for column in zip(*notes, strict=True))
        equal = np.array([exact_match(w, g) for w, g in zip(wanted, written, strict=True)], dtype=float)
        _, each = chrf_score(written, [[text] for text in wanted], n_word_order=0, return_sentence_level_score=True)
        values, counts = np.unique(wanted, return_counts=True)
        most = str(values[counts.argmax()])
        metrics = {
            "exact_match": float(equal.mean()),
            "exact_match_majority": float(np.mean([text == most for text in wanted])),
            "chrf": float(each.mean()),
            "chrf_majority": float(
                torch.as_tensor(chrf_score([most] * len(wanted), [[text] for text in wanted], n_word_order=0))
            ),
        }
        return Evaluation(metrics, {"exact_match": equal, "chrf": each.numpy().astype(float)}, names)

    def predict(self, features: Features) -> dict[str, Any]:
        """The text."""
        return {"text": self.write(features)}

    @torch.no_grad()
    def write(self, features: Features, max_new_tokens: int = 64) -> list[str]:
        """The greedy text of every sample of a batch."""
        model = features.model
        text, foreign = model.text, features.connected(self.modality)
        start = text.tokenizer("")["input_ids"][:1]  # what every text begins with, [CLS] or its like
        ids = torch.tensor([start] * len(foreign.mask), device=foreign.mask.device)
        end = text.tokenizer.eos_token_id if text.tokenizer.sep_token_id is None else text.tokenizer.sep_token_id
        crossed = model.fusion == "cross_attention"
        room = text.max_length - len(start) - (0 if crossed else foreign.length)
        written = generate(
            text,
            ids,
            torch.ones_like(ids, dtype=torch.bool),
            prefix=None if crossed else foreign,
            context=foreign if crossed else None,
            attention="causal" if crossed else "prefix",
            max_new_tokens=min(max_new_tokens, room),
            end_id=end,
        )
        return text.tokenizer.batch_decode(written, skip_special_tokens=True)
