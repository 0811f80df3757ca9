"""A teacher on a vLLM server: its top log-probabilities in the loss, a stand-in for the server, and a real one."""

import re

import pytest
import torch
from helpers import (
    ROOT,
    TOP_K,
    Recorder,
    free_port,
    perturb_student,
    rollout,
    save_model,
    script_rollouts,
    serving_teacher,
    started,
)
from torch.testing import assert_close
from transformers import Qwen3Config

from opsd.losses import HeadSettings, Objective, TopLogprobs, dense_token_losses, fused_token_losses
from opsd.preflight import run_preflight
from opsd.rollouts import Completion
from opsd_trainer import OPSDConfig

FLAGS = {"fixed_teacher": False, "top_k_loss": TOP_K, "top_k_loss_add_tail": True}


def top_of(logits: torch.Tensor, k: int) -> TopLogprobs:
    return TopLogprobs(*logits.log_softmax(-1).topk(k))


# Loss


@pytest.mark.parametrize("k", [1, 5, 49, 50])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_loss_and_gradient_are_those_of_all_logits(beta, k):
    """In float64, with the dense and the fused form, also where the head scales; 50 is the whole vocabulary."""
    generator = torch.Generator().manual_seed(0)
    student, teacher, head = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((9, 6), (9, 50), (50, 6))
    )
    teacher *= torch.tensor([0.1, 1.0, 4.0], dtype=torch.float64).repeat(3)[:, None]  # flat to peaked
    objective = Objective(beta=beta, top_k=k, top_k_add_tail=True, clip=0.3, clip_mode="scale")
    ids, settings = torch.arange(9), HeadSettings(logit_scale=0.7)
    results = []
    for form in ("all", "dense", "fused"):
        hidden = student.clone().requires_grad_()
        top = top_of(teacher, k)
        if form == "fused":
            losses = fused_token_losses(hidden, top, head, ids, objective, head=settings, chunk_size=4)
        else:
            logits = teacher if form == "all" else top.fill(torch.empty_like(teacher))
            losses = dense_token_losses(0.7 * hidden @ head.T, logits, ids, objective)
        losses.loss.sum().backward()
        results.append((losses, hidden.grad))
    (expected, gradient), *others = results
    assert gradient.norm() > 0.1
    for losses, other in others:
        # The rest is what lacks to 1: of a rest of 1e-8 eight digits are right
        assert_close(losses.loss, expected.loss, rtol=1e-6, atol=1e-9)
        assert_close(losses.statistics.divergence, expected.statistics.divergence, rtol=1e-6, atol=1e-9)
        assert_close(other, gradient, rtol=1e-6, atol=1e-9)
        entropy, bound = expected.statistics.teacher_entropy, losses.statistics.teacher_entropy
        assert (bound >= entropy - 1e-9).all()
        if k == 50:
            assert_close(bound, entropy)


def test_a_rest_below_rounding_stays_out_of_the_top():
    """Probabilities that add up to 1, or a little more, as float32 gives them."""
    logprobs = torch.tensor([[-1e-9, -21.0, -40.0], [1e-6, -30.0, -90.0]])
    ids = torch.tensor([[7, 2, 4], [0, 9, 1]])
    logits = TopLogprobs(logprobs, ids).fill(torch.empty(2, 12))
    assert logits.isfinite().all()
    assert torch.equal(logits.topk(3).indices, ids)
    assert_close(logits.gather(-1, ids), logprobs, rtol=0, atol=0)
    assert (logits.logsumexp(-1).abs() < 2e-6).all()


def test_capped_logits_and_wrong_shapes_are_refused():
    hidden, head, ids = torch.randn(3, 4), torch.randn(9, 4), torch.arange(3)
    top = top_of(torch.randn(3, 9), 2)
    with pytest.raises(ValueError, match="do not go with capped logits: take dense_token_losses"):
        fused_token_losses(hidden, top, head, ids, Objective(), head=HeadSettings(logit_softcap=30.0))
    with pytest.raises(ValueError, match="expected student and teacher hidden states"):
        fused_token_losses(hidden, TopLogprobs(top.logprobs[:2], top.ids[:2]), head, ids, Objective())


# A stand-in for the server


@pytest.fixture
def other(tiny_model_dir, tmp_path):
    return save_model(tmp_path / "other", tiny_model_dir)


@pytest.mark.parametrize("implementation", ["dense", "fused"])
@pytest.mark.parametrize("context", ["none", "solution"])
def test_equal_to_the_teacher_loaded_here(make_trainer, other, implementation, context):
    """Loss and gradient, over two micro-batches with completions of different lengths."""
    results = []
    with serving_teacher(other) as (url, asked):
        for where in (None, url):
            trainer = make_trainer(
                teacher_model_name_or_path=other,
                teacher_model_server_url=where,
                teacher_context=context,
                loss_implementation=implementation,
                **FLAGS,
            )
            perturb_student(trainer)
            script_rollouts(trainer)
            batches = rollout(trainer, steps=2)
            losses = [trainer.token_losses(trainer.model, batch) for batch in batches]
            sum(loss.loss.sum() for loss in losses).backward()
            gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad])
            results.append((torch.cat([loss.loss for loss in losses]).detach(), gradient))
        assert trainer.teacher.kind == "server" and trainer.teacher.other is None
        assert len(asked) == 5  # one to see whether it can, and one for each rollout
        sequences = [batch.teacher.input_ids[0].tensor_split(batch.teacher.bounds[1:-1].tolist()) for batch in batches]
        sequences = [ids.tolist() for parts in sequences for ids in parts]
        assert sorted(body["prompt"][0] for body in asked[1:]) == sorted(sequences)
    (expected, gradient), (loss, other_gradient) = results
    assert gradient.norm() > 1e-3
    assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert (other_gradient - gradient).norm() <= 1e-4 * gradient.norm()


def test_a_completion_without_tokens_has_its_place(make_trainer, other):
    with serving_teacher(other) as (url, _):
        trainer = make_trainer(teacher_model_name_or_path=other, teacher_model_server_url=url, **FLAGS)
        completions = [Completion([5, 6, 7], None), Completion([], None), Completion([8], None), Completion([9], None)]
        trainer.sampler.sample = lambda prompts: completions
        (batch,) = rollout(trainer)
        assert batch.teacher_top_ids.shape == (4, 3, TOP_K)
        losses = trainer.token_losses(trainer.model, batch)
        assert losses.loss.shape == (5,) and losses.loss.isfinite().all() and (losses.loss > 0).all()


def test_training_and_preflight(make_trainer, other, tmp_path):
    """The student comes nearer; the checks that need the teacher's weights say where they are; a resume goes on."""
    settings = FLAGS | {"teacher_model_name_or_path": other, "teacher_context": "none", "learning_rate": 1e-2}
    settings |= {"max_steps": 16, "save_strategy": "steps", "save_steps": 8}
    with serving_teacher(other) as (url, asked):
        settings["teacher_model_server_url"] = url
        trainer = make_trainer(callbacks=[recorder := Recorder()], **settings)
        trainer._check_packing()
        checks = run_preflight(trainer)
        assert {check.name for check in checks if check.passed is False} == set()
        (check,) = (check for check in checks if check.name == "teacher's weights")
        assert check.passed is None and check.measured == "on a server"
        script_rollouts(trainer)
        (batch,) = rollout(trainer)
        start = trainer.token_losses(trainer.model, batch).loss.mean()
        asked.clear()
        trainer.train()
        losses = recorder.values("loss")
        # On the same rollouts, after 16 steps on others: 0.53 to 0.92 of it, with three models and three seeds each
        end = trainer.token_losses(trainer.model, batch).loss.mean()
        assert end < 0.97 * start
        *_, logs = (logs for logs in recorder.logs if "loss" in logs)
        num_tokens = sum(len(body["prompt"][0]) for body in asked[-4:])  # of the last step, in either role
        seconds = logs["seconds/teacher"] + logs["seconds/student"]
        assert logs["tokens_per_second/training"] * seconds == pytest.approx(num_tokens)  # of the student alone
        resumed = make_trainer(callbacks=[again := Recorder()], **settings)
        script_rollouts(resumed)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-8"))
        assert again.values("loss") == pytest.approx(losses[8:], rel=1e-4)
        with pytest.raises(ValueError, match="its teacher is the server, and with these flags it would be the base"):
            make_trainer().train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-8"))


# Refused


@pytest.mark.parametrize(
    ("stand_in", "settings", "message"),
    [
        ({"id": "a", "root": "b"}, {}, r"serves a, not --teacher_model_name_or_path .*--served-model-name"),
        (
            {"max_length": 1000},
            {},
            "reads 1000 tokens, and --max_length is 1000; lower it, or start .* --max-model-len 1001",
        ),
        ({"max_logprobs": 5}, {"max_length": 900}, r"(?s)greater than max allowed: 5.*--max-logprobs 20"),
        ({"shift": 30.0}, {"max_length": 900}, r"not all log-probabilities .*--logprobs-mode raw_logprobs"),
    ],
)
def test_server_that_does_not_fit(make_trainer, other, stand_in, settings, message):
    with serving_teacher(other, **stand_in) as (url, _), pytest.raises((ValueError, ConnectionError), match=message):
        make_trainer(teacher_model_name_or_path=other, teacher_model_server_url=url, **FLAGS | settings)


def test_server_that_fails_and_a_sequence_that_is_too_long(make_trainer, other):
    settings = FLAGS | {"teacher_model_name_or_path": other}
    with serving_teacher(other, max_length=30) as (url, _):
        trainer = make_trainer(teacher_model_server_url=url, max_length=None, **settings)
        script_rollouts(trainer)
        with pytest.raises(ValueError, match="reads 30 tokens, and a prompt of the teacher with its completion has"):
            rollout(trainer)
    trainer.teacher.server.max_length = 0
    trainer.teacher.server.client.session.adapters.clear()  # no retries, which wait
    with pytest.raises(ConnectionError, match=r"(?s)--teacher_model_server_url http.*Start the server with: MODEL="):
        rollout(trainer)
    with pytest.raises(ConnectionError, match=r"can't be reached"):
        make_trainer(teacher_model_server_url="http://127.0.0.1:9", vllm_server_timeout=0.0, **settings)


def test_heads_that_differ_and_a_capped_student(make_trainer, tiny_model_dir, tmp_path):
    vocab_size = Qwen3Config.from_pretrained(tiny_model_dir).vocab_size
    padded = save_model(tmp_path / "padded", tiny_model_dir, vocab_size=vocab_size + 9)
    with pytest.raises(ValueError, match=f"heads of {vocab_size} .* and {vocab_size + 9} .* leave the flag out"):
        make_trainer(teacher_model_name_or_path=padded, teacher_model_server_url="http://127.0.0.1:9", **FLAGS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"teacher_model_name_or_path": None},
            "--teacher_model_server_url u: must go with --teacher_model_name_or_path",
        ),
        ({"top_k_loss": 0, "top_k_loss_add_tail": False}, "--top_k_loss 0: must be given, and --top_k_loss_add_tail"),
        ({"top_k_loss_add_tail": False}, "--top_k_loss 20: must be given, and --top_k_loss_add_tail"),
        ({"top_k_loss_support": "both"}, "--top_k_loss_support both: must be teacher"),
        ({"use_tinker_loss": True}, "--use_tinker_loss True: must be false"),
        ({"temperature": 1.1}, "--loss_temperature None: must be given as 1 (by default it is --temperature)"),
        ({"loss_temperature": 0.9}, "--loss_temperature 0.9: must be given as 1"),
        ({"token_weights": "teacher_certainty"}, "--token_weights teacher_certainty: must be another"),
        ({"save_token_statistics": 2}, "--save_token_statistics 2: must be 0"),
    ],
)
def test_flags_against_each_other(settings, message):
    given = {"use_cpu": True, "bf16": False, "teacher_model_name_or_path": "m", "teacher_model_server_url": "u"}
    with pytest.raises(ValueError, match=re.escape(message)):
        OPSDConfig(**given | {"temperature": 1.0} | FLAGS | settings)


# vLLM


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_server(make_trainer, other, tmp_path):
    """Against the teacher loaded here: a real server, in float32."""
    port = free_port()
    command = ["bash", ROOT / "scripts" / "serve_vllm.sh", "--host", "127.0.0.1", "--max-model-len", "1001"]
    with started([*command, "--no-enable-lora"], tmp_path / "log", MODEL=other, PORT=str(port)):
        losses = []
        for where in (None, f"http://127.0.0.1:{port}"):
            trainer = make_trainer(teacher_model_name_or_path=other, teacher_model_server_url=where, **FLAGS)
            perturb_student(trainer)
            script_rollouts(trainer)
            (batch,) = rollout(trainer)
            losses.append(trainer.token_losses(trainer.model, batch).loss.detach())
    assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-5)
