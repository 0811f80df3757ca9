"""Teachers with weights of their own: an average of the student, and the start policy of a full fine-tuning."""

from itertools import accumulate

import pytest
import torch
from accelerate import Accelerator
from helpers import EMA, copies, rollout, teacher_logits
from peft import PeftModel
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, TrainerCallback

from opsd import teacher

DECAY = EMA["ema_decay"]


class Students(TrainerCallback):
    """Keeps the trained weights: at the start, and after each step."""

    def __init__(self):
        self.weights = []

    def keep(self, model):
        self.weights.append({n: w.detach().double().clone() for n, w in model.named_parameters() if w.requires_grad})

    def on_train_begin(self, *args, model, **kwargs):
        self.keep(model)

    def on_step_end(self, *args, model, **kwargs):
        self.keep(model)


@pytest.mark.parametrize("lora", [True, False])
def test_ema_teacher_follows_the_closed_form(make_trainer, lora):
    students = Students()
    trainer = make_trainer(lora=lora, max_steps=5, callbacks=[students], **EMA)
    trainer.train()
    start, *after = students.weights
    assert len(after) == 5
    for name, copy in copies(trainer).items():
        expected = DECAY**5 * start[name]
        expected += (1 - DECAY) * sum(DECAY ** (5 - i) * after[i - 1][name] for i in range(1, 6))
        assert copy.dtype == torch.float32
        assert_close(copy.double(), expected, rtol=0, atol=1e-6)
        assert lora or not torch.equal(copy, after[-1][name].float())


def test_ema_teacher_scores_with_its_own_weights_and_gives_the_students_back(make_trainer):
    trainer = make_trainer(max_steps=3, **EMA)
    (inputs,) = rollout(trainer)
    start = teacher_logits(trainer, inputs)
    trainer.train()
    student = {n: w.detach().clone() for n, w in trainer.model.named_parameters()}
    average = teacher_logits(trainer, inputs)
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(weight, student[name]), name
        assert weight.requires_grad == ("lora_" in name)
    assert not torch.allclose(average, start, atol=1e-3)
    for name, weight in trainer.model.named_parameters():  # the teacher's weights put in by hand
        if name in copies(trainer):
            weight.data.copy_(copies(trainer)[name])
    with torch.no_grad():
        assert_close(trainer.completion_logits(trainer.model, inputs, "teacher"), average, rtol=0, atol=0)


def test_first_step_is_that_of_the_fixed_teacher(make_trainer):
    def first_loss(**settings):
        trainer = make_trainer(max_steps=1, **settings)
        trainer.train()
        return trainer.state.log_history[0]["loss"]

    assert first_loss(**EMA) == pytest.approx(first_loss(fixed_teacher=True), rel=1e-6)


def test_teacher_of_some_steps_ago(make_trainer):
    students = Students()
    trainer = make_trainer(max_steps=5, callbacks=[students], **EMA | {"ema_decay": 0.0, "ema_update_steps": 2})
    trainer.train()
    for name, copy in copies(trainer).items():
        assert_close(copy, students.weights[4][name].float(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "settings", [EMA, {"lora": False, "fixed_teacher": True, "learning_rate": 1e-3}], ids=["ema", "full fine-tuning"]
)
def test_resumed_teacher_is_the_one_that_was_saved(make_trainer, settings, tmp_path):
    settings = settings | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(**settings)
    whole.train()
    resumed = make_trainer(**settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, copy in copies(resumed).items():
        assert_close(copy, copies(whole)[name], rtol=0, atol=0)
    losses = [[logs["loss"] for logs in t.state.log_history if "loss" in logs] for t in (whole, resumed)]
    assert losses[0] == losses[1]

    (tmp_path / "run" / "checkpoint-2" / "teacher_weights_0.safetensors").unlink()
    with pytest.raises(ValueError, match="teacher_weights_0.safetensors is missing or does not hold"):
        make_trainer(**settings).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


@pytest.mark.parametrize(("before", "after"), [(EMA, {}), ({}, EMA), (EMA, {"fixed_teacher": False})])
def test_resuming_with_another_teacher_is_refused(make_trainer, before, after, tmp_path):
    save = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(**save | {"max_steps": 1} | before).train()
    with pytest.raises(ValueError, match="its teacher is the (average|base), and with these flags it would be the"):
        make_trainer(**save | after).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


@pytest.mark.parametrize("tinker", [False, True])
def test_teacher_of_a_full_fine_tuning_has_a_head_of_its_own(make_trainer, tinker):
    """The fused loss, which multiplies with the head itself, against the dense one."""
    trainer = make_trainer(lora=False, max_steps=1, use_tinker_loss=tinker, **EMA)
    trainer.train()
    (inputs,) = rollout(trainer)
    dense, *_ = trainer.token_losses(trainer.model, inputs, "dense")
    fused, *_ = trainer.token_losses(trainer.model, inputs, "fused")
    assert dense.abs().max() > 1e-2
    assert_close(fused, dense, rtol=1e-4, atol=1e-5)


def test_skipped_step_does_not_move_the_teacher(make_trainer):
    students = Students()
    trainer = make_trainer(max_steps=2, callbacks=[students], **EMA)
    get_grad_norm = trainer._get_grad_norm
    trainer._get_grad_norm = lambda model, grad_norm=None: get_grad_norm(
        model, torch.tensor(float("nan")) if trainer.state.global_step == 1 else grad_norm
    )
    trainer.train()
    start, first, _ = students.weights
    for name, copy in copies(trainer).items():
        assert_close(copy.double(), DECAY * start[name] + (1 - DECAY) * first[name], rtol=0, atol=1e-6)


def test_fixed_teacher_of_a_full_fine_tuning_stays(make_trainer, tiny_model_dir):
    trainer = make_trainer(lora=False, fixed_teacher=True, max_steps=3, learning_rate=1e-3)
    trainer._check_packing()
    (inputs,) = rollout(trainer)
    start = teacher_logits(trainer, inputs)  # before training the model is its own start policy
    trainer.train()
    assert torch.equal(teacher_logits(trainer, inputs), start)
    with torch.no_grad():
        student = trainer.completion_logits(trainer.model, inputs, "teacher")
    assert not torch.allclose(student, start, atol=1e-3)
    stored = load_file(tiny_model_dir / "model.safetensors")
    assert all(torch.equal(copy, stored[name]) for name, copy in copies(trainer).items())


def test_float32_copies_do_not_stall_where_the_weights_are_bfloat16(make_trainer):
    """0.999 of a bfloat16 weight and 0.001 of another round to the first: the copies have to be finer."""
    trainer = make_trainer(
        max_steps=1, bf16=True, model_init_kwargs={"dtype": "bfloat16"}, **EMA | {"ema_decay": 0.999}, lora=False
    )
    trainer.train()
    start = {name: copy.clone() for name, copy in copies(trainer).items()}
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight.mul_(1.5)
    trainer.teacher.weights.update()
    for name, copy in copies(trainer).items():
        weight = trainer.model.get_parameter(name).float()
        assert_close(copy, 0.999 * start[name] + 0.001 * weight, rtol=1e-6, atol=1e-8)
        assert not torch.equal(copy, start[name])


def test_fixed_teacher_of_an_adapter_that_is_trained_is_the_policy_with_it(make_trainer, tmp_path):
    """Continued self-distillation: the start policy is not the base."""
    first = make_trainer(max_steps=3, learning_rate=1e-2)
    first.train()
    first.save_model(str(tmp_path / "first"))
    assert first.teacher.is_base and first.teacher.weights is None
    base = AutoModelForCausalLM.from_pretrained(first.model.name_or_path)
    model = PeftModel.from_pretrained(base, tmp_path / "first", is_trainable=True)
    trainer = make_trainer(model=model, max_steps=3, learning_rate=1e-2)
    assert not trainer.teacher.is_base
    trainer._check_packing()
    (inputs,) = rollout(trainer)
    with torch.no_grad():
        start = trainer.completion_logits(trainer.model, inputs, "teacher")
        with trainer.model.disable_adapter():
            assert not torch.allclose(trainer.completion_logits(trainer.model, inputs, "teacher"), start, atol=1e-3)
    trainer.train()
    assert torch.equal(teacher_logits(trainer, inputs), start)
    with torch.no_grad():
        assert not torch.allclose(trainer.completion_logits(trainer.model, inputs, "teacher"), start, atol=1e-3)


def test_first_tokens_can_be_left_out_of_the_loss(make_trainer):
    trainer = make_trainer(num_loss_tokens_to_skip=3, loss_implementation="dense")
    (inputs,) = rollout(trainer)
    assert torch.equal(inputs.loss_mask, inputs.completion_mask & (torch.arange(inputs.loss_mask.shape[1]) >= 3))
    num_counted = inputs.loss_mask.sum()
    assert trainer._loss_denominator == num_counted < inputs.completion_mask.sum()
    per_token, _, _ = trainer.token_losses(trainer.model, inputs, "dense")
    inputs.loss_mask = inputs.completion_mask
    all_tokens, _, _ = trainer.token_losses(trainer.model, inputs, "dense")
    positions = torch.arange(inputs.loss_mask.shape[1]).expand_as(inputs.loss_mask)[inputs.completion_mask]
    assert_close(per_token, all_tokens[positions >= 3], rtol=0, atol=0)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["num_generated_tokens"] > num_counted and logged["divergence/first_tokens"] > 0.0


def test_text_can_be_put_behind_the_header_of_the_teacher_alone(make_trainer):
    plain, prefilled = (make_trainer(teacher_prefill=text).train_dataset[0] for text in ("", "<think>\n"))
    ids = make_trainer().processing_class("<think>\n", add_special_tokens=False).input_ids
    assert prefilled["teacher_prompt_ids"] == plain["teacher_prompt_ids"] + ids
    assert prefilled["student_prompt_ids"] == plain["student_prompt_ids"]


def test_loss_temperature_is_not_that_of_the_rollouts(make_trainer):
    trainer = make_trainer(temperature=1.3, loss_temperature=0.7)
    assert trainer.generation_config.temperature == 1.3 and trainer.objective.temperature == 0.7
    assert make_trainer(temperature=1.3).objective.temperature == 1.3


def test_checksum_makes_no_copy_of_a_weight(monkeypatch):
    """PyTorch sums 16-bit integers as an int64 copy, four times their size. The sum is that of the whole weight."""
    monkeypatch.setattr(teacher, "NUM_SUMMED_AT_ONCE", 2**16)
    model = torch.nn.Linear(1023, 2048, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    frozen = teacher.FrozenWeights(model, Accelerator(cpu=True))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        frozen.check()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = list(accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())))
    assert 8 * 2**16 <= max(held) < model.weight.nbytes / 4
    assert frozen._sums_at_start.tolist() == [model.weight.view(torch.int16).sum(dtype=torch.int64).item()]
    model.weight.view(torch.int16)[-1, -1] += 1
    with pytest.raises(RuntimeError, match="frozen weights have changed"):
        frozen.check()
