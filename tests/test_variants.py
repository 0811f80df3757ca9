"""The trainer with what rollouts are learned from: weights, rewards, references, rationalizations, curriculum, sampler."""

import json
import re
import threading
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    EMA,
    LOGPROB_GAP,
    Recorder,
    copies,
    perturb_student,
    rollout,
    script_rollouts,
    teacher_logits,
    work_out,
)
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from opsd.losses import generalized_jsd
from opsd.rewards import Verifier

GROUPS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 4}
REASONING = {"reason_first": True, "max_reasoning_length": 16, "reasoning_top_k": 1, "temperature": 1.3}
PHASES = ("rollout", "teacher", "student", "rationalization")


def is_right(trainer, inputs):
    """Whether each completion's box has the answer, (batch,)."""
    texts = trainer.processing_class.batch_decode(inputs.completion_ids)
    boxes = [re.findall(r"\\boxed\{(\d+)\}", text) for text in texts]
    return torch.tensor([box[-1:] == [answer] for box, answer in zip(boxes, inputs["answer"], strict=True)])


def gradient_of(trainer, loss):
    trainer.model.zero_grad()
    loss.backward()
    return torch.cat([w.grad.flatten() for w in trainer.model.parameters() if w.requires_grad and w.grad is not None])


def write_groups(problem, occurrence):
    """Four rollouts of a problem: one is right, one right but cut off, one wrong; one right and preceded by a word."""
    return (
        work_out(problem),
        work_out(problem).removesuffix("<|im_end|>") + "So " * 40,
        work_out(problem, is_right=False),
        "So " + work_out(problem),
    )[occurrence % 4]


def write_half(problem, occurrence):
    """Every other rollout of a problem is right."""
    return work_out(problem, is_right=occurrence % 2 == 0)


def sample_groups(trainer):
    """Both micro-batches of a step, each four rollouts of a problem; some of them right, some wrong."""
    perturb_student(trainer)
    script_rollouts(trainer, write_half)
    trainer.model.train()
    rows = [row for row in (8, 15) for _ in range(4)]
    trainer._fill_buffer(trainer.data_collator([trainer.train_dataset[row] for row in rows]), 2)
    return trainer._buffered_inputs


def by_hand(trainer, inputs):
    """Of all tokens of a micro-batch: divergence, the student's log-probability, and whether their rollout is right."""
    plain = inputs | {"loss_mask": inputs.completion_mask}
    student = trainer.completion_logits(trainer.model, plain, "student")
    divergences = generalized_jsd(student, teacher_logits(trainer, plain), beta=0.5)
    token_ids = inputs.completion_ids[inputs.completion_mask]
    logprobs = student.log_softmax(-1).gather(1, token_ids[:, None]).squeeze(1)
    rows = inputs.completion_mask.nonzero()[:, 0]
    return divergences, logprobs, is_right(trainer, inputs)[rows], rows


# Weights and rewards


# Only the ratio of the weights counts, also where their sum is below 1
@pytest.mark.parametrize(
    ("of_correct", "of_failed", "reward"),
    [
        (0.0, 1.0, 0.0),
        (0.5, 2.0, 0.0),
        (1.0, 1.0, 0.5),
        (0.0, 1.0, 2.0),
        (1e-4, 3e-4, 0.0),
    ],  # the last: only their ratio counts
)
def test_loss_of_a_step_by_hand(make_trainer, of_correct, of_failed, reward):
    """sum_n w_n D_n / sum_n w_n - policy_gradient_weight sum_n A_n log p_S(y_n) / N over both micro-batches, and its gradient."""
    trainer = make_trainer(
        correct_weight=of_correct, incorrect_weight=of_failed, policy_gradient_weight=reward, **GROUPS
    )
    micro_batches = sample_groups(trainer)
    parts = [by_hand(trainer, inputs) for inputs in micro_batches]
    divergences, logprobs, right, _ = (torch.cat(part) for part in zip(*parts, strict=True))
    assert 0 < right.sum() < len(right)
    weights = torch.where(right, of_correct, of_failed)
    advantages = []
    for inputs, (*_, rows) in zip(micro_batches, parts, strict=True):
        rewards = is_right(trainer, inputs).float()  # a micro-batch is a group
        advantages.append(((rewards - rewards.mean()) / (rewards.std() + 1e-4))[rows])
    expected = (weights * divergences).sum() / weights.sum()
    expected = expected - reward * (torch.cat(advantages) * logprobs).mean()
    expected_gradient = gradient_of(trainer, expected)
    assert expected_gradient.norm() > 1e-2
    for implementation in ("fused", "dense"):
        trainer.args.loss_implementation = implementation
        loss = sum(trainer.compute_loss(trainer.model, inputs) for inputs in micro_batches)
        gradient = gradient_of(trainer, loss)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6), implementation
        assert (gradient - expected_gradient).norm() <= 1e-4 * expected_gradient.norm(), implementation


@pytest.mark.parametrize("implementation", ["fused", "dense"])
def test_step_in_which_all_is_right_teaches_nothing(make_trainer, monkeypatch, implementation):
    monkeypatch.setattr(Verifier, "__call__", lambda self, completions, answers: [True] * len(completions))
    settings = {"correct_weight": 0.0, "max_steps": 1, "loss_implementation": implementation}
    trainer = make_trainer(callbacks=[recorder := Recorder()], **settings)
    perturb_student(trainer)
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    assert recorder.values("loss") == recorder.values("grad_norm") == recorder.values("divergence") == [0.0]
    assert recorder.values("rewards/accuracy/mean") == recorder.values("groups/all_correct_ratio") == [1.0]
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(weight, before[name]), name


def test_own_rollouts_as_references_need_no_solutions(make_trainer, problems, tmp_path):
    """The tokens of a rollout count if another one of its group is right; the teacher's prompt shows that one."""
    trainer = make_trainer(
        problems.remove_columns("solution"), teacher_reference="rollout", callbacks=[recorder := Recorder()], **GROUPS
    )
    perturb_student(trainer)
    places = {}

    def write(problem, occurrence):
        """In every other group a single rollout is right, which has no other one to learn from."""
        place = places.setdefault(problem, len(places))
        return write_groups(problem, occurrence) if place % 2 else work_out(problem, is_right=occurrence == 0)

    script_rollouts(trainer, write)
    teachers = []
    fill_buffer = trainer._fill_buffer

    def keep(*arguments):
        fill_buffer(*arguments)
        teachers.append(trainer._buffered_inputs)

    trainer._fill_buffer = keep
    trainer.train()
    num_with_reference = num_right = 0
    for step, micro_batches in enumerate(teachers, start=1):
        lines = (tmp_path / "run" / "completions" / f"completions_{step:05d}.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        correct = torch.cat([is_right(trainer, inputs) for inputs in micro_batches]).tolist()
        assert [record["correct"] for record in records] == correct
        num_right += sum(correct)
        for place, inputs in enumerate(micro_batches):
            texts = [record["completion"] for record in records[4 * place :]]
            for row in range(4):
                circle = [(row + distance) % 4 for distance in (1, 2, 3)]
                sibling = next((i for i in circle if correct[4 * place + i] and texts[i].endswith("<|im_end|>")), None)
                assert inputs.loss_mask[row].any() == (sibling is not None)
                if sibling is not None:
                    num_with_reference += 1
                    prompt = trainer.processing_class.decode(inputs.teacher_prompt_ids[row])
                    reference = prompt.split("begins ---\n")[1].split("\n---")[0]
                    assert reference == texts[sibling].removesuffix("<|im_end|>")
    assert num_with_reference == 3 + 4 + 3 + 4
    assert sum(recorder.values("rewards/accuracy/mean")) * 8 == num_right
    assert sum(recorder.values("references/correct_peer_ratio")) * 8 == pytest.approx(num_with_reference)
    for of_rollouts, none in zip(
        recorder.values("references/correct_peer_ratio"), recorder.values("references/none_ratio"), strict=True
    ):
        assert of_rollouts + none == pytest.approx(1.0)
    assert max(recorder.values("loss")) > 0.0


# Rationalizations


def written_tokens(trainer, inputs, size=3):
    """(prompt, what was written behind it) of the rationalizations, read from the teacher's prompts."""
    transition_ids = trainer.collator.transition_ids
    pairs = []
    for i, ids in enumerate(teacher_prompts(inputs)[:size]):
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
    By how much, in nats, a written token is behind the one that `model` finds most probable, with plain forwards and
    without padding: the largest gap of all. A greedy sampler has a gap of 0, or of rounding where two tokens are as good.
    """
    gaps = []
    for prompt, written in written_tokens(trainer, inputs):
        ended = len(written) < trainer.args.max_reasoning_length
        logits = model(torch.tensor([prompt + written])).logits[0, len(prompt) - 1 :]  # (written + 1, V)
        gaps += [(row.max() - row[token]).item() for row, token in zip(logits, written, strict=False)]
        if ended:  # on an end-of-sequence token, or with blanks only, which leave no trace
            gaps.append((logits[-1].max() - logits[-1][trainer.end_ids].max()).item() if written else 0.0)
    return max(gaps)


GREEDY = 1e-3  # nats: float32 rounds the logits by about 1e-5, and another policy is behind by far more


def teacher_prompts(inputs):
    rows = zip(inputs.teacher_prompt_ids, inputs.teacher_prompt_mask, strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in rows]


@contextmanager
def own_weights_put_in(trainer):
    """The model with the weights that the teacher has of its own."""
    student = {name: trainer.model.get_parameter(name).detach().clone() for name in copies(trainer)}
    for weights in (copies(trainer), student):
        for name, weight in weights.items():
            trainer.model.get_parameter(name).data.copy_(weight)
        if weights is not student:
            yield trainer.model


def test_rationalizations_are_the_base_models(make_trainer, tiny_model_dir):
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
    trainer._run_state.clear()
    trainer._seconds.clear()
    trainer.train()
    assert recorder.values("rationales/mean_length")[0] > 0.0
    assert recorder.values("num_rationale_tokens")[0] > 0
    assert all(recorder.values(f"seconds/{phase}")[0] > 0.0 for phase in PHASES)


def test_rationalizations_are_those_of_the_teachers_own_weights(make_trainer):
    """Teacher, student and base are three policies."""
    settings = EMA | REASONING | {"temperature": 1.0, "lora_settings": {"init_lora_weights": False}}
    trainer = make_trainer(**settings)
    trainer._start_teacher()
    perturb_student(trainer)
    (inputs,) = rollout(trainer, size=3)
    assert greedy_gap(trainer, trainer.model, inputs) > 100 * GREEDY
    with trainer.model.disable_adapter():
        assert greedy_gap(trainer, trainer.model, inputs) > 100 * GREEDY
    with own_weights_put_in(trainer) as teacher:
        assert greedy_gap(trainer, teacher, inputs) <= GREEDY
    assert all(weight.requires_grad == ("lora_" in name) for name, weight in trainer.model.named_parameters())


@pytest.mark.vllm
def test_vllm_writes_rationalizations_as_the_teacher_and_rollouts_as_the_student(make_trainer, problems):
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
    trainer.teacher.weights, trainer.teacher.is_base = None, True  # the same engine for a fixed teacher
    (inputs,) = rollout(trainer, size=3)
    with trainer.model.disable_adapter():
        assert greedy_gap(trainer, trainer.model, inputs) <= GREEDY
    trainer.sampler.close()


def test_kept_rationalizations_serve_later_runs(make_trainer, tmp_path):
    settings = REASONING | {"reasoning_cache": str(tmp_path / "cache"), "max_steps": 1}
    first = make_trainer(callbacks=[recorder := Recorder()], **settings)
    first.train()
    next_random_number = torch.rand(())
    assert recorder.values("num_rationale_tokens")[0] > 0
    assert recorder.values("rationales/cached_ratio") == [0.0]
    assert len(list((tmp_path / "cache").iterdir())) == 4
    make_trainer(**settings).train()
    assert torch.rand(()) == next_random_number  # later rollouts are the same, whether the cache had them or not
    second = make_trainer(callbacks=[recorder := Recorder()], **settings)
    perturb_student(second)  # which the teacher is not
    second.train()
    assert recorder.values("num_rationale_tokens") == [0]
    assert recorder.values("rationales/cached_ratio") == [1.0]
    assert teacher_prompts(second._buffered_inputs[0]) == teacher_prompts(first._buffered_inputs[0])
    with pytest.raises(ValueError, match="--reasoning_cache .*: is for a teacher that is the base model"):
        make_trainer(lora_settings={"init_lora_weights": False}, **settings)


def test_replies_of_a_server_reach_the_process_that_asked(monkeypatch):
    """Processes have different numbers of prompts that are not rationalized yet; here they are threads."""
    prompts = [[[1], [2]], [], [[3]], [[4], [5], [6]]]
    barrier, boxes, replies = threading.Barrier(len(prompts)), [None] * len(prompts), {}

    def gather(items):
        boxes[int(threading.current_thread().name)] = items
        barrier.wait(timeout=20)
        gathered = [item for box in boxes for item in box]
        barrier.wait(timeout=20)
        return gathered

    monkeypatch.setattr("rollouts.gather_object", gather)
    monkeypatch.setattr("rollouts.broadcast_object_list", lambda items: [gather(items)[0]])

    def generate(asked, generation_kwargs):
        return {"completion_ids": [[10 * asked[0][0]]], "logprobs": [[[0.0]]], "logprob_token_ids": [[[0]]]}

    def ask(index):
        generation = VLLMSampler.__new__(VLLMSampler)
        generation.accelerator = SimpleNamespace(process_index=index, is_main_process=index == 0)
        generation.vllm_client = SimpleNamespace(generate=generate)
        replies[index] = generation._sample_from_server(prompts[index], [0] * len(prompts[index]), {}, None)[0]

    threads = [threading.Thread(target=ask, args=[index], name=str(index)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [replies.get(index) for index in range(4)] == [[[10 * ids[0]] for ids in asked] for asked in prompts]


# Importance correction


@torch.no_grad()
def sampling_logprobs(logits, token_ids, temperature, top_k, top_p):
    """
    What the sampler gives the tokens: at the temperature, of the k most probable, of those the nucleus; (N,).
    And where that is clear, because no token of the nucleus is at its edge to rounding; (N,), bool.
    """
    kept = (logits / temperature).topk(top_k)
    probs = kept.values.softmax(-1)
    before = probs.cumsum(-1) - probs
    probs = probs.masked_fill(before >= top_p, 0.0)  # what comes before has the mass already
    probs = probs / probs.sum(-1, keepdim=True)
    is_clear = (before - top_p).abs().min(-1).values > 1e-4
    return (probs * (kept.indices == token_ids[:, None])).sum(-1).log(), is_clear


@pytest.mark.vllm
def test_importance_weights_by_hand(make_trainer, monkeypatch):
    """Another temperature in the loss, a truncated sampler: loss, gradient and what is logged. Every third one is right."""
    monkeypatch.setattr(
        Verifier, "__call__", lambda self, completions, answers: [i % 3 == 0 for i in range(len(completions))]
    )
    sampler = {"temperature": 2.0, "top_k": 6, "top_p": 0.9}
    trainer = make_trainer(
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        use_tinker_loss=True,
        policy_gradient_weight=0.5,
        loss_temperature=1.2,
        learning_rate=0.0,  # so that the policy is still there after the step
        max_steps=1,
        callbacks=[recorder := Recorder()],
        **GROUPS,
        **sampler,
    )
    perturb_student(trainer)
    trainer.train()
    trainer.sampler.close()
    trainer.model.train()
    losses, ratios, num_tokens = [], [], sum(inputs.loss_mask.sum() for inputs in trainer._buffered_inputs)
    for inputs in trainer._buffered_inputs:
        mask = inputs.completion_mask
        token_ids = inputs.completion_ids[mask]
        logits = trainer.completion_logits(trainer.model, inputs, "student")
        expected, is_clear = sampling_logprobs(logits, token_ids, **sampler)
        sampled = inputs.sampler_logprobs[mask]
        assert is_clear.float().mean() > 0.9
        assert_close(sampled[is_clear], expected[is_clear], rtol=1e-4, atol=1e-4)
        student, teacher = (
            (values / 1.2).log_softmax(-1).gather(1, token_ids[:, None]).squeeze(1)
            for values in (logits, teacher_logits(trainer, inputs))
        )
        ratio = (student.detach() - sampled).exp()
        rewards = torch.tensor(inputs["correct"]).float()
        assert 0 < rewards.sum() < len(rewards)
        advantages = ((rewards - rewards.mean()) / (rewards.std() + 1e-4))[mask.nonzero()[:, 0]]
        ratios.append(ratio)
        losses.append((-ratio * (teacher - student.detach() + 0.5 * advantages) * student).sum() / num_tokens)
    ratios = torch.cat(ratios)
    assert ratios.min() < 0.7 and ratios.max() > 1.1 and recorder.values("rewards/accuracy/mean") == [3 / 8]
    assert recorder.values("sampling/importance_sampling_ratio/mean")[0] == pytest.approx(
        ratios.mean().item(), rel=1e-3
    )
    assert recorder.values("importance/variance")[0] == pytest.approx(ratios.var(unbiased=False).item(), rel=1e-3)
    assert not recorder.values("sampling/sampling_logp_difference/mean")
    expected = sum(losses)
    expected_gradient = gradient_of(trainer, expected)
    for implementation in ("fused", "dense"):
        trainer.args.loss_implementation = implementation
        loss = sum(trainer.compute_loss(trainer.model, inputs) for inputs in trainer._buffered_inputs)
        gradient = gradient_of(trainer, loss)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-3), implementation
        assert (gradient - expected_gradient).norm() <= 1e-3 * expected_gradient.norm(), implementation


# Curriculum


CURRICULUM = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 2}


def write_rate(problem, occurrence):
    """Of two rollouts of a problem as many are right as the problem's last digit says: none, one or both."""
    return work_out(problem, is_right=occurrence < int(problem[-1]) % 3)


@pytest.mark.parametrize("kind", ["divergence", "pass_rate"])
def test_scores_are_those_of_the_steps_rollouts(make_trainer, kind):
    trainer = make_trainer(
        curriculum=kind, max_steps=1, learning_rate=0.0, callbacks=[recorder := Recorder()], **CURRICULUM
    )
    perturb_student(trainer)
    script_rollouts(trainer, write_rate)
    trainer.train()
    trainer.model.train()
    row_of_prompt = {tuple(ids): row for row, ids in enumerate(trainer.train_dataset["student_prompt_ids"])}
    sums, counts = torch.zeros(2, 64, dtype=torch.float64)
    for inputs in trainer._buffered_inputs:
        divergences, _, _, rows_of_tokens = by_hand(trainer, inputs)
        prompts = zip(inputs.prompt_ids, inputs.prompt_mask, strict=True)
        for place, (prompt, mask) in enumerate(prompts):
            row = row_of_prompt[tuple(prompt[mask.bool()].tolist())]
            of_rollout = divergences[rows_of_tokens == place]
            sums[row] += of_rollout.sum().item() if kind == "divergence" else is_right(trainer, inputs)[place]
            counts[row] += len(of_rollout) if kind == "divergence" else 1
    assert (counts > 0).sum() == 4 and sums.sum() > 0.0
    assert_close(trainer.curriculum._counts, counts, rtol=0, atol=0)
    assert_close(trainer.curriculum._sums, sums, rtol=1e-4, atol=1e-6)
    assert recorder.values("curriculum/seen_ratio") == [4 / 64]
    assert 0.0 < recorder.values("curriculum/effective_ratio")[0] < 1.0


@pytest.mark.parametrize("kind", ["divergence", "pass_rate"])
def test_resumed_curriculum_goes_on(make_trainer, problems, tmp_path, kind):
    """Six of eight problems a step, so that problems come again and their scores matter."""
    settings = {"dataset": problems.select(range(8)), "curriculum": kind, "max_steps": 5, "num_generations": 2}
    settings |= {"per_device_train_batch_size": 6, "save_strategy": "steps", "save_steps": 2}
    whole, resumed = Recorder(), Recorder()
    first = make_trainer(callbacks=[whole], **settings)
    script_rollouts(first, write_rate)
    first.train()
    run = tmp_path / "run"
    rollouts = {file.name: file.read_text() for file in (run / "completions").iterdir()}
    second = make_trainer(callbacks=[resumed], **settings)
    script_rollouts(second, write_rate)
    second.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    for name in ("loss", "grad_norm", "num_generated_tokens", "curriculum/seen_ratio", "curriculum/effective_ratio"):
        assert resumed.values(name) == pytest.approx(whole.values(name)[2:], rel=1e-6, abs=1e-9), name
    assert {file.name: file.read_text() for file in (run / "completions").iterdir()} == rollouts
    assert torch.equal(second.curriculum.weights(), first.curriculum.weights())
    assert len(set(second.curriculum.weights().tolist())) > 2


def test_resuming_with_another_curriculum_is_refused(make_trainer):
    trainer = make_trainer(curriculum="divergence")
    trainer._run_state["curriculum"] = "none"
    with pytest.raises(ValueError, match="--curriculum divergence: .* was trained with none"):
        trainer._start_curriculum()


@pytest.mark.parametrize(
    ("column", "settings"),
    [("solution", {}), ("answer", {"correct_weight": 0.0}), ("answer", {"curriculum": "pass_rate"})],
)
def test_missing_columns_are_named(make_trainer, problems, column, settings):
    with pytest.raises(ValueError, match=f"the train dataset has no column '{column}'"):
        make_trainer(dataset=problems.remove_columns(column), **settings)


def test_without_a_curriculum_each_problem_comes_once_an_epoch(make_trainer, problems, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4, "callbacks": [recorder := Recorder()]}
    trainer = make_trainer(problems.select(range(8)), **settings)
    trainer.train()
    assert trainer.curriculum is None and not any("curriculum" in name for logs in recorder.logs for name in logs)
    run = tmp_path / "run"
    assert not list(run.rglob("curriculum.safetensors"))
    lines = [file.read_text().splitlines() for file in sorted((run / "completions").iterdir())]
    prompts = [json.loads(line)["prompt"] for step in lines for line in step]
    assert set(Counter(prompts[:8]).values()) == set(Counter(prompts[8:]).values()) == {1}
    assert "correct" not in json.loads(lines[0][0])
