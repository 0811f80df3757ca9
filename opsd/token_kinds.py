"""
Kinds of tokens, by their text: style (how a solution is told), mathematics, other; and words of doubt.

The lists of words are in token_kinds.json. They are this project's own, since those of paper v3 are not at hand. The
kind is that of a token by itself, without what stands around it, so that one table holds those of a vocabulary.
"""

import json
import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

FILE = Path(__file__).with_suffix(".json")
OTHER, STYLE, MATHEMATICS = range(3)

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")
COMMAND = re.compile(r"\\[A-Za-z]")  # of LaTeX
REPEATED = re.compile(r"(.)\1+")  # rules of Markdown, such as --- and ***
SYMBOLS = frozenset(r"^_\${}%°")
OPERATORS = re.compile(r"[-*/]|.*[)\]}][-*/].*|.*[-*/][(\[{\\].*")  # alone, or beside a bracket: else also Markdown
NO_VARIABLES = frozenset("ais")  # "a", "I", and the rest of "it's"


@cache
def word_lists() -> dict[str, frozenset[str]]:
    """Read the words of each list: style, mathematics, epistemic."""
    return {name: frozenset(words) for name, words in json.loads(FILE.read_text(encoding="utf-8")).items()}


def _words(text: str) -> list[str]:
    return [word.replace("’", "'") for word in WORD.findall(text.lower())]


def is_epistemic(text: str) -> bool:
    """Return whether a token has a word of doubt or of a second look, such as "wait" or "perhaps"."""
    return not word_lists()["epistemic"].isdisjoint(_words(text))


def kind_of(text: str) -> int:
    """
    Return the kind of a token.

    Mathematics are digits, operators and other symbols of formulas, commands of LaTeX, single Latin and Greek letters
    (but a, I and s), and the words of its list. Else style are the words of its list and the epistemic ones.
    """
    text, lists = text.strip(), word_lists()
    words = _words(text)
    if _is_formula(text, words) or not lists["mathematics"].isdisjoint(words):
        return MATHEMATICS
    return OTHER if lists["style"].isdisjoint(words) and lists["epistemic"].isdisjoint(words) else STYLE


def _is_formula(text: str, words: Sequence[str]) -> bool:
    if any(character.isdigit() or unicodedata.category(character) == "No" for character in text):
        return True
    if COMMAND.search(text):
        return True
    if words:
        is_letter = len(text) == 1 and unicodedata.name(text, "").startswith(("LATIN", "GREEK", "MATHEMATICAL"))
        return is_letter and text.lower() not in NO_VARIABLES
    if REPEATED.fullmatch(text):
        return False
    is_symbol = any(character in SYMBOLS or unicodedata.category(character) == "Sm" for character in text)
    return is_symbol or OPERATORS.fullmatch(text) is not None


class TokenKinds(NamedTuple):
    """The kind of each entry of a vocabulary."""

    kinds: Tensor  # (V,), int8: OTHER, STYLE or MATHEMATICS
    epistemic: Tensor  # (V,), bool


def make_token_kinds(tokenizer: PreTrainedTokenizerBase, vocab_size: int, device: torch.device) -> TokenKinds:
    """
    Make the table of a tokenizer. Special tokens, and entries that it does not know, are other.

    Args:
        tokenizer: of the model.
        vocab_size: V, number of logits of a token.
        device: of the table.
    """
    size = min(len(tokenizer), vocab_size)
    texts = tokenizer.batch_decode([[token_id] for token_id in range(size)], clean_up_tokenization_spaces=False)
    for token_id, token in tokenizer.added_tokens_decoder.items():
        if token.special and token_id < size:
            texts[token_id] = ""
    rest = vocab_size - size
    kinds = torch.tensor([kind_of(text) for text in texts] + [OTHER] * rest, dtype=torch.int8, device=device)
    epistemic = torch.tensor([is_epistemic(text) for text in texts] + [False] * rest, device=device)
    return TokenKinds(kinds, epistemic)
