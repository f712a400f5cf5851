"""Answers that satisfy a JSON schema: at every token llguidance says which may follow."""

import threading
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bitwright.serve.failures import RequestError

ANY_OBJECT = '{"type": "object"}'


class Grammars:
    """Grammars over a model's vocabulary, whose table is made when the first one is asked for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, stop: frozenset[int]) -> None:
        self.tokenizer, self.vocabulary, self.stop = tokenizer, vocabulary, stop
        self._table: LLTokenizer | None = None
        self._making = threading.Lock()

    def of(self, schema: str) -> "Grammar":
        """A JSON schema as a grammar at its beginning. RequestError 400 for one that is none, or that nothing satisfies."""
        with self._making:
            if self._table is None:
                self._table = from_tokenizer(self.tokenizer, n_vocab=self.vocabulary, eos_token=sorted(self.stop))
        try:
            matcher = LLMatcher(self._table, LLMatcher.grammar_from_json_schema(schema))
        except ValueError as error:
            raise _refused(str(error)) from error
        if matcher.is_error():
            raise _refused(matcher.get_error())
        return Grammar(matcher, self.vocabulary)


def _refused(reason: str) -> RequestError:
    message = f"Invalid schema for response_format: {reason.splitlines()[0]}"
    return RequestError(400, message, param="response_format", code="invalid_json_schema")


class Grammar:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self.matcher, self.vocabulary = matcher, vocabulary
        self.bits = np.zeros((vocabulary + 31) // 32, np.int32)

    def fresh(self) -> "Grammar":
        """The same for another answer."""
        return Grammar(self.matcher.deep_copy(), self.vocabulary)

    def masked(self, logits: Tensor) -> Tensor:
        """Logits [V], −∞ for tokens that may not follow. RequestError 500 where the schema asks too much of the grammar."""
        self.matcher.unsafe_compute_mask_ptr(self.bits.ctypes.data, self.bits.nbytes)
        allowed = np.unpackbits(self.bits.view(np.uint8), bitorder="little")[: len(logits)]
        if not allowed.any():
            raise RequestError(500, f"The answer cannot go on: {self.matcher.get_error()}", type="server_error")
        return logits.masked_fill(~torch.from_numpy(allowed).bool(), -torch.inf)

    def accept(self, token: int) -> bool:
        """Go on by a token; whether the answer is complete and nothing can follow."""
        self.matcher.consume_token(token)
        return bool(self.matcher.is_stopped())
