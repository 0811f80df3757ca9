"""Adapters: what does not fit the base is refused, and other forms are the same function as PEFT's."""

import json
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers import gradient_of_one_step
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import evaluate_math
from eval.benchmarks import Question
from eval.engine import Completion, Sampling, sampling_requests
from opsd import adapters
from opsd.adapters import Adapter, check_model_folder, unserved_settings

INPUT_IDS = torch.arange(20, 60)[None]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def make_adapter(tiny_model_dir, tmp_path):
    """A function that saves an adapter with random weights, and returns its folder and the logits with it."""

    def make(name="adapter", **settings):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
        settings = {"r": 8, "lora_alpha": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM"} | settings
        model = get_peft_model(base, LoraConfig(**settings)).eval()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight += 0.02 * torch.randn_like(weight)
            logits = model(INPUT_IDS).logits
        model.save_pretrained(tmp_path / name)
        return str(tmp_path / name), logits

    return make


def read(folder):
    return Adapter.read(folder, "checkpoint_dir")


def relative_error(model, logits):
    with torch.no_grad():
        return ((model.eval()(INPUT_IDS).logits - logits).norm() / logits.norm()).item()


def load_base(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 1, "alpha_pattern": {"q_proj": 32, "v_proj": 2}},
        {"rank_pattern": {"q_proj": 32}},
        {"rank_pattern": {r"layers\.1\.self_attn\.v_proj": 2}, "alpha_pattern": {"layers.0.self_attn.q_proj": 3}},
        {"use_rslora": True, "rank_pattern": {"o_proj": 16}, "target_modules": ["o_proj", "down_proj"]},
        {"target_modules": ["embed_tokens", "up_proj"], "rank_pattern": {"embed_tokens": 3}},
    ],
    ids=["alpha_pattern", "rank_pattern", "patterns of one layer", "rsLoRA", "embeddings"],
)
def test_patterns_are_folded_into_plain_factors(make_adapter, tiny_model_dir, tmp_path, settings):
    folder, logits = make_adapter(**settings)
    adapter = read(folder)
    adapter.check_base(str(tiny_model_dir))
    plain = read(adapter.make_plain(tmp_path / "plain"))
    plain.check_base(str(tiny_model_dir))
    assert unserved_settings(plain.config) == [] and plain.config.r == adapter.rank
    # float32 rounds by 1e-7 to 1e-6; without the patterns the logits are off by more than 1e-2
    assert relative_error(PeftModel.from_pretrained(load_base(tiny_model_dir), plain.folder), logits) < 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True, "layers_to_transform": [1], "target_modules": ["q_proj"], "lora_dropout": 0.1},
        {"target_modules": "all-linear", "exclude_modules": ["k_proj", "layers.1.mlp.up_proj"]},
        {"target_modules": r".*\.(q|v)_proj", "exclude_modules": r".*layers\.0\..*"},
    ],
    ids=["layers", "excluded names", "excluded pattern"],
)
def test_a_plain_adapter_is_served_from_its_own_folder(make_adapter, tiny_model_dir, tmp_path, settings):
    folder, _ = make_adapter(**settings)
    read(folder).check_base(str(tiny_model_dir))
    assert read(folder).make_plain(tmp_path / "plain") == folder


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"], "rank_pattern": {"q_proj": 4}},
        {"init_lora_weights": "pissa"},
        {"trainable_token_indices": [30, 31]},
        {"target_modules": [], "target_parameters": ["mlp.gate_proj.weight"]},
    ],
    ids=["DoRA", "head", "embeddings", "PiSSA, which changes the base", "tokens", "parameters"],
)
def test_others_are_merged_in_float32(make_adapter, tiny_model_dir, tmp_path, settings):
    folder, logits = make_adapter(**settings)
    adapter = read(folder)
    adapter.check_base(str(tiny_model_dir))
    assert adapter.must_be_merged and adapter.rank == 0
    with pytest.raises(ValueError, match="only merged into the base"):
        adapter.make_plain(tmp_path / "plain")
    adapter.merge(str(tiny_model_dir), str(tmp_path / "merged"))
    assert relative_error(load_base(tmp_path / "merged"), logits) < 1e-5
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def test_what_cannot_be_served_is_refused_by_name(make_adapter, tiny_model_dir, tmp_path):
    for number, settings in enumerate(({"alora_invocation_tokens": [5]}, {"lora_bias": True})):
        folder, _ = make_adapter(str(number), **settings)
        with pytest.raises(
            ValueError, match=f"--checkpoint_dir .*{number}: vLLM cannot serve .* {next(iter(settings))}"
        ):
            assert read(folder).rank
    pissa, _ = make_adapter("pissa", init_lora_weights="pissa_niter_4")  # computed with random numbers
    with pytest.raises(ValueError, match="init_lora_weights pissa_niter_4 changed the base .* plain LoRA"):
        assert read(pissa).rank
    tied, _ = make_adapter("tied", use_dora=True, target_modules=["embed_tokens"])  # the head would change with it
    with pytest.raises(ValueError, match="cannot be merged into"):
        read(tied).merge(str(tiny_model_dir), str(tmp_path / "merged"))


def rename(old, new):
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def without(part):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            rename(".model.layers", ".model.language_model.layers"),
            "24 tensors do not fit .*layers.0.*nothing for the model",
        ),
        (rename("base_model.model.model.", "base_model.model."), "nothing for the model"),
        (rename("layers.2.", "layers.3."), "layers.3.*nothing for the model"),
        (
            lambda t: {n: x for n, x in t.items() if "layers.1.self_attn.q_proj.lora_B" not in n},
            ": 1 tensors .*nothing in the adapter",
        ),
        (
            lambda t: {n: x[:4] if "lora_A" in n else x[:, :4].contiguous() for n, x in t.items()},
            r"\(4, 128\) in the adapter",
        ),
        (lambda t: t | {"base_model.model.lm_head.weight": torch.zeros(494, 128)}, "lm_head.weight"),
    ],
    ids=["other prefix", "no prefix", "layer that is not there", "half of a module", "other rank", "head beside it"],
)
def test_tensors_that_the_model_has_no_place_for(make_adapter, tiny_model_dir, spoil, message):
    folder, _ = make_adapter()
    save_file(spoil(load_file(Path(folder, WEIGHTS))), Path(folder, WEIGHTS))
    with pytest.raises(ValueError, match=f"--checkpoint_dir .*{message}"):
        read(folder).check_base(str(tiny_model_dir))


def test_numbers_that_are_not_finite(make_adapter, tiny_model_dir):
    folder, _ = make_adapter()
    weights = load_file(Path(folder, WEIGHTS))
    weights[min(weights)][0, 0] = torch.nan
    save_file(weights, Path(folder, WEIGHTS))
    with pytest.raises(ValueError, match=f"{min(weights)} are finite; take an earlier checkpoint"):
        read(folder).check_base(str(tiny_model_dir))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "adapter_config.json cannot be read"),
        ('{"r": 8}', "adapter_config.json cannot be read: .*peft_type"),
        ('{"peft_type": "LORA", "use_trick": true, "other": null}', "PEFT would ignore the setting use_trick"),
        ('{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}', "of type .*PROMPT_TUNING; only LORA"),
    ],
    ids=["no JSON", "no type", "unknown setting", "no LoRA"],
)
def test_configurations_that_are_not_understood(make_adapter, text, message):
    folder, _ = make_adapter()
    Path(folder, "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=f"--checkpoint_dir {folder}: .*{message}"):
        read(folder)


def test_adapter_of_another_base(make_adapter, tiny_model_dir, tmp_path, caplog):
    folder, _ = make_adapter(target_modules="all-linear")
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((tiny_model_dir / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"intermediate_size": 512}))
    with pytest.raises(ValueError, match=r"mlp.*256.* in the adapter, .*512.* for the model; is it of another"):
        read(folder).check_base(str(other))
    (other / "config.json").write_text(json.dumps(config))  # as large: only the name tells
    read(folder).check_base(str(other))
    assert "was trained on" in caplog.text and str(other) in caplog.text


def test_adapters_and_models_are_not_taken_for_each_other(make_adapter, tiny_model_dir, tmp_path):
    folder, _ = make_adapter()
    with pytest.raises(ValueError, match=f"--base_model {folder}: holds a LoRA adapter.*{tiny_model_dir}, as --base"):
        check_model_folder(folder, "base_model", "checkpoint_dir")
    with pytest.raises(ValueError, match=f"--checkpoint_dir {tiny_model_dir}: .*whole model: give that as --base"):
        read(tiny_model_dir)
    with pytest.raises(ValueError, match=f"--base_model {tmp_path}: holds no model, config.json is missing"):
        check_model_folder(str(tmp_path), "base_model", "checkpoint_dir")
    check_model_folder(str(tiny_model_dir), "base_model", "checkpoint_dir")
    check_model_folder("Qwen/Qwen3-1.7B", "base_model", "checkpoint_dir")


def test_evaluator_gives_a_merged_adapter_an_engine_of_its_own(make_adapter, tiny_model_dir, monkeypatch):
    """It is sampled first, so that a failure is known before the base is sampled."""
    (dora, logits), (plain, _) = make_adapter("dora", use_dora=True), make_adapter("plain")
    engines = []

    def start_engine(model, **options):
        if model != str(tiny_model_dir):
            assert relative_error(load_base(model), logits) < 1e-5
        engines.append((options["lora_rank"], options.get("dtype")))

    def generate(engine, requests, sampling):
        yield [(request, Completion(str(request.checkpoint), 1, "stop")) for request in requests]

    monkeypatch.setattr(evaluate_math, "start_engine", start_engine)
    monkeypatch.setattr(evaluate_math, "generate", generate)
    monkeypatch.setattr(evaluate_math, "stop_engine", lambda engine: None)
    args = Namespace(base_model=str(tiny_model_dir), checkpoint_dir=[plain, dora], data_parallel=1)
    args.merge_adapter, args.revision = False, None
    question, sampling = Question("b", 0, "1+1", "2", None, [5, 6, 7]), Sampling(val_n=2)
    requests = [r for folder in (None, plain, dora) for r in sampling_requests(folder, [question], sampling)]
    batches = evaluate_math.completions(args, {"lora_rank": 8}, requests, sampling)
    pairs = [pair for batch in batches for pair in batch]
    assert engines == [(0, "float32"), (8, None)]
    assert {request.checkpoint: completion.text for request, completion in pairs} == {
        dora: "None",  # the model itself
        plain: plain,
        None: "None",
    }
    assert len(pairs) == len(requests)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_evaluator_merges_each_adapter_on_request(make_adapter, tiny_model_dir, monkeypatch, tmp_path, dtype):
    """In the dtype of the base, whose files stay as they are, and with an engine that serves no adapters."""
    (first, logits), (second, _) = make_adapter("first"), make_adapter("second")
    base = tmp_path / "base"
    load_base(tiny_model_dir).to(getattr(torch, dtype)).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(base)
    before, engines = (base / "model.safetensors").read_bytes(), []

    def start_and_generate(args, model, options, requests, sampling):
        engines.append((options["lora_rank"], options.get("dtype"), [r.checkpoint for r in requests]))
        if len(engines) == 1:
            weights = load_file(Path(model, "model.safetensors"))
            assert {str(weight.dtype) for weight in weights.values()} == {f"torch.{dtype}"}
            assert relative_error(load_base(model), logits) < (1e-5 if dtype == "float32" else 0.05)
        yield [(request, Completion(model, 1, "stop")) for request in requests]

    monkeypatch.setattr(evaluate_math, "_start_and_generate", start_and_generate)
    args = Namespace(base_model=str(base), checkpoint_dir=[first, second], merge_adapter=True, revision=None)
    question, sampling = Question("b", 0, "1+1", "2", None, [5, 6, 7]), Sampling(val_n=1)
    requests = [r for folder in (None, first, second) for r in sampling_requests(folder, [question], sampling)]
    batches = evaluate_math.completions(args, {"lora_rank": 0}, requests, sampling)
    answered = [(r.checkpoint, completion.text) for batch in batches for r, completion in batch]
    assert engines == [(0, None, [None])] * 3
    assert [checkpoint for checkpoint, _ in answered] == [first, second, None]
    assert not any(Path(model).exists() for _, model in answered[:2]) and answered[2][1] == str(base)
    assert (base / "model.safetensors").read_bytes() == before


def test_a_merge_that_rounds_the_adapter_away_is_refused(make_adapter, tiny_model_dir, tmp_path, caplog):
    folder, _ = make_adapter()
    file = Path(folder, "adapter_model.safetensors")
    save_file({key: tensor * 1e-3 for key, tensor in load_file(file).items()}, file)
    read(folder).merge(str(tiny_model_dir), str(tmp_path / "merged"))
    assert "merged in float32: log-probabilities change by" in caplog.text
    with pytest.raises(ValueError, match=r"in bfloat16: log-probabilities change by .*without --merge_adapter"):
        read(folder).merge(str(tiny_model_dir), str(tmp_path / "rounded"), dtype=torch.bfloat16)


# Training


def test_gradient_without_input_casts_is_the_same_bit_for_bit(make_trainer, monkeypatch):
    """Casts of bfloat16 to float32 and back change nothing, in the forward pass and in the recomputed one."""
    settings = {"bf16": True, "gradient_checkpointing": True, "model_init_kwargs": {"dtype": "bfloat16"}}
    dtypes = []
    original = LoraLayer._cast_input_dtype

    def cast(layer, x, dtype):
        assert dtype == torch.float32
        dtypes.append(original(layer, x, dtype).dtype)
        return original(layer, x, dtype)

    monkeypatch.setattr(LoraLayer, "_cast_input_dtype", cast)
    gradient, loss, _ = gradient_of_one_step(make_trainer, 2, **settings)
    assert set(dtypes) == {torch.bfloat16}
    dtypes.clear()
    monkeypatch.setattr(adapters, "disable_input_dtype_casting", lambda *args, **kwargs: nullcontext())
    expected, expected_loss, _ = gradient_of_one_step(make_trainer, 2, **settings)
    assert set(dtypes) == {torch.float32}
    assert gradient.count_nonzero() > 0.9 * len(gradient)
    assert torch.equal(gradient, expected) and loss == expected_loss


def test_input_casts_stay_without_autocast_and_come_back_after_the_training(make_trainer):
    trainer = make_trainer(max_steps=1, bf16=True)
    layers = [module for module in trainer.model.modules() if isinstance(module, LoraLayer)]
    seen = []

    def look(*args, **kwargs):
        seen.append({layer.cast_input_dtype_enabled for layer in layers})
        raise KeyboardInterrupt

    trainer.compute_loss = look
    for has_autocast in (False, True):
        trainer.accelerator.native_amp = has_autocast
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert all(layer.cast_input_dtype_enabled for layer in layers)
    assert seen == [{True}, {False}]


def test_ddp_does_not_look_for_unused_weights_of_an_adapter(make_trainer):
    def handler(**settings):
        return make_trainer(gradient_checkpointing=False, **settings).accelerator.ddp_handler

    assert not handler().find_unused_parameters
    assert handler(ddp_find_unused_parameters=True).find_unused_parameters
    assert handler(lora=False).find_unused_parameters  # transformers' own choice
