"""Writing text with the shared text transformer: greedy, sampling, beam search; behind foreign vectors or a context."""

from __future__ import annotations

import torch
from torch import Tensor

from mmpt.cache import Cache
from mmpt.errors import ConfigError
from mmpt.text import TextBackbone
from mmpt.tokens import Tokens, concatenate
from mmpt.transformer import Attention


@torch.no_grad()
def generate(
    text: TextBackbone,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    *,
    prefix: Tokens | None = None,
    context: Tokens | None = None,
    attention: Attention = "causal",
    max_new_tokens: int = 32,
    end_id: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    beams: int = 1,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Continue prompts token by token, until all rows have ended.

    A row gives the same text alone as in a batch, however it is padded. The text transformer should be in evaluation
    mode.

    Args:
        text: the text transformer.
        prompt_ids: long (batch, length), possibly of length 0 behind a prefix.
        prompt_mask: bool (batch, length), True where real.
        prefix: vectors in front of the prompt (batch, n, text.input_width).
        context: tokens for the cross-attention layers.
        attention: "causal", or "prefix": the vectors of `prefix` see each other and are seen by all.
        max_new_tokens: most tokens to write.
        end_id: the token that ends a text; None always writes `max_new_tokens`.
        temperature: 0 takes the most probable token (greedy, or beam search); otherwise tokens are drawn from the
            softmax at this temperature.
        top_p: draw only from the smallest set of tokens that holds this share of the probability.
        beams: width of the beam search; texts are ranked by mean log-probability per token, the end token included.
        generator: source of randomness for sampling, on the device of the ids.
        use_cache: keep the keys and values of what was read, where the text transformer can. False runs everything
            again for each token: the same text, slower.

    Returns:
        long (batch, new): the written tokens, the end token included, the pad id behind it.

    Raises:
        ConfigError: options that contradict each other, or a row with neither prompt nor prefix.
    """
    _check(attention, prefix, temperature, top_p, beams)
    base, seen = _opening(text, prompt_ids, prompt_mask, prefix)
    cache = text.new_cache() if use_cache else None
    opening = (text, base, seen, context, attention, end_id)
    writer = _Writer(*opening) if cache is None else _CachedWriter(*opening, cache)
    pad_id = text.tokenizer.pad_token_id
    batch = len(prompt_ids)
    if max_new_tokens < 1:
        return prompt_ids.new_zeros(batch, 0)
    if beams > 1:
        return _beam_search(writer, batch, beams, max_new_tokens, end_id, pad_id)
    open_rows = torch.ones(batch, dtype=torch.bool, device=prompt_ids.device)
    written: list[Tensor] = []
    logits = writer.first()
    while True:
        token = logits.argmax(-1) if temperature == 0 else _sample(logits, temperature, top_p, generator)
        written.append(torch.where(open_rows, token, pad_id))
        was_open = open_rows
        if end_id is not None:
            open_rows = open_rows & (token != end_id)
        if len(written) == max_new_tokens or (end_id is not None and not open_rows.any()):
            return torch.stack(written, dim=1)
        logits = writer.next(written[-1], was_open)


class _Writer:
    """Scores the next token by running the opening and all written tokens each time."""

    def __init__(
        self,
        text: TextBackbone,
        base: Tokens,
        seen: Tensor,
        context: Tokens | None,
        attention: Attention,
        end_id: int | None,
    ) -> None:
        self.text, self.tokens, self.seen, self.context = text, base, seen, context
        self.attention = attention
        self.end_id = end_id

    def first(self) -> Tensor:
        """(rows, vocabulary) after the opening."""
        return self._logits(self._run())

    def next(self, token: Tensor, real: Tensor) -> Tensor:
        """(rows, vocabulary) after one more token (rows,), which is padding where `real` (rows,) is False."""
        self.tokens = concatenate(self.tokens, self._embed(token, real))
        self.seen = torch.cat([self.seen, torch.zeros_like(real).unsqueeze(1)], dim=1)
        return self._logits(self._run())

    def select(self, rows: Tensor) -> None:
        """Go on with the rows that `rows` (n,) names."""
        self.tokens, self.seen = self.tokens.rows(rows), self.seen[rows]
        self.context = None if self.context is None else self.context.rows(rows)

    def _run(self, cache: Cache | None = None) -> Tensor:
        front = self.seen if self.attention == "prefix" else None
        return self.text(self.tokens, self.attention, context=self.context, prefix=front, cache=cache).last()

    def _embed(self, token: Tensor, real: Tensor) -> Tokens:
        return self.text.embed(token.unsqueeze(1), real.unsqueeze(1))

    def _logits(self, last: Tensor) -> Tensor:
        logits = self.text.lm_logits(last).float()
        pad_id = self.text.tokenizer.pad_token_id
        if pad_id != self.end_id:
            logits[:, pad_id] = -torch.inf  # padding is never a target, its score means nothing
        return logits


class _CachedWriter(_Writer):
    """Scores the next token by running that one position; the cache holds the rest."""

    def __init__(
        self,
        text: TextBackbone,
        base: Tokens,
        seen: Tensor,
        context: Tokens | None,
        attention: Attention,
        end_id: int | None,
        cache: Cache,
    ) -> None:
        super().__init__(text, base, seen, context, attention, end_id)
        self.cache = cache

    def first(self) -> Tensor:
        """See `_Writer.first`."""
        return self._logits(self._run(self.cache))

    def next(self, token: Tensor, real: Tensor) -> Tensor:
        """See `_Writer.next`."""
        tokens = self._embed(token, real)
        return self._logits(self.text(tokens, "causal", context=self.context, cache=self.cache).values[:, 0])

    def select(self, rows: Tensor) -> None:
        """See `_Writer.select`."""
        self.cache.select(rows)
        self.context = None if self.context is None else self.context.rows(rows)


def _beam_search(writer: _Writer, batch: int, beams: int, steps: int, end_id: int | None, pad_id: int) -> Tensor:
    logits = writer.first()
    device = logits.device
    first_of_row = torch.arange(batch, device=device).unsqueeze(1) * beams
    copies = torch.arange(batch, device=device).repeat_interleave(beams)
    logits = logits[copies]
    writer.select(copies)
    written = copies.new_zeros(batch * beams, 0)
    real = torch.zeros_like(written, dtype=torch.bool)
    open_beams = torch.ones(batch, beams, dtype=torch.bool, device=device)
    scores = torch.full((batch, beams), -torch.inf, device=device)
    scores[:, 0] = 0.0  # all beams start equal: only one of them may branch
    while True:
        gains = logits.log_softmax(-1).unflatten(0, (batch, beams))
        stay = torch.full_like(gains[0, 0], -torch.inf)
        stay[pad_id] = 0.0
        gains = torch.where(open_beams.unsqueeze(-1), gains, stay)  # (batch, beams, vocabulary); ended beams only stay
        vocabulary = gains.shape[-1]
        scores, choice = (scores.unsqueeze(-1) + gains).flatten(1).topk(beams, dim=1)
        parent, token = choice // vocabulary, choice % vocabulary
        was_open = open_beams.gather(1, parent)
        order = (first_of_row + parent).flatten()
        written = torch.cat([written[order], token.view(-1, 1)], dim=1)
        real = torch.cat([real[order], was_open.view(-1, 1)], dim=1)
        open_beams = was_open if end_id is None else was_open & (token != end_id)
        if written.shape[1] == steps or not open_beams.any():
            break
        writer.select(order)
        logits = writer.next(token.flatten(), was_open.flatten())
    lengths = real.sum(1).clamp(min=1).view(batch, beams)
    best = (scores / lengths).argmax(1, keepdim=True)
    return written[(first_of_row + best).flatten()]


def _sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    probabilities = (logits / temperature).softmax(-1)
    if top_p < 1.0:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # the token that reaches the share is still inside
        probabilities = probabilities.scatter(-1, order, ordered.masked_fill(outside, 0.0))
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


def _opening(text: TextBackbone, ids: Tensor, mask: Tensor, prefix: Tokens | None) -> tuple[Tokens, Tensor]:
    """Prefix and prompt with the padding moved to the right and cut, and which positions are prefix."""
    tokens = text.embed(ids, mask)
    seen = torch.zeros_like(mask)
    if prefix is not None:
        tokens = concatenate(prefix, tokens)
        seen = torch.cat([torch.ones_like(prefix.mask), seen], dim=1)
    lengths = tokens.mask.sum(1)
    if not bool(lengths.all()):
        raise ConfigError(
            f"row {int(lengths.argmin())} has neither a prompt nor a prefix to continue; begin with [CLS]"
        )
    order = (~tokens.mask).int().argsort(dim=1, stable=True)[:, : int(lengths.max())]
    values = tokens.values.gather(1, order.unsqueeze(-1).expand(-1, -1, tokens.width))
    return Tokens(values, tokens.mask.gather(1, order)), seen.gather(1, order)


def _check(attention: Attention, prefix: Tokens | None, temperature: float, top_p: float, beams: int) -> None:
    if attention not in ("causal", "prefix"):
        raise ConfigError(f"attention={attention!r} can't generate: choose 'causal' or 'prefix'")
    if attention == "prefix" and prefix is None:
        raise ConfigError("attention='prefix' without prefix vectors; pass prefix=, or attention='causal'")
    if temperature < 0 or not 0 < top_p <= 1 or beams < 1:
        raise ConfigError(f"temperature={temperature}, top_p={top_p}, beams={beams}: expected >= 0, in (0, 1], >= 1")
    if beams > 1 and temperature > 0:
        raise ConfigError(
            f"beams={beams} with temperature={temperature}: beam search is deterministic, use temperature=0"
        )
