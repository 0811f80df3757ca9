"""Marks of thoughts of several model families, thinking modes and dates of chat templates."""

import json
import shutil

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
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        ("◁think▷", "◁/think▷"),
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
        assert Verifier(thinking=True)([decode_response(tokenizer, ids)], ["7"], [{}]) == [True]
        reward = make_reward("math", True, tokenizer)
        assert reward(
            completions=[[{"content": "stripped"}]], completion_ids=[ids], answer=["7"], row=[{}], log_metric=None
        ) == [1.0]


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
    with pytest.raises(ValueError, match="--on: the chat template of .* has no thinking mode to switch.* use --off"):
        check_thinking_mode(tokenizer, True, "on", "off")
    check_thinking_mode(tokenizer, False, "on", "off")


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
    check_thinking_mode(tokenizer, True, "on", "off")  # the tiny model's own
    tokenizer.chat_template = template
    check_thinking_mode(tokenizer, True, "on", "off")


def test_a_thought_that_is_open_in_any_mode(tokenizer):
    tokenizer.chat_template = TURNS + HEADER + "{{ '<think>\n' }}"
    with pytest.raises(ValueError, match="--off: the chat template of .* opens a thought all the same; use --on"):
        check_thinking_mode(tokenizer, False, "on", "off")


def test_marks_that_are_not_known(tmp_path):
    shutil.copytree(TINY_MODEL, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    file.write_text(file.read_text().replace("think>", "ponder>"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = tokenizer.chat_template.replace("think>", "ponder>")
    with pytest.raises(ValueError, match="--on: neither .* marks that end a thought.*</think>.* use --off"):
        check_thinking_mode(tokenizer, True, "on", "off")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{ strftime_now('%d %b %Y') }} {{ strftime_now(\"%Y-%m-%d\") }}", "03 Jan 2026 2026-01-03"),
        ("{%- set form = '%A, %-d.%-m.%y' %}{{ strftime_now(form) }}", "Saturday, 3.1.26"),
        ("{{ strftime_now(format='%B') }} {{ strftime_now('%d' ~ ' %H:%M') }}", "January 03 00:00"),
        ("{%- macro head() %}{{ strftime_now('%Y') }}{% endmacro %}{{ head() }}", "2026"),
        ("{%- if strftime_now is defined %}{% set now = strftime_now('%j') %}{% endif %}{{ now | int + 1 }}", "4"),
    ],
    ids=["texts", "variable", "keyword and computed", "in a macro", "Llama 3.2"],
)
def test_dates_in_templates_stay(tokenizer, text, expected):
    own = tokenizer.chat_template
    assert freeze_date(tokenizer, "2026-01-03") is None and tokenizer.chat_template == own
    for templates in (f"Today:[{text}]{own}", {"default": f"Today:[{text}]{own}", "other": own}):
        tokenizer.chat_template = templates
        assert freeze_date(tokenizer, "2026-01-03") == "2026-01-03"
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
        assert prompt.startswith(f"Today:[{expected}]<|im_start|>")


def test_date_of_the_first_start(tokenizer):
    tokenizer.chat_template = "{{ strftime_now('%Y') }}" + tokenizer.chat_template
    today = freeze_date(tokenizer, None)
    assert json.dumps(today) and len(today) == 10
