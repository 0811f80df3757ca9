"""The teacher's context: what it sees, what it writes first, how much each graded rollout counts; refused settings."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from helpers import (
    CPU,
    EMA,
    LOGPROB_GAP,
    OPSD,
    Recorder,
    copies,
    is_right,
    perturb_student,
    rollout,
    saved_rollouts,
    script_rollouts,
    work_out,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_collator import ELLIPSIS, SelfDistillationDataCollator, start_rollouts
from opsd.contexts import CONTEXTS, TEACHER_CONTEXTS, donated_solutions
from opsd.metrics import Metrics
from opsd.rewards import group_advantages
from opsd.rollouts import Completion
from opsd.teacher_context import TeacherContext
from opsd_train import OPSDArguments, needed_columns
from opsd_trainer import OPSDConfig

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


class Writer:
    """Stands for the sampler: writes the same text after each prompt, and keeps what it was asked."""

    def __init__(self, tokenizer, text):
        self.ids = tokenizer(text, add_special_tokens=False).input_ids
        self.calls, self.settings = [], []

    def sample(self, prompts, **settings):
        self.calls.append(prompts)
        self.settings.append(settings)
        return [Completion(list(self.ids), None) for _ in prompts]


class Sums(Metrics):
    """Keeps the sum and the number of the values of each mean."""

    def __init__(self):
        super().__init__(Accelerator(cpu=True))
        self.sums = {}

    def add(self, name, total, count):
        sums = self.sums.setdefault(name, [0.0, 0.0])
        sums[0], sums[1] = sums[0] + total, sums[1] + count


BASE = SimpleNamespace(is_base=True, weights=None, server=None, active=lambda model: nullcontext())  # a teacher


@pytest.fixture
def build(tokenizer):
    """A function that builds the context of completions, given as texts: rollouts, the context, sums of metrics."""

    def build(rows, texts, group_size=None, writer=None, teacher=BASE, **settings):
        group_size = len(rows) if group_size is None else group_size
        args = configure(num_generations=group_size, **settings)
        collator = SelfDistillationDataCollator(tokenizer, **args.collator_settings)
        end_ids = tokenizer.convert_tokens_to_ids([END, "<|endoftext|>"])
        metrics = Sums()
        context = TeacherContext(args, collator, writer, teacher, metrics, end_ids)
        rollouts = start_rollouts([row | collator.encode(row) for row in rows])
        for completed, text in zip(rollouts, texts, strict=True):
            completed.completion_ids = tokenizer(text, add_special_tokens=False).input_ids
            completed.is_truncated = not set(completed.completion_ids) & set(end_ids)
        context.build(rollouts, group_size, model=None)
        return rollouts, context, metrics.sums

    return build


def teacher_prompts(rollouts):
    return [rollout.teacher_prompt_ids for rollout in rollouts]


def weights(rollouts):
    return [rollout.weight for rollout in rollouts]


def box(answer, text=""):
    return f"{text}\\boxed{{{answer}}}{END}"


# Weights and advantages


def test_weights_follow_the_grades(build):
    unknown = FIRST | {"problem": "1+1", "answer": None}
    rollouts, context, sums = build(
        [FIRST, FIRST, unknown, unknown],
        [box(46), box(64), box(2), box(3)],
        group_size=2,
        correct_weight=0.25,
        incorrect_weight=2.0,
    )
    assert [rollout.is_correct for rollout in rollouts] == [True, False, None, None]
    batch = context.collator(rollouts)
    assert batch.weights.tolist() == [0.25, 2.0, 1.0, 1.0] and batch.weights.dtype == torch.float32
    assert batch.advantages.tolist() == [0.0] * 4
    assert all(rollout.rationale_ids is None for rollout in rollouts)
    assert sums == {
        "rewards/accuracy/mean": [1, 2],
        "rewards/ungraded_ratio": [2, 4],
        "frac_reward_zero_std": [0, 1],  # of the groups with grades
    }


def test_groups_of_equal_rewards_are_counted(build):
    """All right, none right, mixed, not graded, and a right one beside one that is not graded."""
    unknown = FIRST | {"answer": None}
    rows = [FIRST] * 6 + [unknown] * 2 + [FIRST, unknown]
    texts = [box(46), box(46), box(1), box(2), box(46), box(1), box(46), box(1), box(46), box(46)]
    _, _, sums = build(rows, texts, group_size=2, verify_rollouts=True)
    assert sums["frac_reward_zero_std"] == [3, 4]


def test_advantages_are_those_of_the_groups(build):
    rollouts, context, _ = build(
        [FIRST] * 2 + [SECOND] * 2, [box(46), box(1), box(50), box(50)], group_size=2, policy_gradient_weight=0.5
    )
    advantages = context.collator(rollouts).advantages
    assert advantages.tolist() == pytest.approx(group_advantages([True, False, True, True], 2))
    assert weights(rollouts) == [1.0] * 4


def test_rollouts_are_graded_without_changing_the_loss(build):
    """A problem without an answer is not graded, and not wrong; one rollout of a problem is no group."""
    rows, texts = (
        [FIRST, SECOND, FIRST | {"answer": None}, SECOND | {"answer": " "}],
        [box(46), box(1), box(46), box(1)],
    )
    rollouts, context, sums = build(rows, texts, group_size=1, verify_rollouts=True)
    assert [graded.is_correct for graded in rollouts] == [True, False, None, None]
    assert context.collator(rollouts).weights.tolist() == [1.0] * 4
    assert sums == {"rewards/accuracy/mean": [1, 2], "rewards/ungraded_ratio": [2, 4]}


def test_rollouts_without_boxes_are_graded_as_the_evaluator_can(build):
    texts = ["It is 46.", "46 or 64", box(46)]
    rollouts, _, _ = build([FIRST] * 3, texts, verify_rollouts=True, extract="last_number")
    assert [rollout.is_correct for rollout in rollouts] == [True, False, True]


def test_nothing_is_graded_without_need(build):
    rollouts, context, sums = build([FIRST] * 2, [box(46), box(1)])
    assert context.verifier is None and sums == {}
    for plain in rollouts:
        assert (plain.is_correct, plain.weight, plain.advantage) == (None, 1.0, 0.0)
        assert plain.teacher_prompt_ids == context.collator.encode(FIRST)["teacher_prompt_ids"]


# References


def test_teacher_sees_a_correct_peer(build, tokenizer):
    """The text of another right rollout that has ended, without its thoughts and special tokens; never its own."""
    texts = [box(46, "one "), box(46, "<think>\nhm\n</think>\n\ntwo "), "cut \\boxed{46}", box(45, "wrong ")]
    rollouts, context, sums = build([FIRST] * 4, texts, teacher_context="rollout")
    references = ["two \\boxed{46}", "one \\boxed{46}", "one \\boxed{46}", "one \\boxed{46}"]
    encode = context.collator.encode_teacher
    expected = [encode(FIRST["problem"], text)["teacher_prompt_ids"] for text in references]
    assert teacher_prompts(rollouts) == expected
    assert weights(rollouts) == [1.0] * 4
    prompt = tokenizer.decode(rollouts[0].teacher_prompt_ids)
    assert "begins ---\ntwo \\boxed{46}\n---" in prompt and "hm" not in prompt and FIRST["solution"] not in prompt
    assert sums["references/peer_ratio"] == [4, 4] and sums["references/none_ratio"] == [0, 4]
    assert sums["rewards/accuracy/mean"] == [3, 4]


def test_shortest_and_wrong_peers(build, tokenizer):
    """The shortest right one, never its own; a wrong one under the same template, and where there is none nothing."""
    texts = [box(46, "a long way to "), box(46), box(45), "cut \\boxed{44}"]
    rollouts, _, _ = build([FIRST] * 4, texts, teacher_context="shortest_rollout")
    assert [rollout.reference for rollout in rollouts] == [r"\boxed{46}", r"a long way to \boxed{46}"] + [
        r"\boxed{46}"
    ] * 2
    rollouts, context, sums = build([FIRST] * 4, texts, teacher_context="wrong_hint")
    assert [rollout.reference for rollout in rollouts] == [r"\boxed{45}", r"\boxed{45}", None, r"\boxed{45}"]
    assert weights(rollouts) == [1.0, 1.0, 0.0, 1.0] and sums["references/none_ratio"] == [1, 4]
    expected = context.collator.encode(FIRST | {"solution": r"\boxed{45}"})["teacher_prompt_ids"]
    assert rollouts[0].teacher_prompt_ids == expected


SHOWN = (
    "Problem: {problem}\n\n"
    "Here is a reference solution:\n"
    "--- reference solution begins ---\n"
    "{reference}\n"
    "--- reference solution ends ---\n\n"
)


@pytest.mark.parametrize(
    ("name", "begin", "reference"),
    [
        ("solution", SHOWN, FIRST["solution"]),
        ("answer", SHOWN, "\\boxed{46}"),
        ("donor", SHOWN, SECOND["solution"]),
        ("reference_only", SHOWN.partition("\n\n")[2], FIRST["solution"]),
    ],
)
def test_what_the_teacher_sees_of_the_data(tokenizer, name, begin, reference):
    """The user's turn of its prompt, word by word; the same problem twice, which is no donor for itself."""
    tutor = {"role": "system", "content": "You add."}
    history = [tutor, {"role": "user", "content": "Ready?"}, {"role": "assistant", "content": "Yes."}]
    rows = Dataset.from_list([row | {"history": history} for row in (FIRST, FIRST, SECOND)])
    collator = SelfDistillationDataCollator(tokenizer, **configure(teacher_context=name).collator_settings)
    encoded = collator.encode_dataset(rows, "train")
    prompt = tokenizer.decode(encoded[0]["teacher_prompt_ids"])
    *turns, last = prompt.removesuffix("<|im_end|>\n<|im_start|>assistant\n" + NO_THINKING).split("<|im_start|>user\n")
    content = begin.replace("{problem}", "12+34").replace("{reference}", reference)
    assert last == content + TRANSITION_TEXT.split("user\n")[1].split("<|im_end|>")[0]
    assert turns[0] == "<|im_start|>system\nYou add.<|im_end|>\n"
    assert len(turns) == (1 if name == "reference_only" else 2)  # of the problem's conversation it sees nothing
    (started,) = start_rollouts([encoded[0]])
    assert started.reference == reference and "reference" not in tokenizer.decode(encoded[0]["student_prompt_ids"])


def test_teacher_that_sees_no_more_has_the_students_prompt(tokenizer):
    collator = SelfDistillationDataCollator(tokenizer, **configure(teacher_context="none").collator_settings)
    (row,) = collator.encode_dataset(Dataset.from_list([{"problem": "1+1"}]), "train")
    assert row["teacher_prompt_ids"] == row["student_prompt_ids"]


def test_each_choice_is_in_the_registry():
    assert tuple(CONTEXTS) == TEACHER_CONTEXTS


def test_donors_are_seeded_and_others():
    rows = Dataset.from_list([{"problem": str(i // 2), "solution": f"s{i // 2}"} for i in range(20)])
    first = donated_solutions(1, rows)
    assert first == donated_solutions(1, rows) != donated_solutions(2, rows)
    assert all(donated != own for donated, own in zip(first, rows["solution"], strict=True))
    with pytest.raises(ValueError, match="--teacher_context donor: no other row has another problem"):
        donated_solutions(1, rows.select([0, 1]))


def test_groups_do_not_mix(build, tokenizer):
    texts = [box(1), box(46, "first "), box(50, "second "), box(1)]
    rollouts, _, _ = build([FIRST] * 2 + [SECOND] * 2, texts, group_size=2, teacher_context="rollout")
    first, own, other_own, second = map(tokenizer.decode, teacher_prompts(rollouts))
    assert "Problem: 12+34\n" in first and "first \\boxed{46}" in first
    assert "Problem: 20+30\n" in second and "second \\boxed{50}" in second
    assert "reference" not in own and "reference" not in other_own
    assert weights(rollouts) == [1.0, 0.0, 0.0, 1.0]  # what alone is right has nothing to learn from


def test_turns_before_a_problem_stay_before_each_reference(build, tokenizer):
    """Two groups of the same problem and texts, after other turns."""
    histories = [[{"role": "system", "content": f"You are {name}."}] for name in ("Ann", "Bob")]
    rows = [FIRST | {"history": history} for history in histories for _ in range(2)]
    texts = [box(46, "one "), box(46, "two ")] * 2
    rollouts, context, _ = build(rows, texts, group_size=2, teacher_context="rollout")
    for place, prompt in enumerate(map(tokenizer.decode, teacher_prompts(rollouts))):
        assert prompt.startswith(f"<|im_start|>system\nYou are {('Ann', 'Bob')[place // 2]}.<|im_end|>\n")
        assert (("two", "one")[place % 2] + " \\boxed{46}\n---") in prompt


@pytest.mark.parametrize(
    ("fallback", "answer", "reference"),
    [
        ("skip", "46", None),
        ("solution", "46", FIRST["solution"]),
        ("answer", "46", "\\boxed{46}"),
        ("answer", None, None),
    ],
)
def test_without_a_correct_peer(build, fallback, answer, reference):
    """One rollout is right and cut off, the other wrong: neither is a reference."""
    rollouts, context, sums = build(
        [FIRST | {"answer": answer}] * 2,
        ["cut \\boxed{46}", box(7)],
        teacher_context="rollout",
        reference_fallback=fallback,
        incorrect_weight=3.0,
    )
    has_reference = reference is not None
    assert sums["references/none_ratio"] == [0 if has_reference else 2, 2]
    assert weights(rollouts) == ([1.0, 3.0] if has_reference else [0.0, 0.0])
    if has_reference:
        expected = context.collator.encode_teacher(FIRST["problem"], reference)["teacher_prompt_ids"]
        assert teacher_prompts(rollouts) == [expected] * 2


def test_without_solutions_in_the_data(build):
    row = {name: FIRST[name] for name in ("problem", "answer")}
    rollouts, context, _ = build([row] * 2, [box(46), box(1)], teacher_context="rollout")
    expected = context.collator.encode_teacher("12+34", "\\boxed{46}")["teacher_prompt_ids"]
    assert rollouts[1].teacher_prompt_ids == expected and weights(rollouts) == [0.0, 1.0]


def test_long_references_are_cut_or_skipped(build, tokenizer):
    """The same budget as for solutions: the middle goes, and with less than a quarter left all of it."""
    texts = [box(46, "begin " + "12+34=46. " * 100), box(1)]
    settings = {"teacher_context": "rollout", "max_completion_length": 40}
    rollouts, _, sums = build([FIRST] * 2, texts, max_length=800, **settings)
    prompt_ids = rollouts[1].teacher_prompt_ids
    text = tokenizer.decode(prompt_ids)
    assert ELLIPSIS in text and "begin 12+34" in text and len(prompt_ids) <= 760
    assert weights(rollouts) == [0.0, 1.0] and sums["references/shortened_ratio"] == [1, 2]
    rollouts, _, sums = build([FIRST] * 2, texts, max_length=250, **settings)
    assert weights(rollouts) == [0.0, 0.0] and sums["references/none_ratio"] == [2, 2]


def write_groups(problem, occurrence):
    """Four rollouts of a problem: one right, one right but cut off, one wrong; one right and preceded by a word."""
    return (
        work_out(problem),
        work_out(problem).removesuffix(END) + "So " * 40,
        work_out(problem, is_right=False),
        "So " + work_out(problem),
    )[occurrence % 4]


def test_own_rollouts_as_references_need_no_solutions(make_trainer, problems, tmp_path):
    """The tokens of a rollout count if another one of its group is right; the teacher's prompt shows that one."""
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 4}
    trainer = make_trainer(
        problems.remove_columns("solution"),
        teacher_context="rollout",
        packing=False,  # groups stay together in a micro-batch
        callbacks=[recorder := Recorder()],
        **settings,
    )
    perturb_student(trainer)
    places = {}

    def write(problem, occurrence):
        """In every other group a single rollout is right, which has no other one to learn from."""
        place = places.setdefault(problem, len(places))
        return write_groups(problem, occurrence) if place % 2 else work_out(problem, is_right=occurrence == 0)

    script_rollouts(trainer, write)
    steps = []
    prepare_step = trainer.prepare_step

    def keep(*arguments):
        steps.append(prepare_step(*arguments))
        return steps[-1]

    trainer.prepare_step = keep
    trainer.train()
    num_with_reference = num_right = 0
    for step, micro_batches in enumerate(steps, start=1):
        records = saved_rollouts(tmp_path / "run", step)
        correct = torch.cat([is_right(trainer, inputs) for inputs in micro_batches]).tolist()
        assert [record["correct"] for record in records] == correct
        num_right += sum(correct)
        for place, inputs in enumerate(micro_batches):
            texts = [record["completion"] for record in records[4 * place :]]
            for row in range(4):
                circle = [(row + distance) % 4 for distance in (1, 2, 3)]
                peer = next((i for i in circle if correct[4 * place + i] and texts[i].endswith(END)), None)
                assert inputs.loss_mask[row].any() == (peer is not None)
                if peer is not None:
                    num_with_reference += 1
                    prompt = trainer.processing_class.decode(inputs.teacher_prompt_ids[row])
                    reference = prompt.split("begins ---\n")[1].split("\n---")[0]
                    assert reference == texts[peer].removesuffix(END)
    assert num_with_reference == 3 + 4 + 3 + 4
    assert sum(recorder.values("rewards/accuracy/mean")) * 8 == num_right
    assert sum(recorder.values("references/peer_ratio")) * 8 == pytest.approx(num_with_reference)
    for of_peers, none in zip(
        recorder.values("references/peer_ratio"), recorder.values("references/none_ratio"), strict=True
    ):
        assert of_peers + none == pytest.approx(1.0)
    assert max(recorder.values("loss")) > 0.0


# Rationales


def test_teachers_prompt_is_what_was_sampled_token_by_token(build, tokenizer):
    writer = Writer(tokenizer, f"<think>\nten and\n</think>six{END}")
    writer.ids[-1:-1] = tokenizer.convert_tokens_to_ids(list("assistant"))  # which the tokenizer would merge
    rollouts, context, sums = build([FIRST, FIRST, SECOND], [box(1)] * 3, 1, writer, reason_first=True)
    collator = context.collator
    reasoning = [collator.encode(row)["reasoning_prompt_ids"] for row in (FIRST, SECOND)]
    assert writer.calls == [reasoning]  # equal prompts once
    written = writer.ids[:-1]
    assert tokenizer.encode(tokenizer.decode(written), add_special_tokens=False) != written
    assert teacher_prompts(rollouts) == [reasoning[i] + written + collator.transition_ids for i in (0, 0, 1)]
    assert tokenizer.convert_tokens_to_ids("<think>") in written
    for taught in rollouts:
        assert tokenizer.decode(taught.rationale_ids) == "<think>\nten and\n</think>sixassistant"
    assert context.num_rationale_tokens == 2 * len(writer.ids)  # the end is sampled, too
    assert sums == {
        "rationales/mean_length": [2 * len(written), 2],
        "rationales/clipped_ratio": [0, 2],
        "rationales/empty_ratio": [0, 2],
    }


def test_teacher_writes_with_its_own_weights_and_settings(build, tokenizer):
    """Weights of the teacher's own reach the sampler while they are in place; those of the base are there already."""
    writer, is_active = Writer(tokenizer, END), []

    @contextmanager
    def active(model):
        is_active.append(True)
        yield
        is_active.pop()

    sample, states = writer.sample, []
    writer.sync_weights = lambda: states.append(("sync", *is_active))
    writer.sample = lambda *args, **kwargs: states.append(("sample", *is_active)) or sample(*args, **kwargs)
    for is_base in (True, False):
        teacher = SimpleNamespace(
            is_base=is_base, weights=None if is_base else "an average", server=None, active=active
        )
        settings = {"reasoning_generation_kwargs": {"top_p": 0.5}, "max_reasoning_length": 7}
        build([FIRST], [box(1)], 1, writer, teacher, reason_first=True, **settings)
        sampling = {"temperature": 0.7, "top_p": 0.5, "top_k": 20, "max_tokens": 7}
        assert writer.settings.pop() == {"base": is_base} | sampling
    assert states == [("sample", True), ("sync", True), ("sample", True)]


@pytest.mark.parametrize("text", [END, f" \n\n{END}", " \n"])
def test_empty_rationales_leave_the_prompt(build, tokenizer, text):
    writer = Writer(tokenizer, text)
    rollouts, context, sums = build([FIRST, SECOND], [box(1)] * 2, 1, writer, reason_first=True)
    plain = [context.collator.encode(row)["teacher_prompt_ids"] for row in (FIRST, SECOND)]
    assert teacher_prompts(rollouts) == plain
    assert sums["rationales/empty_ratio"] == [2, 2]


def test_rationales_that_are_cut_off_are_closed(build, tokenizer):
    writer = Writer(tokenizer, "because ten")
    rollouts, _, sums = build([FIRST], [box(1)], 1, writer, reason_first=True)
    text = tokenizer.decode(rollouts[0].teacher_prompt_ids)
    assert text == REASONING_TEXT + NO_THINKING + "because ten" + TRANSITION_TEXT + NO_THINKING
    assert sums["rationales/clipped_ratio"] == [1, 1]


@pytest.mark.parametrize("teacher_thinking", [False, True])
@pytest.mark.parametrize("teacher_prefill", ["", "<think>\n"])
def test_conversation(build, tokenizer, teacher_thinking, teacher_prefill):
    writer = Writer(tokenizer, f"because{END}")
    settings = {"teacher_thinking": teacher_thinking, "teacher_prefill": teacher_prefill}
    rollouts, _, _ = build([FIRST], [box(1)], 1, writer, reason_first=True, **settings)
    text = REASONING_TEXT + NO_THINKING + "because"
    text += TRANSITION_TEXT + ("" if teacher_thinking else NO_THINKING) + teacher_prefill
    assert tokenizer.decode(rollouts[0].teacher_prompt_ids) == text


def test_rationales_are_about_the_peers_and_only_where_there_is_a_reference(build, tokenizer):
    writer = Writer(tokenizer, f"because{END}")
    texts = [box(46, "one "), box(1), box(2)]
    rollouts, context, sums = build([FIRST] * 3, texts, writer=writer, reason_first=True, teacher_context="rollout")
    ((prompt,),) = writer.calls
    assert "begins ---\none \\boxed{46}\n---" in tokenizer.decode(prompt)
    assert [rollout.rationale_ids for rollout in rollouts] == [None, writer.ids[:-1], writer.ids[:-1]]
    assert tokenizer.decode(writer.ids[:-1]) == "because" and weights(rollouts) == [0.0, 1.0, 1.0]
    assert teacher_prompts(rollouts)[1:] == [prompt + writer.ids[:-1] + context.collator.transition_ids] * 2
    assert sums["rationales/mean_length"] == [len(writer.ids) - 1, 1]


def test_rollouts_without_weight_get_no_rationale(build, tokenizer):
    writer = Writer(tokenizer, f"because{END}")
    rollouts, context, _ = build([FIRST, SECOND], [box(46), box(1)], 1, writer, reason_first=True, correct_weight=0.0)
    assert weights(rollouts) == [0.0, 1.0]
    assert writer.calls == [[context.collator.encode(SECOND)["reasoning_prompt_ids"]]]
    assert [rollout.rationale_ids for rollout in rollouts] == [None, writer.ids[:-1]]


def test_sampler_is_called_without_prompts_too(build, tokenizer):
    """All processes call it together, and others may have prompts."""
    writer = Writer(tokenizer, f"because{END}")
    rollouts, context, sums = build(
        [FIRST] * 2, [box(1)] * 2, writer=writer, reason_first=True, teacher_context="rollout"
    )
    assert writer.calls == [[]] and context.num_rationale_tokens == 0
    assert weights(rollouts) == [0.0, 0.0] and sums["rationales/mean_length"] == [0, 0]


GREEDY = 1e-3  # nats: float32 rounds the logits by about 1e-5; another policy was off by 5 to 14 (3 models, 5 seeds)
REASONING = {"reason_first": True, "max_reasoning_length": 16, "temperature": 1.3}
REASONING |= {"reasoning_generation_kwargs": {"top_k": 1}}
PHASES = ("rollout", "teacher", "student", "rationale")


def written_tokens(trainer, inputs, size=3):
    """Pairs of a request and the rationale that was written for it, read from the teacher's prompts."""
    transition_ids = trainer.collator.transition_ids
    pairs = []
    for i in range(size):
        ids = inputs.teacher_prompt_ids[i][inputs.teacher_prompt_mask[i].bool()].tolist()
        example = trainer.train_dataset[i]
        prompt = example["reasoning_prompt_ids"]
        if ids == example["teacher_prompt_ids"]:  # nothing was written
            pairs.append((prompt, []))
            continue
        assert ids[: len(prompt)] == prompt and ids[-len(transition_ids) :] == transition_ids
        pairs.append((prompt, ids[len(prompt) : -len(transition_ids)]))
    return pairs


@torch.no_grad()
def greedy_gap(trainer, model, inputs):
    """
    The largest gap, in nats, between a written token and the one that `model` finds most probable, by plain forward
    passes without padding. A greedy sampler has a gap of 0, or of rounding where two tokens are as good.
    """
    gaps = []
    for prompt, written in written_tokens(trainer, inputs):
        ended = len(written) < trainer.args.max_reasoning_length
        logits = model(torch.tensor([prompt + written])).logits[0, len(prompt) - 1 :]  # (written + 1, V)
        gaps += [(row.max() - row[token]).item() for row, token in zip(logits, written, strict=False)]
        if ended and written:  # by an end-of-sequence token; a rationale without text leaves no trace
            gaps.append((logits[-1].max() - logits[-1][trainer.end_ids].max()).item())
    return max(gaps)


@contextmanager
def own_weights_put_in(trainer):
    """The model with the weights that the teacher has of its own."""
    student = {name: trainer.model.get_parameter(name).detach().clone() for name in copies(trainer)}
    for weights in (copies(trainer), student):
        for name, weight in weights.items():
            trainer.model.get_parameter(name).data.copy_(weight)
        if weights is not student:
            yield trainer.model


def test_rationales_are_the_base_models(make_trainer, tiny_model_dir):
    trainer = make_trainer(callbacks=[recorder := Recorder()], max_steps=1, **REASONING)
    perturb_student(trainer)
    trainer.model.train()
    (inputs,) = rollout(trainer, size=3)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    lengths = [len(written) for _, written in written_tokens(trainer, inputs)]
    assert min(lengths) > 0
    assert greedy_gap(trainer, base, inputs) <= GREEDY
    assert greedy_gap(trainer, trainer.model, inputs) > 100 * GREEDY
    num_tokens = sum(min(length + 1, trainer.args.max_reasoning_length) for length in lengths)  # the end is one, too
    assert trainer.model.training and trainer._run_state["num_rationale_tokens"] == num_tokens
    trainer.metrics.pop()
    trainer.train()
    assert recorder.values("rationales/mean_length")[0] > 0.0
    assert recorder.values("num_rationale_tokens")[0] > num_tokens
    assert all(recorder.values(f"seconds/{phase}")[0] > 0.0 for phase in PHASES)


def test_rationales_are_those_of_the_teachers_own_weights(make_trainer):
    """Teacher, student and base are three policies."""
    settings = EMA | REASONING | {"temperature": 1.0, "lora_settings": {"init_lora_weights": False}}
    trainer = make_trainer(**settings)
    trainer.teacher.start(trainer.model_wrapped, trainer._run_state, None)
    perturb_student(trainer)
    (inputs,) = rollout(trainer, size=3)
    assert greedy_gap(trainer, trainer.model, inputs) > 100 * GREEDY
    with trainer.model.disable_adapter():
        assert greedy_gap(trainer, trainer.model, inputs) > 100 * GREEDY
    with own_weights_put_in(trainer) as teacher:
        assert greedy_gap(trainer, teacher, inputs) <= GREEDY
    assert all(weight.requires_grad == ("lora_" in name) for name, weight in trainer.model.named_parameters())


@pytest.mark.vllm
def test_vllm_writes_rationales_as_the_teacher_and_rollouts_as_the_student(make_trainer, problems):
    trainer = make_trainer(
        use_vllm=True,
        max_steps=3,
        eval_dataset=problems.select(range(4)),
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=2,
        lora_settings={"init_lora_weights": False},
        callbacks=[recorder := Recorder()],
        **EMA | REASONING,
    )
    trainer.train()
    gaps = recorder.values("sampling/sampling_logp_difference/max") + recorder.values(
        "eval_sampling/sampling_logp_difference/max"
    )
    assert len(gaps) == 6 and max(gaps) <= LOGPROB_GAP
    for phase in PHASES:
        seconds = recorder.values(f"seconds/{phase}")
        assert len(seconds) == 3 and min(seconds) > 0.0, phase
    assert recorder.values("num_rationale_tokens")[-1] == sum(
        4 * length for length in recorder.values("rationales/mean_length")
    ) + sum(4 * (1 - ratio) for ratio in recorder.values("rationales/clipped_ratio"))

    (inputs,) = rollout(trainer, size=3)
    with own_weights_put_in(trainer) as teacher:
        assert greedy_gap(trainer, teacher, inputs) <= GREEDY
    with trainer.model.disable_adapter():
        assert greedy_gap(trainer, trainer.model, inputs) > 100 * GREEDY
    trainer.teacher.weights, trainer.teacher.kind = None, "base"  # the same engine for a fixed teacher
    (inputs,) = rollout(trainer, size=3)
    with trainer.model.disable_adapter():
        assert greedy_gap(trainer, trainer.model, inputs) <= GREEDY
    trainer.sampler.close()


# The collator with rationales


def test_template_that_rewrites_the_assistants_turn_is_refused(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content']", "(message['content'] | replace('=', ''))"
    )
    SelfDistillationDataCollator(tokenizer)
    with pytest.raises(
        ValueError, match="--reason_first: the chat template of .* changes the text of an assistant's turn"
    ):
        SelfDistillationDataCollator(tokenizer, reason_first=True)


def test_rationale_and_transition_fit_after_a_long_solution(tokenizer):
    long = FIRST | {"solution": "begin " + "12+34=46. " * 200 + "\\boxed{46}."}
    settings = {"reason_first": True, "max_reasoning_length": 100}
    whole = SelfDistillationDataCollator(tokenizer, **settings).encode(long)
    collator = SelfDistillationDataCollator(tokenizer, **settings, max_prompt_length=1300)
    encoded = collator.encode(long)
    assert encoded["length_status"] == "shortened"
    reserved = 100 + len(collator.transition_ids)
    length = len(encoded["reasoning_prompt_ids"])
    assert len(whole["reasoning_prompt_ids"]) > 1300 and 1260 < length + reserved <= 1300
    assert 1260 < len(encoded["teacher_prompt_ids"]) <= 1300  # without a rationale it has all of the room
    text = tokenizer.decode(encoded["reasoning_prompt_ids"])
    before, after = REASONING_TEXT.split(FIRST["solution"])
    assert text.startswith(before + "begin") and text.endswith("\\boxed{46}." + after + NO_THINKING)
    assert text.count(ELLIPSIS) == 1


def test_example_whose_rationale_does_not_fit_is_dropped(tokenizer):
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
    rollouts = start_rollouts([row | collator.encode(row) for row in (FIRST, SECOND)])
    for started, row in zip(rollouts, (FIRST, SECOND), strict=True):
        assert {name: getattr(started, name) for name in row} == row
    assert tokenizer.decode(rollouts[0].reasoning_prompt_ids) == REASONING_TEXT + NO_THINKING
    row = {"problem": "1+1"}
    (plain,) = start_rollouts([row | SelfDistillationDataCollator(tokenizer).encode(row)])
    assert (plain.solution, plain.answer, plain.reasoning_prompt_ids) == (None, None, None)


# Settings


GROUP = {"num_generations": 4}


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"max_reasoning_length": 0}, "max_reasoning_length"),
        ({"reason_first": True, "teacher_context": "none"}, "reason_first"),
        ({"reason_first": True, "teacher_context": "reference_only"}, "reason_first"),
        ({"teacher_context": "hint"} | GROUP, "teacher_context"),
        ({"teacher_context": "wrong_hint"}, "teacher_context"),
        ({"teacher_context": "none", "teacher_prompt": "{problem}"}, "teacher_prompt"),
        ({"teacher_context": "none", "teacher_system_prompt": "Add."}, "teacher_system_prompt"),
        ({"teacher_context": "donor", "teacher_prompt": "{problem}"}, "teacher_prompt"),
        ({"teacher_context": "reference_only", "teacher_prompt": "{problem}{solution}"}, "teacher_prompt"),
        ({"teacher_context": "rollout"}, "teacher_context"),
        ({"teacher_context": "rollout", "max_length": None} | GROUP, "teacher_context"),
        ({"teacher_context": "rollout", "eval_strategy": "steps"} | GROUP, "eval_strategy"),
        ({"teacher_context": "rollout", "eval_on_start": True} | GROUP, "eval_strategy"),
        ({"reference_fallback": "fail"}, "reference_fallback"),
        ({"reference_fallback": "solution"}, "reference_fallback"),
        ({"reference_fallback": "solution", "teacher_context": "wrong_hint"} | GROUP, "reference_fallback"),
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
        ({"num_generations": 5}, "num_generations"),
        ({"num_generations": 0}, "num_generations"),
    ],
)
def test_settings_that_are_refused(settings, flag):
    with pytest.raises(ValueError, match=rf"^--{flag} \S+: must "):
        configure(**settings)


@pytest.mark.parametrize(
    ("settings", "requirement"),
    [
        ({"temperature": 0.0}, r"temperature 0\.0 must lie in \(0, 2\]"),
        ({"temperature": 2.1}, r"temperature 2\.1 must lie in \(0, 2\]"),
        ({"top_p": 0.0}, r"top_p 0\.0 must lie in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p 1\.1 must lie in \(0, 1\]"),
        ({"top_k": -1}, "top_k -1 must lie in"),
        ({"min_p": 0.1}, "unknown setting 'min_p'; there are temperature, top_p, top_k"),
    ],
)
def test_sampling_of_rationales_that_is_refused(settings, requirement):
    with pytest.raises(ValueError, match=f"^--reasoning_generation_kwargs: {requirement}"):
        configure(reasoning_generation_kwargs=settings)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"reasoning_prompt": "{problem}"}, r"--reasoning_prompt lacks the placeholder \{solution\}"),
        ({"teacher_prompt": "Be brief."}, r"--teacher_prompt lacks the placeholder \{problem\}"),
    ],
)
def test_template_that_is_refused(template, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        configure(**template)


@pytest.mark.parametrize(
    "settings",
    [
        {"correct_weight": 0.0, "incorrect_weight": 0.0, "policy_gradient_weight": 1.0} | GROUP,  # the reward alone
        {"reason_first": True, "teacher_context": "rollout"} | GROUP,
        {"vllm_importance_sampling_correction": True, "use_vllm": True, "policy_gradient_weight": 1.0} | GROUP,
        {"num_generations": 8, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    ],
)
def test_settings_that_go_together(settings):
    configure(**settings)


RULES = {"rule": "rule", "unit": "unit"}
SOLUTION, ANSWER = {"solution_column": "solution"}, {"answer_column": "key"}


@pytest.mark.parametrize(
    ("settings", "needed", "further"),
    [
        ({}, SOLUTION, ANSWER),
        ({"teacher_context": "none"}, {}, ANSWER),
        ({"teacher_context": "answer"}, ANSWER, {}),
        ({"teacher_context": "donor"}, SOLUTION, ANSWER),
        ({"teacher_context": "reference_only"}, SOLUTION, ANSWER),
        ({"teacher_context": "wrong_hint"} | GROUP, ANSWER, {}),
        ({"teacher_prompt": "Be brief. {problem}"}, {}, ANSWER),
        ({"teacher_prompt": "{rule} {problem}", "student_prompt": "{unit} {problem}"}, RULES, ANSWER),
        ({"teacher_prompt": "{answer} {problem}"}, ANSWER, {}),
        ({"teacher_prompt": "{problem}", "reason_first": True}, SOLUTION, ANSWER),
        ({"verify_rollouts": False, "correct_weight": 0.0}, SOLUTION | ANSWER, {}),
        ({"correct_weight": 0.0}, SOLUTION | ANSWER, {}),
        ({"incorrect_weight": 2.0}, SOLUTION | ANSWER, {}),
        ({"policy_gradient_weight": 1.0} | GROUP, SOLUTION | ANSWER, {}),
        ({"curriculum": "pass_rate"}, SOLUTION | ANSWER, {}),
        ({"curriculum": "divergence"}, SOLUTION, ANSWER),
        ({"teacher_context": "rollout"} | GROUP, ANSWER, {}),
        ({"teacher_context": "rollout", "reference_fallback": "answer"} | GROUP, ANSWER, {}),
        ({"teacher_context": "rollout", "reference_fallback": "solution"} | GROUP, SOLUTION | ANSWER, {}),
    ],
)
def test_columns_that_the_settings_need(settings, needed, further):
    args = OPSDArguments(dataset_name="x", answer_column="key")
    assert needed_columns(args, configure(**settings)) == ({"problem_column": "problem"} | needed, further)
    nameless = OPSDArguments(dataset_name="x")
    if further:
        assert needed_columns(nameless, configure(**settings))[1] == {"answer_column": None}
        with pytest.raises(ValueError, match=r"--verify_rollouts True: rollouts are graded .*--answer_column"):
            needed_columns(nameless, configure(**settings, verify_rollouts=True))
    elif "teacher_prompt" in settings or settings.get("teacher_context") == "answer":  # which need the text itself
        assert needed_columns(nameless, configure(**settings))[0]["answer_column"] == "answer"
    else:
        flag, value = list(settings.items())[-1] if "verify_rollouts" in settings else next(iter(settings.items()))
        with pytest.raises(ValueError, match=rf"--{flag} {value}.*: rollouts are graded .*--answer_column"):
            needed_columns(nameless, configure(**settings))


@pytest.mark.parametrize(
    ("column", "settings"),
    [("solution", {}), ("answer", {"correct_weight": 0.0}), ("answer", {"curriculum": "pass_rate"})],
)
def test_missing_columns_are_named(make_trainer, problems, column, settings):
    with pytest.raises(ValueError, match=f"the train dataset has no column '{column}'"):
        make_trainer(dataset=problems.remove_columns(column), **settings)
