"""vLLM rollouts in training, with a real engine on the tiny model: they are the student's and leave no trace."""

import functools
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    LOGPROB_GAP,
    MEAN_LOGPROB_GAP,
    Recorder,
    make_problems,
    make_trainer_factory,
    rollout,
    saved_rollouts,
    script_rollouts,
    work_out,
)
from peft import LoraConfig

from data_collator import MicroBatch
from eval.engine import start_engine
from opsd.adapters import check_vllm_lora_support
from opsd.rollouts import TransformersSampler, VLLMSampler, prompt_keys, sample_seeds
from opsd.vllm_engine import CPU_ENVIRONMENT, ENVIRONMENT, engine_options, load_adapter, multiply_adapters_at_once
from opsd_trainer import OPSDTrainer


@pytest.fixture(scope="module")
def trainer(tiny_model_dir, tmp_path_factory) -> Iterator[OPSDTrainer]:
    """A trainer with an engine and a random adapter. Tests restore what they change."""
    make_trainer = make_trainer_factory(tiny_model_dir, make_problems(), tmp_path_factory.mktemp("rollouts"))
    trainer = make_trainer(use_vllm=True, lora_settings={"init_lora_weights": False})
    yield trainer
    trainer.sampler.close()


def student_logprobs(trainer: OPSDTrainer, batch: MicroBatch) -> torch.Tensor:
    """Log-probabilities of the sampled tokens by the training forward, (N,)."""
    with torch.no_grad():
        logits = trainer.completion_logits(trainer.model, batch, "student")
    return logits.log_softmax(-1).gather(1, batch.of_tokens(batch.completion_ids)[:, None]).squeeze(1)


def gap(trainer: OPSDTrainer, batch: MicroBatch) -> torch.Tensor:
    """Distance of the sampler's log-probabilities from them, (N,), in nats."""
    return (student_logprobs(trainer, batch) - batch.of_tokens(batch.sampler_logprobs)).abs()


def test_seeds_are_those_of_the_sample_wherever_it_stands():
    prompts = [[1, 2], [3], [1, 2], [1]]
    keys = prompt_keys(prompts, seed=0, step=5)
    seeds = sample_seeds(keys)
    assert len(set(seeds)) == 4  # repeated prompts too, which shall give different completions
    assert sample_seeds(prompt_keys([[3], [1, 2]], seed=0, step=5)) == [seeds[1], seeds[0]]
    for other in (prompt_keys(prompts, seed=0, step=6), prompt_keys(prompts, seed=1, step=5)):
        assert not set(seeds) & set(sample_seeds(other))
    assert sample_seeds(keys[2:], keys_before=keys[:2]) == seeds[2:]  # the second of two processes
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("has_gpu", [False, True])
def test_engines_need_no_compiler_and_multiply_the_head_in_float32(monkeypatch, has_gpu):
    """Those of rollouts and of the evaluator, which both start with `engine_options`."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    for name in ENVIRONMENT | CPU_ENVIRONMENT:
        monkeypatch.setenv(name, "")  # restored after the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    assert engine_options(0.5)["hf_overrides"] == {"head_dtype": "float32"}
    assert os.environ["VLLM_USE_FLASHINFER_SAMPLER"] == "0" and os.environ["VLLM_LOGGING_LEVEL"] == "ERROR"
    assert ("VLLM_CPU_KVCACHE_SPACE" in os.environ) != has_gpu

    monkeypatch.setattr("vllm.LLM", lambda model, **options: options)
    options = start_engine("a model", lora_rank=16, lora_modules=["v_proj", "q_proj"])
    assert options["hf_overrides"] == {"head_dtype": "float32"}
    assert options["max_lora_rank"] == 16 and options["lora_target_modules"] == ["q_proj", "v_proj"]


@pytest.fixture
def products(monkeypatch):
    """vLLM's own module of the products with adapters; its wrapper with ours in their place, until the test ends."""
    pytest.importorskip("vllm", reason="the products with adapters are compared with those of vLLM")
    engine_options()  # before vLLM's import
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    own = importlib.util.module_from_spec(lora_ops.__spec__)  # a fresh one, whatever an engine has put into lora_ops
    lora_ops.__spec__.loader.exec_module(own)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for module in (lora_ops, punica_cpu):
        for name in ("bgmv_shrink", "bgmv_expand_slice"):
            monkeypatch.setattr(module, name, getattr(own, name))
    multiply_adapters_at_once()
    assert punica_cpu.bgmv_shrink is not own.bgmv_shrink
    return own, punica_cpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize(
    ("lengths", "adapters"), [([1] * 6, [1, 0, 2, 1, 2, 0]), ([4, 1, 7], [2, 0, 2]), ([3, 5, 2, 1], [1, -1, 0, -1])]
)
def test_products_with_adapters_are_those_of_vllm(products, lengths, adapters, rank, dtype):
    """
    Of sequences of several tokens and of one, each with its adapter.

    Index -1 is a sequence without one. vLLM's kernels for GPUs add nothing there. Its CPU build adds the last one.
    """
    vllm, ours = products
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator).to(dtype)

    inner, outer, offset, width, tokens = 24, 20, 6, 12, sum(lengths)  # the slice is that of a merged layer
    inputs, a, b = normal(tokens, inner), normal(3, 1, rank, inner), normal(3, 1, width, rank)
    before_a, before_b = normal(tokens, rank + 2, dtype=torch.float32), normal(tokens, outer)
    sequences = torch.tensor(lengths)
    shape = (sequences.cumsum(0) - sequences, sequences, torch.tensor(adapters), len(lengths), max(lengths), tokens)
    results = {}
    for name, module in (("vllm", vllm), ("ours", ours)):
        small, added, replaced = before_a.clone(), before_b.clone(), before_b.clone()
        module.sgmv_shrink(inputs, a, small, *shape, 0.5)
        module.sgmv_expand_slice(small[:, :rank], b, added, *shape, offset, width, add_inputs=True)
        module.sgmv_expand_slice(small[:, :rank], b, replaced, *shape, offset, width, add_inputs=False)
        results[name] = small, added, replaced
    with_adapter = sequences.new_tensor(adapters).repeat_interleave(sequences) >= 0
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for own, expected in zip(results["ours"], results["vllm"], strict=True):
        torch.testing.assert_close(own[with_adapter], expected[with_adapter], **tolerance)
    small, added, replaced = (result[~with_adapter] for result in results["ours"])
    assert (small[:, :rank] == 0).all() and (replaced[:, offset : offset + width] == 0).all()
    assert torch.equal(added, before_b[~with_adapter])


@pytest.mark.vllm
def test_rollouts_follow_each_change_of_the_adapter(trainer):
    """The same prompts in the same step, so that a stale adapter or prefix cache would show."""
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    before = [weight.detach().clone() for weight in weights]
    completions = []
    for scale in (0.0, 1.0, -1.0):
        for weight, original in zip(weights, before, strict=True):
            weight.data.copy_(scale * original)
        (batch,) = rollout(trainer)
        assert gap(trainer, batch).mean() <= MEAN_LOGPROB_GAP and gap(trainer, batch).max() <= LOGPROB_GAP
        completions.append(batch.completion_ids.tolist())
        with trainer.model.disable_adapter():
            base_gap = gap(trainer, batch).mean()
        assert base_gap <= MEAN_LOGPROB_GAP if scale == 0.0 else base_gap > 0.1
    for weight, original in zip(weights, before, strict=True):
        weight.data.copy_(original)
    assert completions[0] != completions[1]


@pytest.mark.vllm
def test_a_sync_hands_over_the_adapter_and_nothing_else(trainer):
    trained = sum(weight.nbytes for weight in trainer.model.parameters() if weight.requires_grad)
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.sampler.sync_weights()
    assert trainer.sampler.adapter_bytes == trained  # in float32, as the engine
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(weight, before[name]), name


def adapter_in_engine(trainer: OPSDTrainer) -> dict[str, list[torch.Tensor]]:
    """Copies of the factors that the engine computes with."""
    worker = trainer.sampler.llm.llm_engine.model_executor.driver_worker
    modules = worker.model_runner.lora_manager._adapter_manager.modules
    return {n: [t.clone() for t in (*m.lora_a_stacked, *m.lora_b_stacked)] for n, m in modules.items()}


def load_from_files(trainer: OPSDTrainer, folder: Path) -> None:
    """Hand over the adapter as vLLM reads it from a folder."""
    from vllm.lora.request import LoRARequest

    sampler, engine = trainer.sampler, trainer.sampler.llm.llm_engine
    trainer.model.save_pretrained(folder)
    engine.remove_lora(sampler._adapter.lora_int_id)
    sampler._adapter = LoRARequest("from files", 1_000_000, str(folder))
    engine.add_lora(sampler._adapter)


@pytest.mark.vllm
def test_adapter_on_modules_that_the_engine_does_not_adapt(trainer):
    """Left out without a word, they would make rollouts those of another policy."""
    tensors = trainer.sampler._adapter_tensors("cpu", torch.float32)
    tensors = {name.replace("layers.0.mlp.down_proj", "layers.0.mlp.router"): t for name, t in tensors.items()}
    with pytest.raises(ValueError, match=r"no place for the adapter's 1 modules such as model.layers.0.mlp.router"):
        load_adapter(trainer.sampler.llm, 2_000_000, tensors, trainer.sampler._lora_config)
    trainer.sampler._adapter = None
    trainer.sampler.sync_weights()


def test_sleep_frees_the_cache_and_copies_no_weights(monkeypatch):
    """With LoRA, through vLLM's own engine core: no `sleep` reaches the worker, which would copy the base."""
    from vllm.v1.core.sched.interface import PauseState
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    calls, states = [], []
    executor = UniProcExecutor.__new__(UniProcExecutor)
    executor.sleeping_tags = set()
    executor.collective_rpc = lambda method, args=(), kwargs=None: calls.append((method, *args, kwargs))
    core = EngineCore.__new__(EngineCore)
    core.model_executor, core.batch_queue = executor, None
    core.scheduler = SimpleNamespace(pause_state=PauseState.UNPAUSED, has_requests=lambda: False)
    core.scheduler.finish_requests = lambda *_: None
    core.scheduler.set_pause_state = lambda state: setattr(core.scheduler, "pause_state", state)
    core._finish_pause = core._reset_caches = lambda *_: None

    sampler = VLLMSampler.__new__(VLLMSampler)
    sampler.enable_sleep_mode, sampler.tensor_parallel_size, sampler._llm_weights_sleeping = True, 1, False
    monkeypatch.setattr(VLLMSampler, "_lora_config", LoraConfig())

    def generate(*_, **__):
        states.append((core.is_scheduler_paused(), core.model_executor.is_sleeping))
        return []

    core.generate = generate
    sampler.llm = core
    sampler._sleep()
    for _ in range(2):
        sampler._sample_colocated([], [], {}, None)
    assert states == [(False, False)] * 2 and core.is_scheduler_paused()
    discard, wake = ("discard", ("kv_cache",), None), ("wake_up", {"tags": ["kv_cache"]})
    assert calls == [discard, wake, discard, wake, discard]


@pytest.mark.vllm
def test_completions_do_not_depend_on_their_place(trainer):
    prompts = [trainer.train_dataset[i]["student_prompt_ids"] for i in range(4)]
    trainer.sampler.step = 7
    _, completions, _, token_ids = trainer.sampler.generate(prompts, temperature=2.0)
    _, reversed_completions, _, _ = trainer.sampler.generate(prompts[::-1], temperature=2.0)
    assert reversed_completions[::-1] == completions
    assert [[ids for (ids,) in row] for row in token_ids] == completions
    trainer.sampler.step = 8
    _, other_step, _, _ = trainer.sampler.generate(prompts, temperature=2.0)
    assert other_step != completions


@pytest.mark.vllm
def test_repeated_prompts_get_different_completions(trainer):
    prompt = trainer.train_dataset[0]["student_prompt_ids"]
    _, completions, _, _ = trainer.sampler.generate([prompt] * 8, temperature=2.0)  # a sharp model would repeat itself
    assert len(set(map(tuple, completions))) > 1


@pytest.mark.vllm
def test_sampling_settings_reach_vllm(trainer, monkeypatch):
    seen = []
    generate = trainer.sampler.llm.generate

    def spy(prompts, parameters, **kwargs):
        seen.extend(parameters)
        return generate(prompts, parameters, **kwargs)

    monkeypatch.setattr(trainer.sampler.llm, "generate", spy)
    for name, value in {"temperature": 0.7, "top_p": 0.9, "top_k": 11, "min_p": 0.02}.items():
        monkeypatch.setattr(trainer.sampler, name, value)
    monkeypatch.setitem(trainer.sampler.generation_kwargs, "presence_penalty", 0.5)
    rollout(trainer)
    assert len(seen) == 4 and len({parameters.seed for parameters in seen}) == 4
    for parameters in seen:
        assert (parameters.temperature, parameters.top_p, parameters.top_k) == (0.7, 0.9, 11)
        assert (parameters.min_p, parameters.presence_penalty, parameters.repetition_penalty) == (0.02, 0.5, 1.0)
        assert parameters.max_tokens == 40


@pytest.mark.vllm
def test_greedy_rollouts_equal_those_of_transformers(trainer, monkeypatch):
    monkeypatch.setattr(trainer.sampler, "top_k", 1)
    (sampled,) = rollout(trainer)
    monkeypatch.setattr(trainer.generation_config, "top_k", 1)
    arguments = trainer.model, trainer.accelerator, trainer.generation_config
    monkeypatch.setattr(trainer, "sampler", TransformersSampler(*arguments))
    (expected,) = rollout(trainer)
    for name in ("prompt_ids", "prompt_mask", "teacher_prompt_ids", "teacher_prompt_mask"):
        assert torch.equal(getattr(sampled, name), getattr(expected, name)), name
    for batch in (sampled, expected):  # where two tokens are as good to rounding, each may take another one
        with torch.no_grad():
            logits = trainer.completion_logits(trainer.model, batch, "student")
        token_ids = batch.of_tokens(batch.completion_ids)
        assert (logits.max(-1).values - logits.gather(1, token_ids[:, None])[:, 0]).max() <= 1e-3
        for ids, mask in zip(batch.completion_ids, batch.completion_mask, strict=True):
            *before, last = ids[mask].tolist()
            assert not set(before) & set(trainer.end_ids) and (last in trainer.end_ids or len(before) == 39)


@pytest.mark.vllm
def test_base_samples_are_those_of_the_model_without_adapter(trainer, monkeypatch):
    monkeypatch.setattr(trainer.sampler, "sample", functools.partial(trainer.sampler.sample, base=True))
    (batch,) = rollout(trainer)
    assert gap(trainer, batch).mean() > 0.1
    with trainer.model.disable_adapter():
        assert gap(trainer, batch).max() <= LOGPROB_GAP
    lengths = batch.completion_mask.sum(1)
    assert lengths.min() < 40 and lengths.max() == batch.completion_mask.shape[1]  # they end, and no padding


# Engines of their own, whose end takes that of the trainer above with them


@pytest.mark.vllm
def test_adapter_without_a_file_in_bfloat16(make_trainer, tmp_path):
    """The engine holds what it would read from a file, multiplies logits in float32, and adapts no other modules."""
    settings = {"bf16": True, "model_init_kwargs": {"dtype": "bfloat16"}}
    trainer = make_trainer(use_vllm=True, lora_settings={"init_lora_weights": False}, **settings)
    prompts = [trainer.train_dataset[i]["student_prompt_ids"] for i in range(4)]
    weights = [weight.clone() for weight in trainer.model.parameters()]
    trainer.sampler.sync_weights()
    in_memory, sampled = adapter_in_engine(trainer), trainer.sampler.sample(prompts)
    load_from_files(trainer, tmp_path / "adapter")
    from_files = adapter_in_engine(trainer)
    assert in_memory.keys() == from_files.keys() and sampled == trainer.sampler.sample(prompts)
    for name, factors in in_memory.items():
        for factor, other in zip(factors, from_files[name], strict=True):
            assert factor.dtype == torch.bfloat16 and factor.any() and torch.equal(factor, other), name
    assert {name.rpartition(".")[2] for name in in_memory} == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    for weight, before in zip(trainer.model.parameters(), weights, strict=True):
        assert torch.equal(weight, before)

    worker = trainer.sampler.llm.llm_engine.model_executor.driver_worker
    model = worker.model_runner.model
    logits = model.compute_logits(torch.ones(1, model.config.hidden_size, dtype=torch.bfloat16))
    assert model.lm_head.weight.dtype == torch.bfloat16 and logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())
    trainer.sampler.close()


@pytest.mark.vllm
@pytest.mark.parametrize("settings", [{}, {"lora": False}, {"loss_implementation": "dense"}], ids=str)
def test_training_stays_on_policy(make_trainer, problems, settings):
    """LoRA and full fine-tuning at a high learning rate, several micro-batches, rollouts of evaluation included."""
    recorder = Recorder()
    trainer = make_trainer(
        use_vllm=True,
        max_steps=3,
        learning_rate=1e-2 if settings.get("lora", True) else 1e-3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        temperature=1.1,
        top_p=0.95,
        top_k=20,
        eval_dataset=problems.select(range(6)),
        eval_strategy="steps",
        eval_steps=1,
        callbacks=[recorder],
        **settings,
    )
    base = {n: w.clone() for n, w in trainer.model.named_parameters() if not w.requires_grad}
    trainer.train()
    trainer.sampler.close()
    maxima = recorder.values("sampling/sampling_logp_difference/max") + recorder.values(
        "eval_sampling/sampling_logp_difference/max"
    )
    means = recorder.values("sampling/sampling_logp_difference/mean") + recorder.values(
        "eval_sampling/sampling_logp_difference/mean"
    )
    assert len(maxima) == 6 and max(maxima) <= LOGPROB_GAP and max(means) <= MEAN_LOGPROB_GAP
    assert min(means) > 0.0
    for name, weight in base.items():
        assert torch.equal(trainer.model.get_parameter(name), weight), name


@pytest.mark.vllm
def test_resumed_run_goes_on_with_the_same_rollouts(make_trainer, tmp_path):
    settings = {"use_vllm": True, "max_steps": 4, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
    recorder = Recorder()
    trainer = make_trainer(callbacks=[recorder], **settings)
    trainer.train()
    trainer.sampler.close()
    expected = saved_rollouts(tmp_path / "run")
    trainer = make_trainer(callbacks=[resumed := Recorder()], **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    trainer.sampler.close()
    assert saved_rollouts(tmp_path / "run") == expected
    assert resumed.values("loss") == pytest.approx(recorder.values("loss")[2:], rel=1e-6)
    assert max(resumed.values("sampling/sampling_logp_difference/max")) <= LOGPROB_GAP
    assert len({record["completion"] for record in expected}) > 1


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"modules_to_save": ["lm_head"]}, "--lora_modules_to_save"),
        ({"use_dora": True}, "--use_dora"),
        ({"rank_pattern": {"q_proj": 4}}, "--rank_pattern"),
        ({"init_lora_weights": "pissa"}, "--init_lora_weights pissa"),
        ({"trainable_token_indices": [3]}, "--trainable_token_indices"),
    ],
)
def test_adapters_that_vllm_does_not_serve(make_trainer, settings, flag):
    with pytest.raises(ValueError, match=flag):
        check_vllm_lora_support(LoraConfig(**settings))
    with pytest.raises(ValueError, match=flag):
        make_trainer(use_vllm=True, lora_settings=settings)


def test_a_server_that_is_not_there(make_trainer):
    with pytest.raises(ConnectionError, match=r"(?s)vLLM server at http://localhost:9 .*serve_vllm.sh"):
        make_trainer(
            use_vllm=True, vllm_mode="server", vllm_server_base_url="http://localhost:9", vllm_server_timeout=0
        )


def test_model_length_that_does_not_hold_the_longest_prompt(make_trainer):
    with pytest.raises(ValueError, match="--vllm_max_model_length 50: the longest prompt needs"):
        make_trainer(use_vllm=True, vllm_max_model_length=50)


@pytest.mark.parametrize(("sequences_per_call", "num_calls"), [(100, 1), (3, 3)])
def test_transformers_samples_in_few_calls(make_trainer, monkeypatch, sequences_per_call, num_calls):
    trainer, calls = make_trainer(), []
    script_rollouts(trainer)
    generate = trainer.model.generate

    def count(input_ids, **kwargs):
        calls.append(input_ids.shape[0])
        return generate(input_ids, **kwargs)

    trainer.model.generate = count
    examples = [trainer.train_dataset[row] for row in range(7)]
    prompts = [example["student_prompt_ids"] for example in examples]
    bytes_of_a_sequence = trainer.sampler._cache_bytes(max(map(len, prompts)) + trainer.args.max_completion_length)
    config = trainer.model.config  # keys and values of float32 in each layer
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert bytes_of_a_sequence == per_token * (max(map(len, prompts)) + trainer.args.max_completion_length)
    monkeypatch.setattr("opsd.rollouts.CACHE_BYTES", sequences_per_call * bytes_of_a_sequence)
    completions = trainer.sampler.sample(prompts)
    assert len(calls) == num_calls and sum(calls) == 7
    texts = [trainer.processing_class.decode(completion.ids) for completion in completions]
    assert texts == [work_out(example["problem"]) for example in examples]  # each has its own prompt's
