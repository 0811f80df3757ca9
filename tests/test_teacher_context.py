"""What rollouts are learned from, without a model: grades, siblings, advantages, rationalizations, and refused settings."""

import threading

import numpy as np
import pytest
import torch
from helpers import CPU, OPSD
from transformers import AutoTokenizer

from data_collator import ELLIPSIS, SelfDistillationDataCollator
from opsd.rewards import Verifier, as_reference, group_advantages, pick_correct_peers
from opsd_train import OPSDArguments, needed_columns
from opsd_trainer import OPSDTrainer

FIRST = {"problem": "12+34", "solution": "Ones 6, tens 4, hence \\boxed{46}.", "answer": "46"}
SECOND = {"problem": "20+30", "solution": "Ones 0, tens 5, hence \\boxed{50}.", "answer": "50"}
END = "<|im_end|>"
NO_THINKING = "<think>\n\n</think>\n\n"
REASONING_TEXT = (
    "<|im_start|>user\n"
    "Problem: 12+34\n\n"
    "Here is a reference solution:\n"
    "--- reference solution begins ---\n"
    "Ones 6, tens 4, hence \\boxed{46}.\n"
    "--- reference solution ends ---\n\n"
    "Explain in your own words, step by step, why this solution is right.<|im_end|>\n"
    "<|im_start|>assistant\n"
)
TRANSITION_TEXT = (
    "<|im_end|>\n"
    "<|im_start|>user\n"
    "After understanding the reference solution, please try to solve this problem using your own approach below.\n"
    "Derive every step yourself; do not copy or paraphrase the reference solution.\n\n"
    "Please reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
    "<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def configure(**settings):
    defaults = {"output_dir": "unused", "per_device_train_batch_size": 24, "max_reasoning_length": 40}
    return OPSDConfig(**(CPU | OPSD | defaults | settings))


class Sampler:
    """Stands for the teacher: writes the same text behind each prompt, and keeps what it was asked."""

    def __init__(self, tokenizer, text):
        self.ids, self.calls = tokenizer(text, add_special_tokens=False).input_ids, []

    def __call__(self, prompts):
        self.calls.append(prompts)
        return [list(self.ids) for _ in prompts]


@pytest.fixture
def teach(tokenizer):
    """A function that gives the batch that `Lessons` makes of completions, given as texts; and the lessons themselves."""

    def teach(rows, texts, group_size=None, rationalizer=None, **settings):
        group_size = len(rows) if group_size is None else group_size
        args = configure(num_generations=group_size, **settings)
        collator = OPSDTrainer.make_collator(tokenizer, args)
        lessons = Lessons(args, collator, tokenizer.convert_tokens_to_ids([END, "<|endoftext|>"]), rationalizer)
        completions = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        return lessons(collator([row | collator.encode(row) for row in rows]), completions, group_size), lessons

    return teach


def teacher_prompts(batch):
    rows = zip(batch.teacher_prompt_ids, batch.teacher_prompt_mask, strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in rows]


def box(answer, text=""):
    return f"{text}\\boxed{{{answer}}}{END}"


# Verification


@pytest.mark.parametrize(
    ("usable", "group_size", "expected"),
    [
        ([True, True, True], 3, [1, 2, 0]),  # the next one, and round the circle
        ([True, False, False, True], 4, [3, 3, 3, 0]),
        ([False, True, False], 3, [1, None, 1]),  # never itself
        ([False, False], 2, [None, None]),
        ([True, False, False, True], 2, [None, 0, 3, None]),  # not beyond the group
        ([True], 1, [None]),
        ([], 4, []),
    ],
)
def test_siblings(usable, group_size, expected):
    assert pick_correct_peers(usable, group_size) == expected


def test_advantages_against_numpy():
    correct = [True, False, False, True, True, True, True, False, True, True, True, True, False, False, False, False]
    rewards = np.array(correct, dtype=float).reshape(4, 4)
    expected = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)
    advantages = group_advantages(correct, 4)
    assert advantages == pytest.approx(expected.ravel().tolist())
    assert advantages[0] > 0.0 > advantages[1]
    assert advantages[8:] == [0.0] * 8  # all right, all wrong


def test_what_has_no_answer_is_left_out_of_the_advantages():
    with_gaps = group_advantages([True, None, False, False], 4)
    assert with_gaps[1] == 0.0
    assert [with_gaps[i] for i in (0, 2, 3)] == pytest.approx(group_advantages([True, False, False], 3))
    assert group_advantages([None, True, None, None], 2) == [0.0] * 4


@pytest.mark.parametrize(
    ("completion", "reference"),
    [
        ("So \\boxed{5}", "So \\boxed{5}"),
        ("<think>\nWell.\n</think>\n\nSo \\boxed{5} ", "So \\boxed{5}"),
        ("<think>a</think>b</think>\nc", "c"),
        ("<think>\nnever ends", "<think>\nnever ends"),
    ],
)
def test_reference_of_a_completion(completion, reference):
    assert as_reference(completion) == reference


def test_verifier():
    completions = [r"so \boxed{46}", r"so \boxed{47}", "so 46", r"\boxed{46.0}", r"\boxed{46}", r"\boxed{46}"]
    verifier = Verifier(thinking=False)
    assert verifier(completions, ["46", "46", "46", "46", None, " "]) == [True, False, False, True, None, None]


@pytest.mark.parametrize(("thinking", "unfinished"), [(False, True), (True, False)])
def test_thoughts_that_have_not_ended_have_no_answer_in_thinking_mode(thinking, unfinished):
    verifier = Verifier(thinking)
    completions = [r"\boxed{46}", r"\boxed{47}</think>\boxed{46}", r"\boxed{46}</think>\boxed{47}"]
    assert verifier(completions, ["46"] * 3) == [unfinished, True, False]


# Lessons


def test_weights_follow_the_grades(teach):
    unknown = FIRST | {"problem": "1+1", "answer": None}
    batch, lessons = teach(
        [FIRST, FIRST, unknown, unknown],
        [box(46), box(64), box(2), box(3)],
        group_size=2,
        correct_weight=0.25,
        incorrect_weight=2.0,
    )
    assert batch["correct"] == [True, False, None, None]
    assert batch.weights.tolist() == [0.25, 2.0, 1.0, 1.0] and batch.weights.dtype == torch.float32
    assert "advantages" not in batch and "rationalization" not in batch
    assert lessons.sums == {
        "rewards/accuracy/mean": [1, 2],
        "rewards/ungraded_ratio": [2, 4],
        "groups/none_correct_ratio": [0, 1],
        "groups/all_correct_ratio": [0, 1],
    }


def test_advantages_are_those_of_the_groups(teach):
    batch, _ = teach(
        [FIRST] * 2 + [SECOND] * 2, [box(46), box(1), box(50), box(50)], group_size=2, policy_gradient_weight=0.5
    )
    assert batch.advantages.tolist() == pytest.approx(group_advantages([True, False, True, True], 2))
    assert batch.weights.tolist() == [1.0] * 4


def test_nothing_is_graded_without_need(teach):
    batch, lessons = teach([FIRST] * 2, [box(46), box(1)])
    assert lessons.verifier is None and not {"correct", "weights", "advantages"} & set(batch)


def test_teacher_sees_a_sibling(teach, tokenizer):
    """The text of another right rollout that has ended, without its thoughts and special tokens; never its own."""
    texts = [box(46, "one "), box(46, "<think>\nhm\n</think>\n\ntwo "), "cut \\boxed{46}", box(45, "wrong ")]
    batch, lessons = teach([FIRST] * 4, texts, teacher_reference="rollout")
    collator = lessons.collator
    references = ["two \\boxed{46}", "one \\boxed{46}", "one \\boxed{46}", "one \\boxed{46}"]
    expected = [collator.encode_teacher(FIRST["problem"], text)["teacher_prompt_ids"] for text in references]
    assert teacher_prompts(batch) == expected
    assert batch.weights.tolist() == [1.0] * 4
    prompt = tokenizer.decode(teacher_prompts(batch)[0])
    assert "begins ---\ntwo \\boxed{46}\n---" in prompt and "hm" not in prompt and FIRST["solution"] not in prompt
    assert lessons.sums["references/correct_peer_ratio"] == [4, 4] and lessons.sums["references/none_ratio"] == [0, 4]
    assert lessons.sums["rewards/accuracy/mean"] == [3, 4]


def test_groups_do_not_mix(teach, tokenizer):
    texts = [box(1), box(46, "first "), box(50, "second "), box(1)]
    batch, _ = teach([FIRST] * 2 + [SECOND] * 2, texts, group_size=2, teacher_reference="rollout")
    first, own, other_own, second = map(tokenizer.decode, teacher_prompts(batch))
    assert "Problem: 12+34\n" in first and "first \\boxed{46}" in first
    assert "Problem: 20+30\n" in second and "second \\boxed{50}" in second
    assert "reference" not in own and "reference" not in other_own
    assert batch.weights.tolist() == [1.0, 0.0, 0.0, 1.0]  # what alone is right has nothing to learn from


@pytest.mark.parametrize(
    ("fallback", "answer", "reference"),
    [
        ("skip", "46", None),
        ("solution", "46", FIRST["solution"]),
        ("answer", "46", "\\boxed{46}"),
        ("answer", None, None),
    ],
)
def test_without_a_sibling(teach, fallback, answer, reference):
    """One rollout is right and cut off, the other wrong: neither is a reference."""
    batch, lessons = teach(
        [FIRST | {"answer": answer}] * 2,
        ["cut \\boxed{46}", box(7)],
        teacher_reference="rollout",
        reference_fallback=fallback,
        incorrect_weight=3.0,
    )
    has_reference = reference is not None
    assert lessons.sums["references/none_ratio"] == [0 if has_reference else 2, 2]
    assert batch.weights.tolist() == ([1.0, 3.0] if has_reference else [0.0, 0.0])
    if has_reference:
        expected = lessons.collator.encode_teacher(FIRST["problem"], reference)["teacher_prompt_ids"]
        assert teacher_prompts(batch) == [expected] * 2


def test_without_solutions_in_the_data(teach):
    row = {name: FIRST[name] for name in ("problem", "answer")}
    batch, lessons = teach([row] * 2, [box(46), box(1)], teacher_reference="rollout")
    sibling = lessons.collator.encode_teacher("12+34", "\\boxed{46}")["teacher_prompt_ids"]
    assert teacher_prompts(batch)[1] == sibling and batch.weights.tolist() == [0.0, 1.0]


def test_long_references_are_cut_or_skipped(teach, tokenizer):
    """The same budget as for solutions: the middle goes, and with less than a quarter left all of it."""
    texts = [box(46, "begin " + "12+34=46. " * 100), box(1)]
    settings = {"teacher_reference": "rollout", "max_completion_length": 40}
    batch, _ = teach([FIRST] * 2, texts, max_length=800, **settings)
    text = tokenizer.decode(teacher_prompts(batch)[1])
    assert ELLIPSIS in text and "begin 12+34" in text and len(teacher_prompts(batch)[1]) <= 760
    assert batch.weights.tolist() == [0.0, 1.0]
    batch, lessons = teach([FIRST] * 2, texts, max_length=250, **settings)
    assert batch.weights.tolist() == [0.0, 0.0] and lessons.sums["references/none_ratio"] == [2, 2]


# Rationalizations


def test_teachers_prompt_is_what_was_sampled_token_by_token(teach, tokenizer):
    sampler = Sampler(tokenizer, f"<think>\nten and\n</think>six{END}")
    sampler.ids[-1:-1] = tokenizer.convert_tokens_to_ids(list("assistant"))  # which the tokenizer would merge
    rationalizer = Rationalizer(sampler, [tokenizer.convert_tokens_to_ids(END)])
    batch, lessons = teach([FIRST, FIRST, SECOND], [box(1)] * 3, 1, rationalizer, reason_first=True)
    collator = lessons.collator
    reasoning = [collator.encode(row)["reasoning_prompt_ids"] for row in (FIRST, SECOND)]
    assert sampler.calls == [reasoning]  # equal prompts once
    written = sampler.ids[:-1]
    assert tokenizer.encode(tokenizer.decode(written), add_special_tokens=False) != written
    assert teacher_prompts(batch) == [reasoning[i] + written + collator.transition_ids for i in (0, 0, 1)]
    assert tokenizer.convert_tokens_to_ids("<think>") in written
    assert batch["rationalization"] == ["<think>\nten and\n</think>sixassistant"] * 3
    assert rationalizer.num_tokens == 2 * len(sampler.ids)  # the end is sampled, too
    assert lessons.sums == {
        "rationales/mean_length": [3 * len(written), 3],
        "rationales/clipped_ratio": [0, 3],
        "rationales/empty_ratio": [0, 3],
        "rationales/cached_ratio": [0, 3],
    }


@pytest.mark.parametrize("text", [END, f" \n\n{END}", " \n"])
def test_empty_rationalizations_leave_the_prompt(teach, tokenizer, text):
    rationalizer = Rationalizer(Sampler(tokenizer, text), [tokenizer.convert_tokens_to_ids(END)])
    batch, lessons = teach([FIRST, SECOND], [box(1)] * 2, 1, rationalizer, reason_first=True)
    plain = [lessons.collator.encode(row)["teacher_prompt_ids"] for row in (FIRST, SECOND)]
    assert teacher_prompts(batch) == plain
    assert lessons.sums["rationales/empty_ratio"] == [2, 2]


def test_rationalizations_that_are_cut_off_are_closed(teach, tokenizer):
    rationalizer = Rationalizer(Sampler(tokenizer, "because ten"), [tokenizer.convert_tokens_to_ids(END)])
    batch, lessons = teach([FIRST], [box(1)], 1, rationalizer, reason_first=True)
    text = tokenizer.decode(teacher_prompts(batch)[0])
    assert text == REASONING_TEXT + NO_THINKING + "because ten" + TRANSITION_TEXT + NO_THINKING
    assert lessons.sums["rationales/clipped_ratio"] == [1, 1]


@pytest.mark.parametrize("reasoning_thinking", [False, True])
@pytest.mark.parametrize("teacher_thinking", [False, True])
@pytest.mark.parametrize("teacher_prefill", ["", "<think>\n"])
def test_conversation(teach, tokenizer, reasoning_thinking, teacher_thinking, teacher_prefill):
    rationalizer = Rationalizer(Sampler(tokenizer, f"because{END}"), [tokenizer.convert_tokens_to_ids(END)])
    settings = {"reasoning_thinking": reasoning_thinking, "teacher_thinking": teacher_thinking}
    settings |= {"teacher_prefill": teacher_prefill}
    batch, _ = teach([FIRST], [box(1)], 1, rationalizer, reason_first=True, **settings)
    text = REASONING_TEXT + ("" if reasoning_thinking else NO_THINKING) + "because"
    text += TRANSITION_TEXT + ("" if teacher_thinking else NO_THINKING) + teacher_prefill
    assert tokenizer.decode(teacher_prompts(batch)[0]) == text


def test_rollouts_are_rationalized_and_what_has_no_reference_is_not(teach, tokenizer):
    sampler = Sampler(tokenizer, f"because{END}")
    rationalizer = Rationalizer(sampler, [tokenizer.convert_tokens_to_ids(END)])
    batch, lessons = teach(
        [FIRST] * 3,
        [box(46, "one "), box(1), box(2)],
        None,
        rationalizer,
        reason_first=True,
        teacher_reference="rollout",
    )
    ((prompt,),) = sampler.calls
    assert "begins ---\none \\boxed{46}\n---" in tokenizer.decode(prompt)
    assert batch["rationalization"] == ["", "because", "because"] and batch.weights.tolist() == [0.0, 1.0, 1.0]
    transition_ids = lessons.collator.transition_ids
    assert teacher_prompts(batch)[1:] == [prompt + sampler.ids[:-1] + transition_ids] * 2
    assert lessons.sums["rationales/mean_length"][1] == 2


def test_template_that_rewrites_the_assistants_turn_is_refused(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content']", "(message['content'] | replace('=', ''))"
    )
    SelfDistillationDataCollator(tokenizer)
    with pytest.raises(
        ValueError, match="--reason_first: the chat template of .* does not write an assistant's turn as"
    ):
        SelfDistillationDataCollator(tokenizer, reason_first=True)


def test_cached_rationalizations_are_not_sampled_again(tokenizer, tmp_path):
    end = tokenizer.convert_tokens_to_ids(END)
    prompts = [[1, 2, 3], [4, 5]]

    def make(text, *key):
        sampler = Sampler(tokenizer, text)
        return sampler, Rationalizer(sampler, [end], RationalizationCache(tmp_path / "cache", key))

    sampler, first = make(f"because{END}", "model", {"temperature": 0.7})
    written = first(prompts)
    assert written == [Rationalization(sampler.ids[:-1], False, False)] * 2
    sampler, second = make("another", "model", {"temperature": 0.7})
    assert second([*prompts, [6]]) == [r._replace(is_cached=True) for r in written] + [(sampler.ids, True, False)]
    assert sampler.calls == [[[6]]] and second.num_tokens == len(sampler.ids)
    assert second([[6], [6]]) == [Rationalization(sampler.ids, True, True)] * 2
    assert sampler.calls == [[[6]], []]  # called all the same: other processes may have prompts
    for key in (("model", {"temperature": 0.8}), ("another model", {"temperature": 0.7})):
        sampler, other = make("another", *key)
        assert [r.is_cached for r in other(prompts)] == [False, False] and sampler.calls == [prompts]


def test_writers_of_the_cache_do_not_collide(tmp_path):
    """Two write the same prompt all the time, with contents of different lengths, and a third one reads."""
    ids = [list(range(10)), list(range(5000))]
    caches = [RationalizationCache(tmp_path, ["model"]) for _ in range(3)]
    caches[0].put([1], Rationalization(ids[0], False, False))

    def write(cache, own):
        for _ in range(40):
            cache.put([1], Rationalization(own, False, False))

    threads = [threading.Thread(target=write, args=pair) for pair in zip(caches, ids, strict=False)]
    for thread in threads:
        thread.start()
    num_reads = 0
    while any(thread.is_alive() for thread in threads) or num_reads < 10:
        read = caches[2].get([1])
        assert read.is_cached and read.ids in ids
        num_reads += 1
    assert len(list(tmp_path.iterdir())) == 1  # nothing temporary is left


# The collator


def test_rationalization_and_transition_fit_behind_a_long_solution(tokenizer):
    long = FIRST | {"solution": "begin " + "12+34=46. " * 200 + "\\boxed{46}."}
    settings = {"reason_first": True, "max_reasoning_length": 100}
    whole = SelfDistillationDataCollator(tokenizer, **settings).encode(long)
    collator = SelfDistillationDataCollator(tokenizer, **settings, max_prompt_length=1300)
    encoded = collator.encode(long)
    assert encoded["length_status"] == "shortened"
    reserved = 100 + len(collator.transition_ids)
    length = len(encoded["reasoning_prompt_ids"])
    assert len(whole["reasoning_prompt_ids"]) > 1300 and 1260 < length + reserved <= 1300
    assert 1260 < len(encoded["teacher_prompt_ids"]) <= 1300  # without a rationalization it has all of the room
    text = tokenizer.decode(encoded["reasoning_prompt_ids"])
    before, after = REASONING_TEXT.split(FIRST["solution"])
    assert text.startswith(before + "begin") and text.endswith("\\boxed{46}." + after + NO_THINKING)
    assert text.count(ELLIPSIS) == 1


def test_example_whose_rationalization_does_not_fit_is_dropped(tokenizer):
    plain = SelfDistillationDataCollator(tokenizer, max_prompt_length=400)
    example = FIRST | {"problem": "12+34" + "+1" * 20}
    assert plain.encode(example)["length_status"] == "kept"
    with pytest.raises(ValueError, match="--max_reasoning_length 350: .* leaves 32 for --reasoning_prompt"):
        SelfDistillationDataCollator(tokenizer, reason_first=True, max_reasoning_length=350, max_prompt_length=400)
    collator = SelfDistillationDataCollator(
        tokenizer, reason_first=True, max_reasoning_length=300, max_prompt_length=400
    )
    assert collator.encode(FIRST)["length_status"] == "kept"
    encoded = collator.encode(example)
    assert encoded.pop("length_status") == "dropped"
    assert encoded == {"student_prompt_ids": [], "teacher_prompt_ids": [], "reasoning_prompt_ids": []}


@pytest.mark.parametrize(
    "row", [{"problem": "12+34"}, {"problem": "12+34", "solution": None}], ids=["left out", "none"]
)
def test_examples_without_a_solution_have_the_students_prompt(tokenizer, row):
    encoded = SelfDistillationDataCollator(tokenizer, reason_first=True).encode(row)
    assert encoded["teacher_prompt_ids"] == encoded["student_prompt_ids"] != []
    assert "reasoning_prompt_ids" not in encoded and encoded["length_status"] == "kept"


def test_texts_come_along_where_the_examples_have_them(tokenizer):
    collator = SelfDistillationDataCollator(tokenizer, reason_first=True)
    batch = collator([row | collator.encode(row) for row in (FIRST, SECOND)])
    assert batch["problem"] == ["12+34", "20+30"] and batch["answer"] == ["46", "50"]
    assert batch["solution"] == [FIRST["solution"], SECOND["solution"]]
    assert tokenizer.decode(batch["reasoning_prompt_ids"][0]) == REASONING_TEXT + NO_THINKING
    plain = SelfDistillationDataCollator(tokenizer)
    assert not {"solution", "answer", "reasoning_prompt_ids"} & set(plain([plain.encode({"problem": "1+1"})]))


# Settings


GROUP = {"num_generations": 4}


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"max_reasoning_length": 0}, "max_reasoning_length"),
        ({"reasoning_temperature": 0.0}, "reasoning_temperature"),
        ({"reasoning_top_p": 0.0}, "reasoning_top_p"),
        ({"reasoning_top_p": 1.1}, "reasoning_top_p"),
        ({"reasoning_top_k": -1}, "reasoning_top_k"),
        ({"reason_first": True, "teacher_sees_solution": False}, "reason_first"),
        ({"reasoning_cache": "x", "fixed_teacher": True}, "reasoning_cache"),
        ({"reasoning_cache": "x", "reason_first": True}, "reasoning_cache"),
        (
            {"reasoning_cache": "x", "reason_first": True, "fixed_teacher": True, "teacher_reference": "rollout"}
            | GROUP,
            "reasoning_cache",
        ),
        ({"teacher_reference": "answer"} | GROUP, "teacher_reference"),
        ({"teacher_reference": "rollout"}, "teacher_reference"),
        ({"teacher_reference": "rollout", "teacher_sees_solution": False} | GROUP, "teacher_reference"),
        ({"teacher_reference": "rollout", "max_length": None} | GROUP, "teacher_reference"),
        ({"teacher_reference": "rollout", "eval_strategy": "steps"} | GROUP, "eval_strategy"),
        ({"teacher_reference": "rollout", "eval_on_start": True} | GROUP, "eval_strategy"),
        ({"reference_fallback": "fail"}, "reference_fallback"),
        ({"reference_fallback": "solution"}, "reference_fallback"),
        ({"incorrect_weight": -1.0}, "incorrect_weight"),
        ({"correct_weight": -1.0}, "correct_weight"),
        ({"correct_weight": float("inf")}, "correct_weight"),
        ({"incorrect_weight": float("nan")}, "incorrect_weight"),
        ({"correct_weight": 0.0, "incorrect_weight": 0.0}, "incorrect_weight"),
        ({"policy_gradient_weight": -0.1} | GROUP, "policy_gradient_weight"),
        ({"policy_gradient_weight": 1.0}, "policy_gradient_weight"),
        ({"curriculum": "length"}, "curriculum"),
        (
            {"vllm_importance_sampling_correction": True, "use_tinker_loss": True},
            "vllm_importance_sampling_correction",
        ),
        ({"vllm_importance_sampling_correction": True, "use_vllm": True}, "vllm_importance_sampling_correction"),
        (
            {
                "vllm_importance_sampling_correction": True,
                "use_vllm": True,
                "use_tinker_loss": True,
                "vllm_mode": "server",
            },
            "vllm_importance_sampling_correction",
        ),
        ({"num_generations": 5}, "num_generations"),
        ({"num_generations": 0}, "num_generations"),
    ],
)
def test_settings_that_are_refused(settings, flag):
    with pytest.raises(ValueError, match=rf"^--{flag} \S+: must "):
        configure(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reasoning_prompt": "{problem}"}, r"^--reasoning_prompt lacks the placeholder \{solution\}"),
        ({"transition_prompt": "Now {problem}"}, r"^--transition_prompt has the unknown placeholder \{problem\}"),
    ],
)
def test_templates_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        configure(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"correct_weight": 0.0, "incorrect_weight": 0.0, "policy_gradient_weight": 1.0} | GROUP,  # the reward alone
        {"reason_first": True, "reasoning_cache": "x", "fixed_teacher": True},
        {"reason_first": True, "teacher_reference": "rollout"} | GROUP,
        {"vllm_importance_sampling_correction": True, "use_vllm": True, "policy_gradient_weight": 1.0} | GROUP,
        {"num_generations": 8, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    ],
)
def test_settings_that_go_together(settings):
    configure(**settings)


SOLUTION, ANSWER = {"solution_column": "solution"}, {"answer_column": "key"}


@pytest.mark.parametrize(
    ("settings", "needed", "further"),
    [
        ({}, SOLUTION, ANSWER),
        ({"teacher_sees_solution": False}, {}, ANSWER),
        ({"verify_rollouts": True}, SOLUTION | ANSWER, {}),
        ({"correct_weight": 0.0}, SOLUTION | ANSWER, {}),
        ({"incorrect_weight": 2.0}, SOLUTION | ANSWER, {}),
        ({"policy_gradient_weight": 1.0} | GROUP, SOLUTION | ANSWER, {}),
        ({"curriculum": "pass_rate"}, SOLUTION | ANSWER, {}),
        ({"curriculum": "divergence"}, SOLUTION, ANSWER),
        ({"teacher_reference": "rollout"} | GROUP, ANSWER, {}),
        ({"teacher_reference": "rollout", "reference_fallback": "answer"} | GROUP, ANSWER, {}),
        ({"teacher_reference": "rollout", "reference_fallback": "solution"} | GROUP, SOLUTION | ANSWER, {}),
    ],
)
def test_columns_that_the_settings_need(settings, needed, further):
    args = OPSDArguments(dataset_name="x", answer_column="key")
    assert needed_columns(args, configure(**settings)) == ({"problem_column": "problem"} | needed, further)
    nameless = OPSDArguments(dataset_name="x")
    if further:
        assert needed_columns(nameless, configure(**settings))[1] == {"answer_column": None}
    else:
        flag, value = next(iter(settings.items()))
        with pytest.raises(ValueError, match=rf"--{flag} {value}.*: rollouts are graded .*--answer_column"):
            needed_columns(nameless, configure(**settings))
