"""Requests on rank 0 from acceptance to their end: their sequences, and their text as it becomes
certain. Does not decide what runs."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tpinfer.engine.requests import GenerationRequest, TokenEvent
from tpinfer.scheduling.request import Sequence
from tpinfer.steps.logprobs import TokenLogprobs
from tpinfer.text.stop_strings import StopMatcher, StopStrings

if TYPE_CHECKING:
    from tpinfer.text.tokenizer import Tokenizer

_PROMPT_TAIL = 24
"""Last tokens of the prompt that the text of the first new ones may depend on."""


@dataclass(slots=True)
class LiveRequest:
    """One accepted request."""

    index: int
    request: GenerationRequest
    outputs: list["LiveOutput"]
    """One per continuation."""
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    """One per prompt token, None for the first; empty where nobody asked."""

    @property
    def is_finished(self) -> bool:
        """Whether every continuation has ended."""
        return all(output.sequence.finish_reason for output in self.outputs)


class LiveOutput:
    """One continuation."""

    def __init__(
        self,
        live: "LiveRequest",
        sequence: Sequence,
        tokenizer: "Tokenizer | None",
        stops: StopStrings | None,
    ) -> None:
        """`stops` are the request's stop texts made ready, None where it has none."""
        from tpinfer.text.detokenizer import Detokenizer

        params = live.request.params
        self.live = live
        self.sequence = sequence
        self.logprobs: list[TokenLogprobs] = []
        self.stop_reason: str | int | None = None
        self.error: str | None = None
        self._pieces: list[str] = []
        self._detokenizer = (
            Detokenizer(tokenizer, params.skip_special_tokens) if tokenizer else None
        )
        if self._detokenizer is not None:
            prompt = live.request.prompt_token_ids
            text = self._detokenizer.follow(prompt if params.echo else prompt[-_PROMPT_TAIL:])
            self._pieces += [text] if params.echo else []
        self._stops = None if stops is None else StopMatcher(stops, params.include_stop_in_output)
        self._num_unstopped = params.min_tokens

    @property
    def finish_reason(self) -> str | None:
        """Why it ended; a stop text that its last possible token completes counts as one."""
        return "stop" if isinstance(self.stop_reason, str) else self.sequence.finish_reason

    @property
    def text(self) -> str | None:
        """All text that is certain; None without a tokenizer."""
        return "".join(self._pieces) if self._detokenizer else None

    def take(self, token_id: int, logprobs: TokenLogprobs | None) -> TokenEvent:
        """Add a drawn token. Where its text completes a stop string, `stop_reason` says which; the
        caller then ends the sequence.
        """
        sequence = self.sequence
        if logprobs is not None:
            self.logprobs.append(logprobs)
        text = ""
        if self._detokenizer is not None:
            text = self._detokenizer.push(token_id)
            if self._stops is not None:
                may_end = len(sequence.token_ids) >= self._num_unstopped
                text = self._stops.push(text, may_end)
                self.stop_reason = self._stops.matched
            if sequence.finish_reason is not None and self.stop_reason is None:
                text += self._rest()
        if sequence.finish_reason == "stop" and self.stop_reason is None:
            self.stop_reason = token_id
        return self._event(token_id, text, logprobs)

    def end(self) -> TokenEvent:
        """The sequence ended without a token."""
        return self._event(-1, self._rest() if self._detokenizer else "", None)

    def _rest(self) -> str:
        """What was held back, now that nothing follows."""
        assert self._detokenizer is not None
        text = self._detokenizer.finish()
        if self._stops is None:
            return text
        text = self._stops.push(text) + self._stops.finish()
        self.stop_reason = self._stops.matched
        return text

    def _event(self, token_id: int, text: str, logprobs: TokenLogprobs | None) -> TokenEvent:
        if text:
            self._pieces.append(text)
        sample = self.sequence.sampling.index
        return TokenEvent(self.live.index, token_id, self.finish_reason, sample, text, logprobs)
