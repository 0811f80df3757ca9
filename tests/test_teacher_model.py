"""Another model as teacher: what it must share with the student, the loss against the dense formula, checkpoints."""

import json
import re

import pyarrow.parquet as pq
import pytest
import torch
from helpers import Recorder, perturb_student, rollout, save_model, script_rollouts
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from opsd.losses import generalized_jsd
from opsd.preflight import run_preflight
from opsd.rollouts import Completion
from opsd_trainer import OPSDConfig

NUM_PADDED = 9  # entries of a head beyond those of the tiny model


@pytest.fixture
def other(tiny_model_dir, tmp_path):
    return save_model(tmp_path / "other", tiny_model_dir)


def wider_head(tiny_model_dir, folder):
    """Save the tiny model with `NUM_PADDED` entries beyond its own."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.resize_token_embeddings(model.config.vocab_size + NUM_PADDED)
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("student_padding", "teacher_padding", "settings"),
    [
        (0, 0, {}),
        (0, NUM_PADDED, {"teacher_context": "none"}),
        (NUM_PADDED, 0, {"lora": False}),
        (0, NUM_PADDED, {"packing": False}),
    ],
    ids=["equal heads", "teacher's head is padded", "student's head is padded, full fine-tuning", "padded sequences"],
)
def test_loss_and_gradient_are_those_of_the_formula(
    make_trainer, tiny_model_dir, tmp_path, student_padding, teacher_padding, settings
):
    """In float64, against both models called one sequence at a time, and their logits cut to the common entries."""
    vocab_size = Qwen3Config.from_pretrained(tiny_model_dir).vocab_size
    path = save_model(tmp_path / "other", tiny_model_dir, vocab_size=vocab_size + teacher_padding)
    student = wider_head(tiny_model_dir, tmp_path / "student") if student_padding else None
    results = []
    for implementation in ("formula", "dense", "fused"):
        trainer = make_trainer(
            model=student,
            fixed_teacher=False,
            teacher_model_name_or_path=path,
            loss_implementation="dense" if implementation == "formula" else implementation,
            **{"lora": True} | settings,
        )
        for model in (trainer.model, trainer.teacher.other):
            model.double()
        trainer.model.zero_grad()
        perturb_student(trainer)
        trainer._check_packing()
        script_rollouts(trainer)
        (inputs,) = rollout(trainer)
        if implementation == "formula":
            loss = loss_by_formula(trainer, inputs, AutoModelForCausalLM.from_pretrained(path).double(), vocab_size)
        else:
            loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad])
        results.append((loss.detach(), gradient.clone()))
    (expected_loss, expected), *others = results
    assert expected.norm() > 1e-3
    for loss, gradient in others:
        assert_close(loss, expected_loss, rtol=1e-8, atol=0)
        # On its way back the gradient passes the model's norms, which round to float32 (6e-8 relative).
        assert (gradient - expected).norm() <= 2e-7 * expected.norm()


def loss_by_formula(trainer, inputs, teacher, vocab_size):
    divergences = []
    for i in range(len(inputs.prompt_ids)):
        completion = inputs.completion_ids[i][inputs.completion_mask[i]]
        prompts = (inputs.prompt_ids[i][inputs.prompt_mask[i].bool()],)
        prompts += (inputs.teacher_prompt_ids[i][inputs.teacher_prompt_mask[i].bool()],)
        logits = [
            model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1, :vocab_size]
            for model, prompt in zip((trainer.model, teacher), prompts, strict=True)
        ]
        divergences.append(generalized_jsd(*logits, beta=0.5))
    return torch.cat(divergences).mean()


def test_student_comes_nearer_and_the_teacher_stays_out_of_the_checkpoints(make_trainer, other, tmp_path):
    trainer = make_trainer(
        fixed_teacher=False,
        teacher_model_name_or_path=other,
        teacher_context="none",
        max_steps=8,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=4,
        callbacks=[recorder := Recorder()],
    )
    before = {name: weight.clone() for name, weight in trainer.teacher.other.state_dict().items()}
    script_rollouts(trainer)
    trainer.train()
    losses = recorder.values("loss")
    assert losses[-1] < 0.8 * losses[0]  # of random distributions; half of it in the run looked at
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.teacher.other.state_dict().items())
    assert not any(weight.requires_grad for weight in trainer.teacher.other.parameters())
    assert not trainer.teacher.other.training
    files = {file.name for file in (tmp_path / "run" / "checkpoint-4").iterdir()}
    assert "adapter_model.safetensors" in files
    assert not [name for name in files if "teacher" in name or name == "model.safetensors"]

    resumed = make_trainer(
        fixed_teacher=False,
        teacher_model_name_or_path=other,
        teacher_context="none",
        max_steps=8,
        learning_rate=1e-2,
        callbacks=[again := Recorder()],
    )
    script_rollouts(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert again.values("loss") == pytest.approx(losses[4:], rel=1e-5)
    with pytest.raises(ValueError, match="its teacher is the other model, and with these flags it would be the base"):
        make_trainer().train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))


def test_what_it_sees(make_trainer, other):
    """With the context none it has the student's prompt, else that with the solution."""
    for context, same in (("none", True), ("solution", False)):
        trainer = make_trainer(fixed_teacher=False, teacher_model_name_or_path=other, teacher_context=context)
        row = trainer.train_dataset[0]
        assert (row["teacher_prompt_ids"] == row["student_prompt_ids"]) == same
        assert (row["solution"] in trainer.processing_class.decode(row["teacher_prompt_ids"])) != same


def test_preflight_passes_and_finds_another_loss(make_trainer, other):
    trainer = make_trainer(fixed_teacher=False, teacher_model_name_or_path=other, use_vllm=False)
    trainer._check_packing()
    checks = run_preflight(trainer)
    assert {check.name for check in checks if check.passed is False} == set()
    assert {"teacher's weights", "padding", "loss"} <= {check.name for check in checks if check.passed}
    with torch.no_grad():  # a head that the fused loss does not get
        trainer.teacher.head = lambda weight: weight.flip(0)
    assert {check.name for check in run_preflight(trainer) if check.passed is False} == {"loss"}


def test_sampled_token_beyond_the_teachers_head(make_trainer, tiny_model_dir, other, tmp_path):
    student = wider_head(tiny_model_dir, tmp_path / "student")
    trainer = make_trainer(model=student, fixed_teacher=False, teacher_model_name_or_path=other)
    largest = student.config.vocab_size - 1
    trainer.sampler.sample = lambda prompts: [Completion([5, largest], None)] * len(prompts)
    with pytest.raises(ValueError, match=f"the student has sampled token {largest}, beyond the tokenizer"):
        rollout(trainer)


# Refused


def test_another_tokenizer_is_refused_with_what_differs(make_trainer, tiny_model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    file = save_model(tmp_path / "other", tiny_model_dir)
    words = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    a, b = tokenizer.convert_ids_to_tokens([10, 11])
    words["model"]["vocab"] |= {a: 11, b: 10}
    words["added_tokens"] = [token for token in words["added_tokens"] if token["content"] != "</think>"]
    words["added_tokens"].append(dict(words["added_tokens"][-1], content="<extra>", id=len(tokenizer) - 1))
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(words))
    settings = json.loads((tmp_path / "other" / "tokenizer_config.json").read_text())
    settings.pop("added_tokens_decoder", None)
    (tmp_path / "other" / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="its tokenizer is not that of") as error:
        make_trainer(fixed_teacher=False, teacher_model_name_or_path=file)
    message = str(error.value)
    assert f"1 tokens in the student's alone, such as '</think>' ({len(tokenizer) - 1})" in message
    assert f"1 tokens in the teacher's alone, such as '<extra>' ({len(tokenizer) - 1})" in message
    assert "2 tokens with other ids, such as" in message and f"{a!r} (10, 11)" in message


def test_chat_template_of_its_own_is_said(make_trainer, tiny_model_dir, tmp_path, caplog):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.eos_token = "<|endoftext|>"
    path = save_model(tmp_path / "other", tiny_model_dir, tokenizer)
    make_trainer(fixed_teacher=False, teacher_model_name_or_path=path)
    assert "has the chat template" in caplog.text and "ends its turns with '<|endoftext|>'" in caplog.text


def test_head_without_all_tokens_and_other_caps_are_refused(make_trainer, tiny_model_dir, tmp_path):
    vocab_size = Qwen3Config.from_pretrained(tiny_model_dir).vocab_size
    small = save_model(tmp_path / "small", tiny_model_dir, vocab_size=vocab_size - 1)
    with pytest.raises(ValueError, match=f"heads of {vocab_size} .* and {vocab_size - 1} .* take a teacher with an"):
        make_trainer(fixed_teacher=False, teacher_model_name_or_path=small)
    capped = save_model(tmp_path / "capped", tiny_model_dir, final_logit_softcapping=5.0)
    with pytest.raises(ValueError, match=r"otherwise than the student.*choose --loss_implementation dense"):
        make_trainer(fixed_teacher=False, teacher_model_name_or_path=capped)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fixed_teacher": True}, "--fixed_teacher True: must be false with --teacher_model_name_or_path m"),
        ({"use_ema_teacher": True}, "--use_ema_teacher True: must be false with --teacher_model_name_or_path m"),
        ({"reason_first": True}, "--reason_first True: must be false with --teacher_model_name_or_path"),
        (
            {"teacher_model_name_or_path": None, "teacher_model_revision": "r"},
            "--teacher_model_revision r: must go with --teacher_model_name_or_path",
        ),
    ],
)
def test_flags_against_each_other(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        OPSDConfig(**{"use_cpu": True, "bf16": False, "teacher_model_name_or_path": "m"} | settings)


def test_saved_statistics_are_scored_by_the_other_model(make_trainer, tiny_model_dir, tmp_path):
    """The teacher's columns are those of the other model's own forward pass, over the entries that both heads have."""
    vocab_size = Qwen3Config.from_pretrained(tiny_model_dir).vocab_size
    path = save_model(tmp_path / "other", tiny_model_dir, vocab_size=vocab_size + NUM_PADDED)
    trainer = make_trainer(
        fixed_teacher=False, teacher_model_name_or_path=path, save_token_statistics=2, max_steps=1, learning_rate=0.0
    )
    script_rollouts(trainer)
    trainer.train()
    (file,) = (tmp_path / "run" / "token_statistics").iterdir()
    teacher = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = trainer.processing_class
    for row in pq.read_table(file).to_pylist():
        prompt = tokenizer.encode(row["teacher_prompt"], add_special_tokens=False)
        ids = row["token_ids"]
        with torch.no_grad():
            logits = teacher(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1, :vocab_size]
        logprobs = (logits / trainer.objective.temperature).log_softmax(-1)
        expected = logprobs.gather(-1, torch.tensor(ids)[:, None])[:, 0]
        assert_close(torch.tensor(row["teacher_logprob"]), expected, rtol=1e-4, atol=1e-4)
        assert (torch.tensor(row["student_logprob"]) - expected).abs().max() > 0.1  # a random teacher
