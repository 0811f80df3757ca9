"""Marks of thoughts of several model families, thinking modes and dates of chat templates."""

import json

import pytest
from helpers import TINY_MODEL
from transformers import AddedToken, AutoTokenizer

from opsd.grading import extract_answer
from opsd.rewards import Verifier, make_reward
from opsd.thinking import after_thought, check_thinking_mode, decode_response, freeze_date

HEADER = "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
TURNS = "{% for message in messages %}{{ message['role'] + message['content'] }}{% endfor %}"


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_MODEL)


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("<think>\n", "\n</think>\n\n"),
        ("<|channel>thought\n", "<channel|>"),
        ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
        ("[THINK]", "[/THINK]"),
        ("<seed:think>", "</seed:think>"),
    ],
)
def test_answers_follow_thoughts(start, end):
    thought = rf"{start}perhaps \boxed{{5}}"
    assert extract_answer(rf"{thought}{end}so \boxed{{7}}", thinking=True) == "7"
    assert extract_answer(rf"perhaps \boxed{{5}}{end}so \boxed{{7}}", thinking=True) == "7"  # the prompt opened it
    assert extract_answer(rf"{thought}{end}so \boxed{{7}}") == "7"
    assert extract_answer(thought) is extract_answer(thought, thinking=True) is None
    assert extract_answer(r"so \boxed{7}", thinking=True) is None
    assert after_thought(f"{thought}{end}a{end}b").strip() == "b"


def test_texts_without_thoughts_are_whole():
    assert after_thought("2 < 3, [so] it is 5") == "2 < 3, [so] it is 5"
    assert extract_answer(r"Let me think: \boxed{7}") == "7"


@pytest.mark.parametrize("is_special", [False, True])
def test_marks_survive_decoding(tokenizer, is_special):
    """Some tokenizers have </think> as a special token, which `skip_special_tokens` would take away."""
    tokenizer.add_tokens([AddedToken("<channel|>", special=is_special)], special_tokens=is_special)
    if is_special:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    for text in (r"\boxed{5}</think>so \boxed{7}", r"\boxed{5}<channel|>so \boxed{7}"):
        ids = tokenizer(text + "<|im_end|>", add_special_tokens=False).input_ids
        assert decode_response(tokenizer, ids) == text
        assert Verifier(thinking=True)([decode_response(tokenizer, ids)], ["7"]) == [True]
        reward = make_reward("math", True, tokenizer)
        assert reward(completions=[[{"content": "stripped"}]], completion_ids=[ids], answer=["7"]) == [1.0]


@pytest.mark.parametrize(
    "template",
    [
        TURNS + HEADER,
        TURNS.replace("message['content']", "message['content'].split('</think>')[-1]") + HEADER,  # for the history
        "{# <think> #}" + TURNS + HEADER,
    ],
    ids=["none", "history", "named"],
)
def test_templates_without_thinking_mode_are_refused(tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="--thinking: the chat template of .* has no thinking mode to switch on"):
        check_thinking_mode(tokenizer, "thinking")


@pytest.mark.parametrize(
    "template",
    [
        TURNS + HEADER + "{{ '<think>\n\n</think>\n' if enable_thinking is false }}",
        "{{ '<|think|>' if enable_thinking }}" + TURNS + HEADER,  # in the system turn
        TURNS + HEADER + "{{ '<think>\n' }}",  # always
    ],
    ids=["closed when off", "system turn", "always"],
)
def test_templates_with_thinking_mode(tokenizer, template):
    check_thinking_mode(tokenizer, "thinking")  # the tiny model's own
    tokenizer.chat_template = template
    check_thinking_mode(tokenizer, "thinking")


def test_dates_in_templates_stay(tokenizer):
    own = tokenizer.chat_template
    assert freeze_date(tokenizer, "2026-01-31") is None and tokenizer.chat_template == own
    tokenizer.chat_template = "Today Date: {{ strftime_now('%d %b %Y') }} {{ strftime_now(\"%Y-%m-%d\") }}" + own
    assert freeze_date(tokenizer, "2026-01-31") == "2026-01-31"
    text = tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    assert text.startswith("Today Date: 31 Jan 2026 2026-01-31")

    tokenizer.chat_template = "{{ strftime_now('%Y') }}" + own
    today = freeze_date(tokenizer, None)
    assert json.dumps(today) and len(today) == 10
