"""Whole steps by hand: weights, rewards and the importance correction, and a server that several processes ask."""

import dataclasses
import threading
from types import SimpleNamespace

import pytest
import torch
from helpers import Recorder, is_right, perturb_student, script_rollouts, teacher_logits, work_out
from torch.testing import assert_close

from data_collator import start_rollouts
from opsd.losses import generalized_jsd
from opsd.rewards import Verifier
from opsd.rollouts import VLLMSampler

GROUPS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 4}


def gradient_of(trainer, loss):
    trainer.model.zero_grad()
    loss.backward()
    return torch.cat([w.grad.flatten() for w in trainer.model.parameters() if w.requires_grad and w.grad is not None])


def write_half(problem, occurrence):
    """Every other rollout of a problem is right."""
    return work_out(problem, is_right=occurrence % 2 == 0)


def sample_groups(trainer):
    """Both micro-batches of a step, each four rollouts of a problem; some of them right, some wrong."""
    perturb_student(trainer)
    script_rollouts(trainer, write_half)
    trainer.model.train()
    rows = [row for row in (8, 15) for _ in range(4)]
    return trainer.prepare_step(start_rollouts([trainer.train_dataset[row] for row in rows]), 2)


def by_hand(trainer, inputs):
    """Return for all tokens of a micro-batch: divergence, student's log-probability, whether it is right, its row."""
    plain = dataclasses.replace(inputs, loss_mask=inputs.completion_mask)
    student = trainer.completion_logits(trainer.model, plain, "student")
    divergences = generalized_jsd(student, teacher_logits(trainer, plain), beta=0.5)
    token_ids = inputs.completion_ids[inputs.completion_mask]
    logprobs = student.log_softmax(-1).gather(1, token_ids[:, None]).squeeze(1)
    rows = inputs.completion_mask.nonzero()[:, 0]
    return divergences, logprobs, is_right(trainer, inputs)[rows], rows


# Weights and rewards


@pytest.mark.parametrize(
    ("correct_weight", "incorrect_weight", "reward"),
    [
        (0.0, 1.0, 0.0),
        (0.5, 2.0, 0.0),
        (1.0, 1.0, 0.5),
        (0.0, 1.0, 2.0),
        (1e-4, 3e-4, 0.0),  # only the ratio of the weights counts, also where their sum is below 1
    ],
)
def test_loss_of_a_step_by_hand(make_trainer, correct_weight, incorrect_weight, reward):
    """sum_n w_n D_n / sum_n w_n - policy_gradient_weight sum_n A_n log p_S(y_n) / N, n over both micro-batches."""
    settings = {"correct_weight": correct_weight, "incorrect_weight": incorrect_weight}
    trainer = make_trainer(policy_gradient_weight=reward, **settings, **GROUPS)
    micro_batches = sample_groups(trainer)
    parts = [by_hand(trainer, inputs) for inputs in micro_batches]
    divergences, logprobs, right, _ = (torch.cat(part) for part in zip(*parts, strict=True))
    assert 0 < right.sum() < len(right)
    weights = torch.where(right, correct_weight, incorrect_weight)
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
def test_step_in_which_all_is_right_teaches_nothing(make_trainer, implementation):
    settings = {"correct_weight": 0.0, "max_steps": 1, "loss_implementation": implementation}
    trainer = make_trainer(callbacks=[recorder := Recorder()], **settings)
    perturb_student(trainer)
    script_rollouts(trainer)
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    assert recorder.values("loss") == recorder.values("grad_norm") == [0.0]
    assert recorder.values("divergence") == []  # a mean of nothing
    assert recorder.values("rewards/accuracy/mean") == [1.0]
    assert recorder.values("frac_reward_zero_std") == []  # there are no groups
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(weight, before[name]), name


# A server of several processes


def test_replies_of_a_server_reach_the_process_that_asked(monkeypatch):
    """Processes have different numbers of requests for rationales; here they are threads."""
    prompts = [[[1], [2]], [], [[3]], [[4], [5], [6]]]
    barrier, boxes, replies = threading.Barrier(len(prompts)), [None] * len(prompts), {}

    def gather(items):
        boxes[int(threading.current_thread().name)] = items
        barrier.wait(timeout=20)
        gathered = [item for box in boxes for item in box]
        barrier.wait(timeout=20)
        return gathered

    monkeypatch.setattr("opsd.rollouts.gather_object", gather)
    monkeypatch.setattr("opsd.rollouts.broadcast_object_list", lambda items: [gather(items)[0]])

    def generate(asked, generation_kwargs):
        return {"completion_ids": [[10 * asked[0][0]]], "logprobs": [[[0.0]]], "logprob_token_ids": [[[0]]]}

    def ask(index):
        sampler = VLLMSampler.__new__(VLLMSampler)
        sampler.accelerator = SimpleNamespace(process_index=index, is_main_process=index == 0)
        sampler.vllm_client = SimpleNamespace(generate=generate)
        replies[index] = sampler._sample_from_server(prompts[index], [0] * len(prompts[index]), {}, None)[0]

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
    Compute the sampler's log-probabilities of the tokens, (N,): at the temperature, in the nucleus of the k best.

    The second result, (N,) bool, is true where no token is at the edge of the nucleus to rounding.
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
    """Another temperature in the loss, a truncated sampler: loss, gradient, logs. Every third rollout is right."""
    monkeypatch.setattr(
        Verifier, "__call__", lambda self, completions, *_: [i % 3 == 0 for i in range(len(completions))]
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
        packing=False,  # groups stay together in a micro-batch
        callbacks=[recorder := Recorder()],
        **GROUPS,
        **sampler,
    )
    perturb_student(trainer)
    trainer.train()
    trainer.sampler.close()
    trainer.model.train()
    micro_batches = sum(trainer._buffered_inputs, [])
    losses, ratios, num_tokens = [], [], sum(inputs.loss_mask.sum() for inputs in micro_batches)
    for place, inputs in enumerate(micro_batches):
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
        rewards = torch.tensor([float(i % 3 == 0) for i in range(4 * place, 4 * place + 4)])
        assert 0 < rewards.sum() < len(rewards)
        advantages = ((rewards - rewards.mean()) / (rewards.std() + 1e-4))[mask.nonzero()[:, 0]]
        ratios.append(ratio)
        losses.append((-ratio * (teacher - student.detach() + 0.5 * advantages) * student).sum() / num_tokens)
    ratios = torch.cat(ratios)
    assert ratios.min() < 0.7 and ratios.max() > 1.1 and recorder.values("rewards/accuracy/mean") == [3 / 8]
    for name, value in {"mean": ratios.mean(), "min": ratios.min(), "max": ratios.max()}.items():
        logged = recorder.values(f"sampling/importance_sampling_ratio/{name}")
        assert logged == [pytest.approx(value.item(), rel=1e-3)], name
    assert not recorder.values("sampling/sampling_logp_difference/mean")
    expected = sum(losses)
    expected_gradient = gradient_of(trainer, expected)
    for implementation in ("fused", "dense"):
        trainer.args.loss_implementation = implementation
        loss = sum(trainer.compute_loss(trainer.model, inputs) for inputs in micro_batches)
        gradient = gradient_of(trainer, loss)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-3), implementation
        assert (gradient - expected_gradient).norm() <= 1e-3 * expected_gradient.norm(), implementation
