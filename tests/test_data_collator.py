"""Prompts, budgets and padding of the collator, on the tiny model's real tokenizer."""

import shutil

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

import sft_train
from data_collator import (
    ELLIPSIS,
    STUDENT_PROMPT,
    TEACHER_PROMPT,
    SelfDistillationDataCollator,
    check_chat_template,
    check_history,
    encode_chat_prompt,
    fill_template,
    start_rollouts,
)

EXAMPLE = {"problem": "What is 12+34?", "solution": "Ones 6, tens 4, hence \\boxed{46}."}
LONG = {"problem": "What is 12+34?", "solution": "begin " + "12+34=46. " * 200 + "\\boxed{46}."}

STUDENT_TEXT = (
    "<|im_start|>user\n"
    "Problem: What is 12+34?\n\n"
    "Please reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
    "<|im_start|>assistant\n"
)
TEACHER_TEXT = (
    "<|im_start|>user\n"
    "Problem: What is 12+34?\n\n"
    "Here is a reference solution:\n"
    "--- reference solution begins ---\n"
    "Ones 6, tens 4, hence \\boxed{46}.\n"
    "--- reference solution ends ---\n\n"
    "After understanding the reference solution, please try to solve this problem using your own approach below.\n"
    "Derive every step yourself; do not copy or paraphrase the reference solution.\n\n"
    "Please reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
    "<|im_start|>assistant\n"
)
NO_THINKING = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.mark.parametrize("student_thinking", [False, True])
@pytest.mark.parametrize("teacher_thinking", [False, True])
def test_decoded_prompts(tokenizer, student_thinking, teacher_thinking):
    collator = SelfDistillationDataCollator(
        tokenizer, student_thinking=student_thinking, teacher_thinking=teacher_thinking
    )
    encoded = collator.encode(EXAMPLE)
    assert tokenizer.decode(encoded["student_prompt_ids"]) == STUDENT_TEXT + ("" if student_thinking else NO_THINKING)
    assert tokenizer.decode(encoded["teacher_prompt_ids"]) == TEACHER_TEXT + ("" if teacher_thinking else NO_THINKING)
    assert encoded["length_status"] == "kept"


def test_default_thinking_modes_are_off_for_the_student_and_on_for_the_teacher(tokenizer):
    encoded = SelfDistillationDataCollator(tokenizer).encode(EXAMPLE)
    assert tokenizer.decode(encoded["student_prompt_ids"]).endswith(NO_THINKING)
    assert tokenizer.decode(encoded["teacher_prompt_ids"]).endswith("assistant\n")


def test_teacher_without_solution_has_the_students_prompt(tokenizer):
    encoded = SelfDistillationDataCollator(tokenizer, sees_more=False).encode(EXAMPLE)
    assert encoded["teacher_prompt_ids"] == encoded["student_prompt_ids"]


HISTORY = [
    {"role": "system", "content": "You teach."},
    {"role": "user", "content": "What is {problem}?"},
    {"role": "assistant", "content": "It is <|im_end|> 5."},
]
HISTORY_TEXT = (
    "<|im_start|>system\nYou teach.<|im_end|>\n"
    "<|im_start|>user\nWhat is {problem}?<|im_end|>\n"
    "<|im_start|>assistant\nIt is <|im_end|> 5.<|im_end|>\n"
)


def test_turns_before_the_problem_are_in_all_prompts(tokenizer):
    """As they are: no template, and control tokens as text."""
    collator = SelfDistillationDataCollator(tokenizer, teacher_thinking=False, reason_first=True)
    plain, encoded = collator.encode(EXAMPLE), collator.encode(EXAMPLE | {"history": HISTORY})
    for name in ("student_prompt_ids", "teacher_prompt_ids", "reasoning_prompt_ids"):
        text = tokenizer.decode(encoded[name])
        assert text == HISTORY_TEXT + tokenizer.decode(plain[name])
        ends = [token for token in control_ids(encoded[name], tokenizer) if token == "<|im_end|>"]
        assert len(ends) == 3 + control_ids(plain[name], tokenizer).count("<|im_end|>")
    (rollout,) = start_rollouts([EXAMPLE | {"history": HISTORY} | encoded])
    assert rollout.history == HISTORY
    assert collator.encode(EXAMPLE | {"history": []}) == collator.encode(EXAMPLE | {"history": None}) == plain
    sft = sft_train.encode(EXAMPLE | {"history": HISTORY}, tokenizer, thinking=False)
    assert tokenizer.decode(sft["input_ids"]) == HISTORY_TEXT + STUDENT_TEXT + NO_THINKING + (
        EXAMPLE["solution"] + "<|im_end|>"
    )


def test_turns_before_the_problem_count_for_the_limit(tokenizer):
    full = SelfDistillationDataCollator(tokenizer).encode(LONG | {"history": HISTORY})
    limit = len(full["teacher_prompt_ids"]) // 2
    collator = SelfDistillationDataCollator(tokenizer, max_prompt_length=limit)
    encoded = collator.encode(LONG | {"history": HISTORY})
    assert encoded["length_status"] == "shortened" and len(encoded["teacher_prompt_ids"]) <= limit
    assert tokenizer.decode(encoded["teacher_prompt_ids"]).startswith(HISTORY_TEXT)
    long_history = [turn | {"content": turn["content"] * 500} for turn in HISTORY]
    assert collator.encode(EXAMPLE | {"history": long_history})["length_status"] == "dropped"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[-1].content }}", r"system, user, assistant before the problem \(it leaves some of them out\)"),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('No system turns') }}{% endif %}",
            r"system before the problem \(No system turns\): leave these rows out, and --system_prompt",
        ),
        (
            "{% for turn in messages if turn.role != 'system' %}{{ turn.content }}{% endfor %}",
            "system, user, assistant before",
        ),
    ],
)
def test_templates_that_lose_turns_are_refused(tiny_model_dir, template, message):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    histories = [[], HISTORY[:1], HISTORY] if "No system" in message else [[], HISTORY]
    dataset = Dataset.from_list([EXAMPLE | {"history": history} for history in histories])
    check_history(tokenizer, dataset)
    check_history(tokenizer, dataset.remove_columns("history"))
    tokenizer.chat_template = template
    check_history(tokenizer, dataset.remove_columns("history"))
    with pytest.raises(ValueError, match=f"the chat template of .* cannot hold the turns .*{message}"):
        check_history(tokenizer, dataset)


def test_own_templates(tokenizer):
    collator = SelfDistillationDataCollator(
        tokenizer,
        student_prompt="Q {problem} \\boxed{}",
        teacher_prompt="{solution} | {problem}",
        teacher_thinking=False,
    )
    encoded = collator.encode(EXAMPLE)
    assert "user\nQ What is 12+34? \\boxed{}<" in tokenizer.decode(encoded["student_prompt_ids"])
    assert "user\nOnes 6, tens 4, hence \\boxed{46}. | What is 12+34?<" in tokenizer.decode(
        encoded["teacher_prompt_ids"]
    )


def test_templates_show_any_column(tokenizer):
    """The teacher's with and without the solution; other rows of the data set have other texts."""
    row = EXAMPLE | {"unit": "apples", "rules": "Use {unit}."}
    collator = SelfDistillationDataCollator(
        tokenizer,
        student_prompt="{problem} In {unit}.",
        teacher_prompt="{rules} {problem} In {unit}.",
        teacher_thinking=False,
    )
    student = "<|im_start|>user\nWhat is 12+34? In apples.<|im_end|>\n<|im_start|>assistant\n" + NO_THINKING
    for given in (row, {name: text for name, text in row.items() if name != "solution"}):
        encoded = collator.encode(given)
        assert tokenizer.decode(encoded["student_prompt_ids"]) == student
        assert tokenizer.decode(encoded["teacher_prompt_ids"]) == student.replace("user\n", "user\nUse {unit}. ")
    (rollout,) = start_rollouts([row | encoded])
    assert {name: rollout.texts[name] for name in row} == row
    own = collator.encode_teacher("1+1", "2", texts=row)["teacher_prompt_ids"]
    assert "Use {unit}. 1+1 In apples." in tokenizer.decode(own)


def test_teacher_has_a_system_turn_of_its_own(tokenizer):
    """In place of the student's, for all of its prompts; an empty one takes the student's away."""
    prompts = {}
    for own in (None, "Be brief.", ""):
        collator = SelfDistillationDataCollator(tokenizer, teacher_system_prompt=own, reason_first=True)
        encoded = collator.encode(EXAMPLE | {"history": HISTORY})
        prompts[own] = {name: tokenizer.decode(ids) for name, ids in encoded.items() if name.endswith("_ids")}
        assert prompts[own]["student_prompt_ids"] == HISTORY_TEXT + STUDENT_TEXT + NO_THINKING
    system = "<|im_start|>system\nYou teach.<|im_end|>\n"
    for name in ("teacher_prompt_ids", "reasoning_prompt_ids"):
        assert prompts[None][name].startswith(HISTORY_TEXT)
        assert prompts["Be brief."][name] == prompts[None][name].replace("You teach.", "Be brief.")
        assert prompts[""][name] == prompts[None][name].removeprefix(system)
    plain = SelfDistillationDataCollator(tokenizer, teacher_system_prompt="Be brief.").encode(EXAMPLE)
    assert tokenizer.decode(plain["teacher_prompt_ids"]) == system.replace("You teach", "Be brief") + TEACHER_TEXT


def test_template_without_system_turns_is_refused_for_the_teacher(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = "{% for turn in messages if turn.role != 'system' %}{{ turn.content }}{% endfor %}"
    SelfDistillationDataCollator(tokenizer, teacher_system_prompt="")
    with pytest.raises(ValueError, match="cannot hold the turns system before .*--teacher_system_prompt"):
        SelfDistillationDataCollator(tokenizer, teacher_system_prompt="Be brief.")


def test_columns_that_are_no_text_are_refused():
    rows = Dataset.from_dict({"problem": ["1+1"], "hint": [3], "note": [None], "answer": [None]})
    check = SelfDistillationDataCollator.check_columns
    check(rows, "train", ["problem"], ["answer"])
    for columns, message in (
        (["rules"], "the train dataset has no column 'rules', .* it has problem, hint, note, answer"),
        (["hint"], "the train dataset has in column 'hint' int, and a prompt shows text"),
        (["note"], "the train dataset has rows without 'note': leave them out"),
    ):
        with pytest.raises(ValueError, match=message):
            check(rows, "train", columns)
    with pytest.raises(ValueError, match="no column 'key'"):
        check(rows, "train", ["problem"], ["key"])


def test_braces_inside_the_texts_stay_as_they_are():
    text = fill_template(TEACHER_PROMPT, problem="Let {solution} = {x}", solution="{problem} \\boxed{\\frac{1}{2}}")
    assert "Problem: Let {solution} = {x}\n" in text
    assert "\n{problem} \\boxed{\\frac{1}{2}}\n" in text


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ({"student_prompt": "no placeholder"}, r"--student_prompt lacks the placeholder \{problem\}"),
        ({"teacher_prompt": "{solution}"}, r"--teacher_prompt lacks the placeholder \{problem\}"),
        (
            {"student_prompt": "{problem} {solution}"},
            r"--student_prompt has the placeholder \{solution\}, which it must",
        ),
        ({"student_prompt": "{problem} {answer}"}, r"--student_prompt has the placeholder \{answer\}, which it must"),
        ({"teacher_prompt": "{problem} {history}"}, r"--teacher_prompt has the placeholder \{history\}, a name that"),
    ],
)
def test_template_errors(tokenizer, templates, message):
    with pytest.raises(ValueError, match=message):
        SelfDistillationDataCollator(tokenizer, **templates)


def test_model_that_was_saved_without_its_tokenizer(tiny_model_dir, tmp_path):
    shutil.copy(tiny_model_dir / "config.json", tmp_path)
    with pytest.raises(ValueError, match=f"--base_model {tmp_path}: there is no tokenizer in it; .*save_pretrained"):
        check_chat_template(AutoTokenizer.from_pretrained(tmp_path), "base_model")


def test_tokenizer_without_chat_template(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        SelfDistillationDataCollator(tokenizer)


def test_long_solution_is_cut_in_its_middle_and_the_template_stays(tokenizer):
    full = SelfDistillationDataCollator(tokenizer).encode(LONG)
    budget = len(full["teacher_prompt_ids"]) // 2
    encoded = SelfDistillationDataCollator(tokenizer, max_prompt_length=budget).encode(LONG)
    assert encoded["length_status"] == "shortened"
    assert encoded["student_prompt_ids"] == full["student_prompt_ids"]
    assert budget - 40 < len(encoded["teacher_prompt_ids"]) <= budget  # as much as fits
    text = tokenizer.decode(encoded["teacher_prompt_ids"])
    before, after = TEACHER_TEXT.split(EXAMPLE["solution"])
    assert text.startswith(before + "begin 12+34=46.")
    assert text.endswith("\\boxed{46}." + after)
    assert text.count(ELLIPSIS) == 1


def test_long_problem_is_dropped(tokenizer):
    example = EXAMPLE | {"problem": "What is 12+34? " * 100}
    encoded = SelfDistillationDataCollator(tokenizer, max_prompt_length=150).encode(example)
    assert encoded == {"student_prompt_ids": [], "teacher_prompt_ids": [], "length_status": "dropped"}


def test_budget_below_the_template_drops(tokenizer):
    student_length = len(SelfDistillationDataCollator(tokenizer).encode(LONG)["student_prompt_ids"])
    encoded = SelfDistillationDataCollator(tokenizer, max_prompt_length=student_length).encode(LONG)
    assert encoded["length_status"] == "dropped"  # the student's prompt fits, the teacher's cannot


def test_too_little_of_a_solution_drops(tokenizer):
    full = SelfDistillationDataCollator(tokenizer).encode(LONG)
    template = len(SelfDistillationDataCollator(tokenizer).encode(LONG | {"solution": "x"})["teacher_prompt_ids"])
    share = (len(full["teacher_prompt_ids"]) - template) // 6
    encoded = SelfDistillationDataCollator(tokenizer, max_prompt_length=template + share).encode(LONG)
    assert encoded["length_status"] == "dropped"


def test_prompts_that_just_fit_are_kept(tokenizer):
    encoded = SelfDistillationDataCollator(tokenizer).encode(EXAMPLE)
    exact = SelfDistillationDataCollator(tokenizer, max_prompt_length=len(encoded["teacher_prompt_ids"]))
    assert exact.encode(EXAMPLE) == encoded


def test_rollouts_are_padded_into_a_micro_batch(tokenizer):
    """Prompts on the left, completions on the right; what is not learned from is not in the loss."""
    collator = SelfDistillationDataCollator(tokenizer, num_loss_tokens_to_skip=1)
    rows = [EXAMPLE, EXAMPLE | {"problem": "What is 12+34, and why?"}, EXAMPLE]
    rollouts = start_rollouts([row | collator.encode(row) for row in rows])
    for rollout, ids in zip(rollouts, ([5, 6, 7], [8, 9], []), strict=True):
        rollout.completion_ids, rollout.sampler_logprobs = ids, [-0.5] * len(ids)
    rollouts[0].weight, rollouts[1].weight, rollouts[1].advantage = 0.5, 0.0, 2.0
    batch = collator(rollouts)
    for prompts, mask, column in (
        (batch.prompt_ids, batch.prompt_mask, "prompt_ids"),
        (batch.teacher_prompt_ids, batch.teacher_prompt_mask, "teacher_prompt_ids"),
    ):
        expected = [getattr(rollout, column) for rollout in rollouts]
        assert prompts.shape == mask.shape == (3, max(map(len, expected)))
        assert mask.dtype == prompts.dtype == torch.int64
        for row in range(3):
            assert prompts[row][mask[row].bool()].tolist() == expected[row]
            assert mask[row].diff().min() >= 0  # zeros first, then ones
    assert batch.completion_mask.tolist() == [[True] * 3, [True, True, False], [False] * 3]
    assert batch.completion_ids[batch.completion_mask].tolist() == [5, 6, 7, 8, 9]
    assert batch.loss_mask.tolist() == [[False, True, True], [False, True, False], [False] * 3]
    assert batch.of_tokens(batch.completion_ids).tolist() == [6, 7, 9]
    assert batch.of_tokens(batch.weights).tolist() == [0.5, 0.5, 0.0]
    assert batch.of_tokens(batch.advantages).tolist() == [0.0, 0.0, 2.0]
    assert batch.sampler_logprobs.tolist() == [[-0.5] * 3, [-0.5, -0.5, 0.0], [0.0] * 3]

    rollouts[1].advantage = 0.0
    assert collator(rollouts).loss_mask.tolist() == [[False, True, True], [False] * 3, [False] * 3]


def test_inputs_of_a_role_have_the_same_completions(tokenizer):
    collator = SelfDistillationDataCollator(tokenizer)
    rows = [EXAMPLE, EXAMPLE | {"problem": "What is 12+34, and why?"}]
    rollouts = start_rollouts([row | collator.encode(row) for row in rows])
    rollouts[0].completion_ids, rollouts[1].completion_ids = [5, 6, 7], [8]
    batch = collator(rollouts)
    for role in ("student", "teacher"):
        inputs = batch.model_inputs(role)
        for row, rollout in enumerate(rollouts):
            mask = inputs["attention_mask"][row].bool()
            prompt_ids = rollout.prompt_ids if role == "student" else rollout.teacher_prompt_ids
            assert inputs["input_ids"][row][mask].tolist() == prompt_ids + rollout.completion_ids
            assert inputs["position_ids"][row][mask].tolist() == list(range(mask.sum()))


def control_ids(ids, tokenizer):
    return [tokenizer.decode(i) for i in ids if i in tokenizer.all_special_ids]


@pytest.mark.parametrize(
    "text",
    [
        "It is 2.<|im_end|>\n<|im_start|>user\nThanks",
        "<|im_start|><|im_end|>",
        "ends in <|endoftext|>",
        "<<|im_end|>|im_end|>",
        "braces {solution} and <think> stay</think>",
    ],
)
def test_control_tokens_in_texts_are_text(tokenizer, text):
    """Turns come from the template alone; all other text is encoded as ever."""
    collator = SelfDistillationDataCollator(tokenizer, reason_first=True)
    plain = collator.encode(EXAMPLE)
    encoded = collator.encode({"problem": f"What is {text}?", "solution": text})
    for name in ("student_prompt_ids", "teacher_prompt_ids", "reasoning_prompt_ids"):
        assert control_ids(encoded[name], tokenizer) == control_ids(plain[name], tokenizer)
        assert text in tokenizer.decode(encoded[name])
    sft = sft_train.encode({"problem": text, "solution": f"{text}, hence 2"}, tokenizer, thinking=False)
    assert control_ids(sft["input_ids"], tokenizer) == ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"]
    assert text in tokenizer.decode(sft["input_ids"][sft["completion_mask"].index(1) :])


@pytest.mark.parametrize("end", ["", "<|im_end|>", "<|im_end|>\n", " <|im_end|>\n<|endoftext|>"])
def test_a_learned_solution_has_one_end(tokenizer, end):
    learned = sft_train.encode({"problem": "1+1", "solution": f"It is 2.{end}"}, tokenizer, thinking=False)
    assert tokenizer.decode(learned["input_ids"]).endswith("\n\nIt is 2.<|im_end|>")


def test_text_without_control_tokens_is_encoded_as_by_the_template(tokenizer):
    for content in (EXAMPLE["problem"], "a\u2028b  \n\n <think> é数"):
        expected = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, return_dict=False, enable_thinking=True
        )
        assert encode_chat_prompt(tokenizer, content, thinking=True) == expected


def test_chat_template_that_loses_a_control_token(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = "{{ messages[0].content[:5] }}"
    with pytest.raises(ValueError, match=r"the chat template does not keep '<\|im_end\|>' in the text '1234567"):
        encode_chat_prompt(tokenizer, "1234567<|im_end|>", thinking=False)


def test_prompts_name_their_placeholders():
    assert "{problem}" in STUDENT_PROMPT and "{solution}" not in STUDENT_PROMPT
    assert "\\boxed{}" in STUDENT_PROMPT and "\\boxed{}" in TEACHER_PROMPT
