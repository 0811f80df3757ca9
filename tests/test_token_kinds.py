"""Kinds of tokens: by their text, as a table of a vocabulary, and what is logged of them."""

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoTokenizer

from data_collator import Rollout
from opsd.losses import TokenLosses, TokenStatistics
from opsd.token_kinds import MATHEMATICS, OTHER, STYLE, WORD, is_epistemic, kind_of, make_token_kinds, word_lists
from opsd.token_weights import find_places, top_tokens


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        (STYLE, ["So", " so", "\nWAIT", "Let", " let’s", "let's", "I", " Perhaps", " think,"]),
        (MATHEMATICS, ["7", " 12", "3.5", "²", "٣", "+", " -", "*", "/", "=", "≤", "^", "_{"]),
        (MATHEMATICS, ["\\", "\\frac", "So \\boxed", " x", "N", "α", "}{", ")/", "-(", " equation", "Sum", "%", "$"]),
        (OTHER, ["", " ", "\n", ".", ",", "(", ":", "**", "---", "==", " a", "s", "'s", " house", "ing"]),
        (OTHER, ["\ufffd", "数", "_foo"]),
    ],
)  # fmt: skip
def test_kinds_by_hand(kind, texts):
    assert [text for text in texts if kind_of(text) != kind] == []


def test_epistemic_words():
    assert all(map(is_epistemic, ["Wait", " maybe", " Perhaps", "hmm,"]))
    assert not any(map(is_epistemic, ["So", " waiter", "7", "", " may"]))


def test_lists_are_words_and_do_not_overlap():
    lists = word_lists()
    assert lists.keys() == {"style", "mathematics", "epistemic"}
    assert sum(map(len, lists.values())) == len(frozenset.union(*lists.values())) > 300
    for word in frozenset.union(*lists.values()):
        assert WORD.fullmatch(word) and word == word.lower(), word


def test_table_of_a_vocabulary(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    table = make_token_kinds(tokenizer, len(tokenizer) + 3, torch.device("cpu"))
    assert table.kinds.shape == table.epistemic.shape == (len(tokenizer) + 3,)
    for text, kind in (("7", MATHEMATICS), ("+", MATHEMATICS), (" gives ", OTHER), ("<|im_end|>", OTHER)):
        (token_id,) = tokenizer.encode(text)
        assert table.kinds[token_id] == kind, text
    assert not table.kinds[-3:].any() and not table.epistemic[-3:].any()
    assert len(make_token_kinds(tokenizer, 10, torch.device("cpu")).kinds) == 10


# What is logged


def make_batch(trainer, texts, weights=None):
    """A micro-batch of given completions behind the same prompt."""
    rollouts = [
        Rollout(0, "1+1", [1, 2], [1, 2, 3], completion_ids=trainer.processing_class.encode(text), weight=weight)
        for text, weight in zip(texts, weights or [1.0] * len(texts), strict=True)
    ]
    return trainer.collator(rollouts)


def losses_of(**statistics):
    size = len(next(iter(statistics.values())))
    columns = {name: torch.zeros(size) for name in TokenStatistics._fields}
    columns |= {name: torch.tensor(values, dtype=torch.float32) for name, values in statistics.items()}
    return TokenLosses(columns["divergence"], TokenStatistics(**columns), None)


def test_classes_by_hand(make_trainer):
    """`7+5 gives 12.` has kinds M M M O M M O, and quarters 1 1 2 2 3 3 4; the second completion does not count."""
    trainer = make_trainer()
    batch = make_batch(trainer, ["7+5 gives 12.", "7"], weights=[1.0, 0.0])
    batch.loss_mask[1, 0] = True  # as with a reward
    texts = [trainer.processing_class.decode([i]) for i in batch.of_tokens(batch.completion_ids).tolist()]
    assert texts == ["7", "+", "5", " gives ", "1", "2", ".", "7"]
    losses = losses_of(
        divergence=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 100.0],
        student_entropy=[0.0, 0.1, 0.9, 0.2, 0.0, 0.8, 0.3, 9.0],
        clipped_entries=[0.0, 2.0, 0.0, 1.0, 1.0, 0.0, 0.0, 5.0],
    )
    trainer.token_metrics.add(batch, losses)
    logged = trainer.metrics.pop()
    expected = {
        "divergence": 28 / 7,
        "divergence/mathematics": 17 / 5,
        "divergence/other": 11 / 2,
        "divergence/first_tokens": 10 / 4,
        "divergence/quarter_1": 1.5,
        "divergence/quarter_2": 3.5,
        "divergence/quarter_3": 5.5,
        "divergence/quarter_4": 7.0,
        "divergence/forks": 9 / 2,  # of 7 tokens 2: those with entropies 0.9 and 0.8
        "token_share/mathematics": 5 / 7,
        "token_share/other": 2 / 7,
        "token_share/style": 0.0,
        "token_share/epistemic": 0.0,
        "clip_ratio/mathematics_tokens": 2 / 5,
        "clip_ratio/other_tokens": 1 / 2,
    }
    assert {name: logged[name] for name in expected} == pytest.approx(expected)
    assert "divergence/style" not in logged and "clip_ratio/epistemic_tokens" not in logged  # of no token


def test_forks_do_not_depend_on_the_batch(make_trainer):
    trainer = make_trainer()
    texts = ["7+5 gives 12.", "8", "ones: 8+7 gives 15. tens: 5+4 gives 10. "]
    entropies, forks = [], []
    generator = torch.Generator().manual_seed(0)
    for text in texts:
        batch = make_batch(trainer, [text])
        size = len(batch.of_tokens(batch.completion_ids))
        entropies.append(torch.rand(size, generator=generator))
        forks.append(top_tokens(entropies[-1], find_places(batch)))
        assert forks[-1].sum() == -(-size // 5)
        assert entropies[-1][forks[-1]].min() >= entropies[-1].quantile(1 - forks[-1].sum() / size)
    together = make_batch(trainer, texts)
    entropy = torch.cat(entropies)
    assert_close(top_tokens(entropy, find_places(together)), torch.cat(forks))
