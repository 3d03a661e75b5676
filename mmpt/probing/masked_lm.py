"""Masked-language-model probing: which option does the model expect in the place of MASK?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerFast

from mmpt.checkpoint import CONFIG
from mmpt.errors import CheckpointError, ConfigError
from mmpt.model import MultimodalModel, evaluating
from mmpt.probing.embedders import BATCH_TOKENS
from mmpt.probing.huggingface import load_model, max_length, padded_tokenizer
from mmpt.probing.stroop import ProbeResult
from mmpt.probing.task import MASK, Task

Policy = Literal["error", "first_piece", "pseudo_likelihood"]
"""What is done with an option of several word pieces.

- error: it is refused, as its probability can't be compared with that of one piece;
- first_piece: one mask, and the probability of its first piece (what the released code means to do; there the piece is
  not found among the options and the option can never be chosen);
- pseudo_likelihood: mean over its pieces of the log-probability of the piece where all others are shown.
"""

Logits = Callable[[Tensor, Tensor], Tensor]
"""(ids (batch, length), positions (batch,)) -> logits of the vocabulary there: (batch, vocabulary)."""


class MaskedLmProbe:
    """Scores options by the log-probability that a masked language model gives them.

    An option is tokenised within its sentence, so that RoBERTa's pieces with a leading blank are right.

    Args:
        name: what names the model in tables.
        tokenizer: with a mask token.
        logits: the model.
        longest: most tokens of a sentence.
        policy: see `Policy`.

    Raises:
        ConfigError: a tokenizer without a mask token.
    """

    def __init__(
        self, name: str, tokenizer: PreTrainedTokenizerFast, logits: Logits, longest: int, policy: Policy = "error"
    ) -> None:
        if tokenizer.mask_token_id is None:
            raise ConfigError(f"the tokenizer of {name} has no mask token, so a masked-LM probe can't ask it")
        self.name, self.tokenizer, self.logits, self.longest, self.policy = name, tokenizer, logits, longest, policy

    @classmethod
    def from_folder(
        cls, folder: str | Path, policy: Policy = "error", name: str | None = None, trust: Sequence[str] = ()
    ) -> MaskedLmProbe:
        """The masked language model of a Hugging Face or mmpt folder.

        Raises:
            CheckpointError: absent or damaged.
            ConfigError: no masked-LM head (transformers would make up a random one).
        """
        path = Path(folder).expanduser()
        if (path / CONFIG).is_file():
            model = MultimodalModel.from_pretrained(path, trust=trust)
            return cls.of_model(model, policy, name or (path.parent.name if path.name == "model" else path.name))
        try:
            body, _ = load_model(path, AutoModelForMaskedLM)
        except CheckpointError as error:
            if "lacks weights" in str(error) or "Unrecognized configuration" in str(error):
                raise ConfigError(f"{path} has no masked-language-model head: {error}") from error
            raise
        tokenizer = padded_tokenizer(path)
        longest = max_length(cast(PreTrainedModel, body.base_model), tokenizer)

        def logits(ids: Tensor, positions: Tensor) -> Tensor:
            output: Tensor = body(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            return output[torch.arange(len(ids)), positions]

        return cls(name or path.name, tokenizer, logits, longest, policy)

    @classmethod
    def of_model(cls, model: MultimodalModel, policy: Policy = "error", name: str = "model") -> MaskedLmProbe:
        """The text transformer of an mmpt model. Whether it was ever trained to fill masks, only its run knows."""
        text = model.text

        def logits(ids: Tensor, positions: Tensor) -> Tensor:
            device = next(model.parameters()).device
            ids = ids.to(device)
            with evaluating(model):
                tokens = text(text.embed(ids, torch.ones_like(ids, dtype=torch.bool)))
            return text.lm_logits(tokens.values[torch.arange(len(ids)), positions.to(device)]).cpu()

        return cls(name, text.tokenizer, logits, text.max_length, policy)

    def score_from_options(self, sentence: str, options: Sequence[str]) -> np.ndarray:
        """Log-probability of each option (per piece): float64 (options,).

        Raises:
            ConfigError: no MASK in the sentence, an option of several pieces with policy "error", or a text that is
                too long.
        """
        return self._scores([(sentence, tuple(options))])[0]

    def run(self, task: Task, progress: Callable[[int], Any] | None = None) -> ProbeResult:
        """Score all items under all prompts.

        Raises:
            ConfigError: see `score_from_options`; a task of ratings, which has no options.
        """
        if task.kind == "rating":
            raise ConfigError(f"task {task.name} has ratings and no options; a masked-LM probe chooses between options")
        sets = [(task.sentence(item, prompt), item.options) for prompt in task.prompts for item in task.items]
        flat = np.stack(self._scores(sets, progress))
        settings = {"policy": self.policy}
        scores = flat.reshape(len(task.prompts), len(task.items), -1)
        return ProbeResult(self.name, "masked-lm", settings, task, tuple(scores))

    def _scores(
        self, sets: Sequence[tuple[str, tuple[str, ...]]], progress: Callable[[int], Any] | None = None
    ) -> list[np.ndarray]:
        queries: list[
            tuple[tuple[int, ...], int, int]
        ] = []  # ids with one mask, its position, the piece that was there
        owners: list[int] = []
        owner = 0
        for sentence, options in sets:
            if MASK not in sentence:
                raise ConfigError(f"{sentence!r} has no {MASK}; expected the slot where the options go")
            for option in options:
                own = self._queries(sentence, option)
                queries += own
                owners += [owner] * len(own)
                owner += 1
        # Sentences with one mask are equal for all options of one piece: each is computed once.
        asked = {(ids, position) for ids, position, _ in queries}
        found = self._log_probabilities(sorted(asked, key=lambda q: (len(q[0]), q)), progress)
        totals, counts = np.zeros(owner), np.zeros(owner)
        for (ids, position, piece), number in zip(queries, owners, strict=True):
            totals[number] += float(found[ids, position][piece])
            counts[number] += 1
        sizes = np.cumsum([len(options) for _, options in sets])[:-1]
        return np.split(totals / counts, sizes)

    def _queries(self, sentence: str, option: str) -> list[tuple[tuple[int, ...], int, int]]:
        before = sentence.index(MASK)
        encoded = self.tokenizer(sentence.replace(MASK, option, 1), return_offsets_mapping=True, verbose=False)
        ids: list[int] = encoded["input_ids"]
        if len(ids) > self.longest:
            raise ConfigError(f"{sentence[:60]!r} has {len(ids)} tokens; {self.name} reads at most {self.longest}")
        # byte-level BPE counts the blank before a word to the word: a piece belongs to the option if it overlaps it
        places = [
            place
            for place, (start, stop) in enumerate(encoded["offset_mapping"])
            if start < before + len(option) and stop > before and stop > start
        ]
        mask_id = int(self.tokenizer.mask_token_id)
        if len(places) == 0:
            raise ConfigError(f"the tokenizer of {self.name} makes nothing of the option {option!r}")
        if len(places) > 1 and self.policy == "error":
            pieces = " ".join(self.tokenizer.convert_ids_to_tokens([ids[place] for place in places]))
            raise ConfigError(
                f"the option {option!r} is several word pieces for {self.name}: {pieces}. Either (1) score all of them "
                "with --policy pseudo_likelihood, (2) use other options, or (3) --policy first_piece, which compares "
                "unlike things"
            )
        if self.policy == "first_piece":
            first = places[0]
            rest = ids[places[-1] + 1 :]
            return [((*ids[:first], mask_id, *rest), first, ids[first])]
        return [((*ids[:place], mask_id, *ids[place + 1 :]), place, ids[place]) for place in places]

    def _log_probabilities(
        self, asked: Sequence[tuple[tuple[int, ...], int]], progress: Callable[[int], Any] | None
    ) -> dict[tuple[tuple[int, ...], int], Tensor]:
        found: dict[tuple[tuple[int, ...], int], Tensor] = {}
        start = 0
        while start < len(asked):
            length = len(asked[start][0])
            stop = start
            while stop < len(asked) and len(asked[stop][0]) == length and (stop - start) * length < BATCH_TOKENS:
                stop += 1
            part = asked[start:stop]
            with torch.inference_mode():
                logits = self.logits(torch.tensor([ids for ids, _ in part]), torch.tensor([p for _, p in part]))
                found.update(zip(part, F.log_softmax(logits.float(), dim=-1), strict=True))
            if progress is not None:
                progress(len(part))
            start = stop
        return found
