"""The preflight: sound runs pass it and are left as they were, and it names the claim that a planted fault breaks."""

import dataclasses
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from helpers import Recorder, make_problems, make_trainer_factory
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import data_collator
import opsd_train
import opsd_trainer
from opsd import preflight
from opsd.preflight import Preflight, PreflightError, run_preflight
from opsd.rollouts import Completion, VLLMSampler
from opsd_trainer import OPSDTrainer

ENGINES = {
    "float32": {"temperature": 1.1, "top_p": 0.95, "top_k": 20, "presence_penalty": 0.5},
    "bfloat16": {"bf16": True, "model_init_kwargs": {"dtype": "bfloat16"}},
    "full fine-tuning": {"lora": False, "learning_rate": 1e-4},
}


@pytest.fixture(scope="module")
def make_in_module(tiny_model_dir, tmp_path_factory) -> Callable[..., OPSDTrainer]:
    return make_trainer_factory(tiny_model_dir, make_problems(), tmp_path_factory.mktemp("preflight"))


@pytest.fixture(scope="module", params=ENGINES)
def trained(request, make_in_module) -> Iterator[tuple[OPSDTrainer, Recorder]]:
    """A trainer with an engine, after a training with preflight."""
    trainer = make_in_module(use_vllm=True, callbacks=[recorder := Recorder()], **ENGINES[request.param])
    trainer.add_callback(Preflight(trainer))
    trainer.train()
    yield trainer, recorder
    trainer.sampler.close()


@pytest.fixture
def trainer(trained) -> OPSDTrainer:
    """The trainer with the adapter of the first step, which is zero."""
    trainer, _ = trained
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                weight.zero_()
    return trainer


def failed(checks: list[preflight.Check]) -> set[str]:
    assert {check.name for check in checks} <= set(preflight.MEANINGS)
    return {check.name for check in checks if check.passed is False}


def random_state() -> list:
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


def assert_same_training(recorder: Recorder, trainer: OPSDTrainer, other_recorder: Recorder, other: OPSDTrainer):
    for name in ("loss", "grad_norm", "num_generated_tokens", "completions/mean_length", "entropy"):
        assert len(recorder.values(name)) == 2 and recorder.values(name) == other_recorder.values(name), name
    for (name, weight), other_weight in zip(trainer.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(weight, other_weight), name


# Sound runs


@pytest.mark.vllm
def test_training_is_the_same_without_it(trained, make_in_module, monkeypatch, request):
    trainer, recorder = trained
    settings = ENGINES[request.node.callspec.params["trained"]]

    def share_engine(args, model, *_):
        trainer.sampler.model = model
        return trainer.sampler

    monkeypatch.setattr(opsd_trainer, "make_vllm_sampler", share_engine)
    other = make_in_module(use_vllm=True, callbacks=[other_recorder := Recorder()], **settings)
    other.train()
    trainer.sampler.model = trainer.model
    assert_same_training(recorder, trainer, other_recorder, other)


@pytest.mark.vllm
def test_a_sound_run_passes_and_is_left_as_it_was(trained):
    trainer, _ = trained
    trainer.model.train()
    weights = [weight.clone() for weight in trainer.model.parameters()]
    before, limit = random_state(), trainer.sampler.max_completion_length
    checks = run_preflight(trainer)
    assert [check.name for check in checks if check.passed is not True] == []
    assert {check.name for check in checks} >= {"prompts", "on-policy", "padding", "loss"}
    assert random_state() == before and trainer.model.training
    assert trainer.sampler.max_completion_length == limit
    for weight, other in zip(trainer.model.parameters(), weights, strict=True):
        assert torch.equal(weight, other)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"fixed_teacher": False, "loss_implementation": "dense", "teacher_context": "none"},
        {"lora": False, "use_tinker_loss": True},
        {"fixed_teacher": False, "use_ema_teacher": True, "teacher_prefill": "<think>\n"},
        {"lora": False, "fixed_teacher": True},
        {"max_length": 300, "top_k_loss": 5, "lora_settings": {"lora_dropout": 0.5}},
    ],
    ids=[
        "LoRA",
        "current teacher, nothing to learn",
        "full fine-tuning",
        "EMA teacher, prefill",
        "full fine-tuning, fixed teacher",
        "shortened solutions, dropout",
    ],
)
def test_sound_runs_without_vllm(make_trainer, problems, settings):
    if "max_length" in settings:
        problems = problems.map(lambda row: {"solution": row["solution"] * 20})
    runs = []
    for callback in (Preflight, None):
        trainer = make_trainer(problems, callbacks=[recorder := Recorder()], **settings)
        if callback is not None:
            trainer.add_callback(callback(trainer))
        trainer.train()
        runs += [recorder, trainer]
    assert_same_training(*runs)
    checks = run_preflight(trainer)
    assert failed(checks) == set()
    assert {check.name for check in checks if check.passed is None} == (
        {"on-policy", "fixed teacher"} if trainer.teacher.is_base else {"on-policy"}
    )


class EagerSampler(VLLMSampler):
    """In place of an engine: the model in training, whose log-probabilities come from another attention kernel."""

    def __init__(self, trainer: OPSDTrainer):
        self.trainer, self.transformers = trainer, trainer.sampler
        self.max_model_length, self.max_completion_length = 1000, 40

    def sync_weights(self) -> None:
        pass

    def sample(self, prompts, base=False, min_p=0.0, presence_penalty=0.0, **settings):
        model = self.trainer.model
        with model.disable_adapter() if base else nullcontext():
            completions = [ids for ids, _ in self.transformers.sample(prompts, **settings)]
            model.set_attn_implementation("eager")
            pairs = zip(prompts, completions, strict=True)
            logprobs = [preflight._logprobs(self.trainer, [p], [c]).tolist() for p, c in pairs]
            model.set_attn_implementation("sdpa")
        return [Completion(*pair) for pair in zip(completions, logprobs, strict=True)]


@pytest.fixture(scope="module")
def deep_trainer(tiny_model_dir, tmp_path_factory) -> OPSDTrainer:
    """A trainer in bfloat16 on a random model of 28 layers, whose rounding errors add up as those of large ones do."""
    folder = tmp_path_factory.mktemp("deep")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 28, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), initializer_range=0.06, **sizes, **heads))
    model.lm_head.weight.data *= 5  # sharper than a random head: few tokens are probable
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    make = make_trainer_factory(folder / "model", make_problems(), folder)
    trainer = make(bf16=True, model_init_kwargs={"dtype": "bfloat16", "attn_implementation": "sdpa"})
    trainer.sampler = EagerSampler(trainer)
    trainer.model_wrapped = trainer.accelerator.prepare(trainer.model)
    return trainer


def test_rounding_errors_of_a_deep_model_pass(deep_trainer):
    checks = run_preflight(deep_trainer)
    assert failed(checks) == set()
    assert {check.name for check in checks if check.passed} >= {"sensitivity", "on-policy", "fixed teacher", "padding"}


def test_noise_that_moves_the_student_too_far_is_lowered(deep_trainer, monkeypatch):
    monkeypatch.setattr(preflight, "NOISE", 0.1)
    (sensitivity,) = [check for check in run_preflight(deep_trainer) if check.name == "sensitivity"]
    effect = float(sensitivity.measured.split()[1])
    assert preflight.SENSITIVITY * preflight.TOLERANCES["bfloat16"].mean <= effect <= preflight.MAX_EFFECT


def test_adapter_lost_in_a_deep_model(deep_trainer, monkeypatch):
    sample = deep_trainer.sampler.sample
    monkeypatch.setattr(deep_trainer.sampler, "sample", lambda prompts, base=False, **s: sample(prompts, True, **s))
    assert failed(run_preflight(deep_trainer)) == {"on-policy"}


# Faults


@contextmanager
def changed_weights(model: torch.nn.Module, name: str) -> Iterator[None]:
    """Multiply the weights whose names contain `name`; after the block they are as before."""
    weights = [weight.data for key, weight in model.named_parameters() if name in key]
    before = [weight.clone() for weight in weights]
    for weight in weights:
        weight.mul_(1.2)
    assert weights
    yield
    for weight, value in zip(weights, before, strict=True):
        weight.copy_(value)


@contextmanager
def adapter_that_is_not_loaded(trainer, patch):
    patch.setattr(trainer.sampler, "_load_adapter", lambda folder: None)
    patch.setattr(trainer.sampler, "_adapter", None)
    yield


@contextmanager
def adapter_of_an_earlier_sync(trainer, patch):
    trainer.sampler.sync_weights()
    patch.setattr(trainer.sampler, "sync_weights", lambda: None)
    yield


@contextmanager
def base_that_has_been_merged(trainer, patch):
    with changed_weights(trainer.model, "v_proj.base_layer.weight"):
        yield


@contextmanager
def base_of_vllm_that_has_been_merged(trainer, patch):
    with changed_weights(trainer.sampler.llm.llm_engine.model_executor.driver_worker.model_runner.model, "norm"):
        yield


@contextmanager
def sync_that_merges_and_unmerges(trainer, patch):
    sync_weights = trainer.sampler.sync_weights

    def merge_and_sync():
        trainer.model.merge_adapter()
        trainer.model.unmerge_adapter()
        sync_weights()

    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    patch.setattr(trainer.sampler, "sync_weights", merge_and_sync)
    yield
    for name, weight in trainer.model.named_parameters():
        weight.data.copy_(before[name])


@contextmanager
def teacher_with_the_adapter_on(trainer, patch):
    patch.setattr(trainer.teacher, "active", lambda model: nullcontext(model))
    yield


def encode_anew(trainer, patch):
    dataset = trainer.train_dataset.map(trainer.collator.encode, load_from_cache_file=False)
    patch.setattr(trainer, "train_dataset", dataset)


@contextmanager
def special_tokens_lost_on_the_way(trainer, patch):
    encode = data_collator.encode_chat_prompt

    def encode_and_lose(tokenizer, *args, **kwargs):
        text = tokenizer.decode(encode(tokenizer, *args, **kwargs), skip_special_tokens=True)
        return tokenizer(text, add_special_tokens=False).input_ids

    patch.setattr(data_collator, "encode_chat_prompt", encode_and_lose)
    encode_anew(trainer, patch)
    yield


@contextmanager
def template_without_special_tokens(trainer, patch):
    tokenizer = trainer.processing_class
    template = tokenizer.chat_template.replace("<|im_start|>", "").replace("<|im_end|>", "")
    patch.setattr(tokenizer, "chat_template", template)
    encode_anew(trainer, patch)
    yield


@contextmanager
def prompts_without_the_header(trainer, patch):
    apply = trainer.processing_class.apply_chat_template
    with pytest.MonkeyPatch.context() as within:
        within.setattr(
            trainer.processing_class,
            "apply_chat_template",
            lambda *args, **kwargs: apply(*args, **kwargs | {"add_generation_prompt": False}),
        )
        encode_anew(trainer, patch)
    yield


@contextmanager
def prompts_padded_on_the_right(trainer, patch):
    pad = data_collator.pad
    patch.setattr(data_collator, "pad", lambda *args, **kwargs: pad(*args, **kwargs | {"padding_side": "right"}))
    if trainer is not None:
        patch.setattr(trainer, "_is_packed", False)
    yield


@contextmanager
def sequences_of_a_row_that_see_each_other(trainer, patch):
    lay = data_collator.PackedRole.of_sequences

    def lose_the_ends(sequences):
        role = lay(sequences)
        return dataclasses.replace(role, lengths=[sum(role.lengths)])

    patch.setattr(data_collator.PackedRole, "of_sequences", lose_the_ends)
    yield


@contextmanager
def noise_that_does_not_show(trainer, patch):
    patch.setattr(preflight, "NOISE", 0.0)
    patch.setattr(preflight, "NUM_NOISE_TRIALS", 1)
    yield


def shift_losses(trainer, patch, shifted_implementation, shift):
    token_losses = trainer.token_losses

    def shifted(model, batch, implementation=None):
        losses = token_losses(model, batch, implementation)
        return losses._replace(loss=losses.loss + shift) if implementation == shifted_implementation else losses

    patch.setattr(trainer, "token_losses", shifted)


@contextmanager
def wrong_fused_loss(trainer, patch):
    shift_losses(trainer, patch, "fused", 2 * preflight.TOLERANCES["float32"].mean)
    yield


@contextmanager
def loss_that_is_not_a_number(trainer, patch):
    shift_losses(trainer, patch, "dense", torch.nan)
    yield


FAULTS = [
    (adapter_that_is_not_loaded, {"on-policy"}),
    (base_that_has_been_merged, {"on-policy", "fixed teacher"}),
    (sync_that_merges_and_unmerges, {"fixed teacher"}),
    (prompts_padded_on_the_right, {"padding"}),
    (sequences_of_a_row_that_see_each_other, {"padding"}),
    (adapter_of_an_earlier_sync, {"on-policy"}),
    (base_of_vllm_that_has_been_merged, {"on-policy", "fixed teacher"}),
    (teacher_with_the_adapter_on, {"fixed teacher"}),
    (special_tokens_lost_on_the_way, {"prompts"}),
    (template_without_special_tokens, {"prompts"}),
    (prompts_without_the_header, {"prompts"}),
    (noise_that_does_not_show, {"sensitivity"}),
    (wrong_fused_loss, {"loss"}),
    (loss_that_is_not_a_number, {"loss"}),
]


@pytest.mark.vllm
@pytest.mark.parametrize("trained", ["float32"], indirect=True)
@pytest.mark.parametrize(("fault", "claims"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_fault_is_named(trainer, fault, claims):
    with pytest.MonkeyPatch.context() as patch, fault(trainer, patch):
        checks = run_preflight(trainer)
    assert failed(checks) == claims


@pytest.mark.vllm
@pytest.mark.parametrize("trained", ["bfloat16"], indirect=True)
def test_faults_are_named_in_bfloat16(trainer):
    for fault, claims in FAULTS[:4]:
        with pytest.MonkeyPatch.context() as patch, fault(trainer, patch):
            checks = run_preflight(trainer)
        assert failed(checks) == claims, fault.__name__


def test_refused_before_anything_is_done(tiny_model_dir, tmp_path, problems, monkeypatch, caplog):
    """`--preflight` with a planted fault: the error, the table, and nothing sampled or saved."""
    problems.to_json(tmp_path / "train.jsonl")
    arguments = {
        "model_name_or_path": tiny_model_dir,
        "dataset_name": tmp_path / "train.jsonl",
        "config": opsd_train.__file__.replace("opsd_train.py", "quickstart/opsd.yaml"),
        "output_dir": tmp_path / "out",
        "per_device_train_batch_size": 4,
        "use_vllm": False,
        "packing": False,
        "preflight": True,
    }
    caplog.set_level(logging.INFO)
    with prompts_padded_on_the_right(None, monkeypatch), pytest.raises(PreflightError) as error:
        opsd_train.main([part for name, value in arguments.items() for part in (f"--{name}", str(value))])
    assert failed(error.value.checks) == {"padding"}
    assert "padding: log-probabilities depend on the padding" in str(error.value)
    (table,) = [record.getMessage() for record in caplog.records if record.name == "opsd.preflight"]
    assert table.count("DOES NOT HOLD") == 2 and "not checked" in table
    assert not list((tmp_path / "out").glob("completions*")) and not list((tmp_path / "out").glob("checkpoint*"))
