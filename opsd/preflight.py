"""
Check before the first step that the claims of the method hold in this run, on this machine: `--preflight`.

Noise on the trained weights makes the student differ from the base. So a lost adapter shows although it is still zero.
After the checks the weights are what they were, bit for bit, and so are the states of all random generators.
"""

import logging
import math
import random
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl.trainer.utils import selective_log_softmax

from data_collator import ELLIPSIS, MicroBatch, Rollout, fill_template, start_rollouts
from opsd.rollouts import VLLMSampler
from opsd.teacher import edit_local_shards
from opsd_trainer import OPSDTrainer

logger = logging.getLogger(__name__)

NUM_PROMPTS = 4
NUM_CANDIDATES = 64  # the shortest of them are taken
NUM_TOKENS = 32  # maximum length of a completion
NOISE = 0.01  # standard deviation of the first trial
NUM_NOISE_TRIALS = 8


class Tolerance(NamedTuple):
    """Largest allowed difference of two log-probabilities of a token, in nats: on average, and at most."""

    mean: float
    maximum: float

    def __str__(self) -> str:
        return f"mean {self.mean:.2g}, max {self.maximum:.2g}"


# By the coarsest arithmetic that takes part: training and vLLM round in different places. The maximum is for faults at
# single tokens, such as the first one after padding.
TOLERANCES = {
    "float32": Tolerance(1e-4, 1e-3),  # 24 significant bits; measured on CPU: mean to 1e-6, max to 2e-5
    "tf32": Tolerance(1e-2, 0.25),  # float32 on a GPU, where kernels of vLLM may multiply with 11 bits; not measured
    "float16": Tolerance(1e-2, 0.25),  # 11 bits; not measured
    "bfloat16": Tolerance(5e-2, 1.0),  # 8 bits; measured on CPU: mean to 0.026, max to 0.4
}
# Rounding errors grow with the depth: two sound bfloat16 forwards of a random model of 3 layers differ by 0.02 to 0.05
# on average, of 36 layers by 0.08 to 0.17, and by up to 2.3 at a token. So the model's own are measured, with another
# attention kernel, and so many times them are allowed too.
ROUNDING = Tolerance(2, 4)
SENSITIVITY = 16  # the noise moves the student by so many mean tolerances, and so would a lost adapter
MAX_EFFECT = 1.6  # nats; noise that moves the student further is lowered, for rounding errors grow with it
MAX_SHARE = 0.25  # of that effect: no mean tolerance is larger, whatever the rounding errors

# Meaning of a check that fails, and the way out
MEANINGS = {
    "prompts": "the model is not asked in the form of its chat template, for instance because special tokens were "
    "lost. Use the model's own tokenizer and chat template, and delete the cache of the data set",
    "sensitivity": "noise on the trained weights does not change the student, so that the other checks are blind. Is "
    "the adapter switched off, or on modules that the forward pass does not use (--lora_target_modules)?",
    "on-policy": "vLLM does not sample from the student: it did not get the adapter, or its base is not the one in "
    "training. Look at --model_revision, --dtype and, with --vllm_mode server, at the model and flags of the server; "
    "or sample without --use_vllm",
    "fixed teacher": "the teacher is not the initial policy: its base weights are not those on disk (an adapter "
    "merged into them?), or it follows the adapter. Load the model anew and merge nothing into it",
    "teacher's weights": "the teacher's own weights are not put in place for its forward pass, or follow the student "
    "between two steps",
    "current teacher": "the teacher is not the current policy: both score the same tokens differently after the same "
    "prompt",
    "padding": "log-probabilities depend on the padding. Prompts must be padded on the left "
    "(SelfDistillationDataCollator), and the attention must honour the mask: try --attn_implementation sdpa",
    "loss": "the loss is not the divergence of student and teacher. Try --loss_implementation dense",
}


class Check(NamedTuple):
    """One line of the table."""

    name: str  # a key of MEANINGS
    compared: str
    measured: str
    tolerance: str
    passed: bool | None  # None: not checked, for the reason in `measured`


class PreflightError(RuntimeError):
    """Raised when a check fails. `checks` are all of them."""

    def __init__(self, checks: list[Check]):
        self.checks = checks
        failed = [check for check in checks if check.passed is False]
        lines = [
            f"- {check.name}: {check.compared}: {check.measured} (tolerance: {check.tolerance})" for check in failed
        ]
        lines += [f"{name}: {MEANINGS[name]}." for name in dict.fromkeys(check.name for check in failed)]
        super().__init__(
            "preflight: a claim of the method does not hold, so there is no training\n"
            + "\n".join(lines)
            + "\n--preflight false trains all the same"
        )


class Preflight(TrainerCallback):
    """Runs the checks once the model is wrapped and the checkpoint loaded; raises `PreflightError`."""

    def __init__(self, trainer: OPSDTrainer):
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        start = time.perf_counter()
        checks = run_preflight(self.trainer)
        logger.info("preflight, %.1f s\n%s", time.perf_counter() - start, format_table(checks))
        if any(check.passed is False for check in checks):
            raise PreflightError(checks)


def format_table(checks: list[Check]) -> str:
    """Write the checks in columns."""
    verdicts = {True: "holds", False: "DOES NOT HOLD", None: "not checked"}
    rows = [("check", "compared", "measured", "tolerance", "verdict")]
    rows += [(*check[:-1], verdicts[check.passed]) for check in checks]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


@torch.no_grad()
def run_preflight(trainer: OPSDTrainer) -> list[Check]:
    """
    Check the claims of the method on a few prompts of the data set. All processes call it together.

    Returns:
        The same checks on all processes: for each, that of a process where it failed, or of the main process.
    """
    rollouts = pick_rollouts(trainer)
    checks = [_check_prompts(trainer, rollouts)]
    with _restore_rng_and_mode(trainer), _float32_logits(trainer), _noise(trainer) as add_noise:
        checks += _check_model(trainer, rollouts, add_noise)
    checks_of_processes = zip(*gather_object([checks]), strict=True)
    return [min(same_check, key=lambda check: check.passed is not False) for same_check in checks_of_processes]


def pick_rollouts(trainer: OPSDTrainer) -> list[Rollout]:
    """Pick the shortest of the first examples, if possible with whole solutions, and half of one, for padding."""
    dataset, collator = trainer.train_dataset, trainer.collator
    candidates = list(dataset.select(range(min(len(dataset), NUM_CANDIDATES))))
    if "solution" not in dataset.column_names:  # any text will do
        candidates = [{"reference": row["problem"], "solution": row["problem"]} | row for row in candidates]
        candidates = [row | collator.encode(row) for row in candidates]
    examples = sorted(candidates, key=lambda row: (row["length_status"] != "kept", len(row["teacher_prompt_ids"])))
    half = {name: examples[0][name][: len(examples[0][name]) // 2] for name in ("problem", "solution")}
    half |= {"history": examples[0].get("history")}
    return start_rollouts([*examples[: NUM_PROMPTS - 1], examples[0] | half | collator.encode(half)])


# Prompts


def _check_prompts(trainer: OPSDTrainer, rollouts: Sequence[Rollout]) -> Check:
    """Check the prompts in the micro-batch."""
    collator, batch = trainer.collator, trainer.collator(rollouts)
    roles = [("student", collator.student_prompt, collator.student_thinking, batch.prompt_ids, batch.prompt_mask)]
    template, thinking, prefill = collator.student_prompt, collator.student_thinking, []
    if collator.sees_more:
        template, thinking = collator.teacher_prompt, collator.teacher_thinking
        prefill = collator.teacher_prefill_ids
    roles.append(("teacher", template, thinking, batch.teacher_prompt_ids, batch.teacher_prompt_mask))
    num_prompts, faults = 0, []
    for role, template, thinking, prompts, masks in roles:
        for rollout, ids, mask in zip(rollouts, prompts, masks, strict=True):
            content = fill_template(template, **{**rollout.texts, "solution": rollout.reference or ""})
            prompt_ids = ids[mask.bool()].tolist()
            if role == "teacher":
                if ELLIPSIS in collator.tokenizer.decode(prompt_ids):
                    continue  # a shortened solution
                prompt_ids = prompt_ids[: len(prompt_ids) - len(prefill)]
            has_own = role == "teacher" and collator.sees_more
            history = collator.teacher_history(rollout.history) if has_own else rollout.history
            turns = [*history, {"role": "user", "content": content}]
            fault = prompt_fault(collator.tokenizer, prompt_ids, turns, thinking)
            num_prompts += 1
            faults += [] if fault is None else [f"{role}_prompt: {fault}"]
    measured = f"{num_prompts - len(faults)} of {num_prompts}"
    if faults:
        measured += f"; {faults[0]}"
    return Check("prompts", "token ids against the chat template", measured, "all", not faults)


def prompt_fault(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], turns: list[Mapping[str, str]], thinking: bool
) -> str | None:
    """Say what is wrong with the ids of some turns and the header of the assistant's turn; `None`: nothing."""
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False, enable_thinking=thinking)
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    counts = {token: text.count(token) for token in special if token in text}
    if not counts:
        return "the chat template writes no special token that the tokenizer knows"
    for token, count in counts.items():
        if ids.count(special[token]) != count:
            return f"{token} is in the text {count} times, among the ids {ids.count(special[token])} times"
    if ids != tokenizer(text, add_special_tokens=False).input_ids:
        return f"the ids are not those of the text, which ends with {text[-40:]!r}"
    if _normalize(decoded := tokenizer.decode(ids)) != _normalize(text):
        return f"the ids spell another text, which ends with {decoded[-40:]!r}"
    return None


def _normalize(text: str) -> str:
    """Take off what tokenizers may change: white space and the form of Unicode."""
    return "".join(unicodedata.normalize("NFKC", text).split())


# Model


def _check_model(trainer: OPSDTrainer, rollouts: list[Rollout], add_noise: Callable[[float], None]) -> list[Check]:
    least, sampler = choose_tolerance(trainer), trainer.sampler
    prompts = [rollout.prompt_ids for rollout in rollouts]
    teacher_prompts = [rollout.teacher_prompt_ids for rollout in rollouts]
    solutions = [
        trainer.processing_class(rollout.solution, add_special_tokens=False).input_ids[:NUM_TOKENS]
        for rollout in rollouts
    ]
    server = trainer.teacher.server
    teacher_before = _logprobs(trainer, teacher_prompts, solutions, as_teacher=True) if server is None else None

    least_effect = SENSITIVITY * least.mean
    scale, too_little, too_much = NOISE, 0.0, math.inf
    for _ in range(NUM_NOISE_TRIALS):
        add_noise(scale)
        completions, sampled_logprobs = solutions, None
        if isinstance(sampler, VLLMSampler):
            sampler.sync_weights()
            completions, sampled_logprobs = _sample(sampler, prompts)
        student = _logprobs(trainer, prompts, completions)
        add_noise(0.0)
        effect = _least_distance(trainer, student, prompts, completions)
        add_noise(scale)
        if least_effect <= effect <= MAX_EFFECT:
            break
        if effect < least_effect:
            too_little, factor = scale, min(max(math.sqrt(2 * least_effect / max(effect, 1e-9)), 1.3), 2.0)
        else:
            too_much, factor = scale, min(max(math.sqrt(MAX_EFFECT / 2 / effect), 0.25), 0.8)
        is_between = 0.0 < too_little < too_much < math.inf
        scale = math.sqrt(too_little * too_much) if is_between else scale * factor
    checks = [
        Check(
            "sensitivity",
            "student with noise against without",
            f"mean {effect:.1e}",
            f"at least {least_effect:g}",
            effect >= least_effect,
        )
    ]
    rounding = (student - _other_logprobs(trainer, prompts, completions)).abs()
    tolerance = Tolerance(
        min(max(least.mean, ROUNDING.mean * rounding.mean().item()), MAX_SHARE * max(effect, least_effect)),
        max(least.maximum, ROUNDING.maximum * rounding.max().item()),
    )
    if sampled_logprobs is not None:
        checks.append(_compare("on-policy", "vLLM against the student", sampled_logprobs, student, tolerance))
    else:
        checks.append(Check("on-policy", "vLLM against the student", "no vLLM here", "", None))
    if teacher_before is None:
        checks.append(Check("teacher's weights", "before and after noise and sync", "on a server", "", None))
    else:
        checks += _check_teacher(trainer, teacher_prompts, solutions, teacher_before, tolerance)

    for rollout, ids in zip(rollouts, completions, strict=True):
        rollout.completion_ids = ids
    if server is not None:
        server.score(rollouts)
    batch = trainer.collator(rollouts).to(trainer.accelerator.device)
    batch.loss_mask = batch.completion_mask  # all tokens, whatever --num_loss_tokens_to_skip says
    batch.sampler_logprobs = torch.zeros_like(batch.completion_ids, dtype=torch.float32)
    checks += _check_padding(trainer, batch, prompts, teacher_prompts, completions, tolerance)
    return checks + _check_loss(trainer, batch, least)  # both losses start from the same hidden states


def _check_teacher(
    trainer: OPSDTrainer, prompts: list[list[int]], completions: list[list[int]], before: Tensor, tolerance: Tolerance
) -> list[Check]:
    now = _logprobs(trainer, prompts, completions, as_teacher=True)
    if trainer.teacher.kind == "student":
        deviation = (now - _logprobs(trainer, prompts, completions)).abs().max().item()
        return [
            Check("current teacher", "against the student, same prompt", f"max {deviation:.1e}", "0", deviation == 0.0)
        ]
    deviation = (now - before).abs().max().item()
    measured = ("before and after noise and sync", f"max {deviation:.1e}", "0", deviation == 0.0)
    if not trainer.teacher.is_base:
        return [Check("teacher's weights", *measured)]
    checks = [Check("fixed teacher", "vLLM without adapter against it", "no vLLM here", "", None)]
    if isinstance(trainer.sampler, VLLMSampler):
        room = trainer.sampler.max_model_length - NUM_TOKENS  # vLLM need not take prompts as long as the teacher's
        contexts = [prompt[-room:] for prompt in prompts]
        base_completions, base_logprobs = _sample(trainer.sampler, contexts, base=True)
        teacher = _logprobs(trainer, contexts, base_completions, as_teacher=True)
        checks = [_compare("fixed teacher", "vLLM without adapter against it", base_logprobs, teacher, tolerance)]
    return [*checks, Check("fixed teacher", *measured)]


def _check_padding(
    trainer: OPSDTrainer,
    batch: MicroBatch,
    prompts: list[list[int]],
    teacher_prompts: list[list[int]],
    completions: list[list[int]],
    tolerance: Tolerance,
) -> list[Check]:
    token_ids = batch.of_tokens(batch.completion_ids)
    model, checks = trainer.model_wrapped, []
    for role, role_prompts in (("student", prompts), ("teacher", teacher_prompts)):
        if role == "teacher" and trainer.teacher.server is not None:
            continue
        with trainer.teacher.active(model) if role == "teacher" else nullcontext(model) as network:
            logits = trainer.completion_logits(network, batch, role)
        padded = selective_log_softmax(logits.float(), token_ids)
        alone = _logprobs(trainer, role_prompts, completions, as_teacher=role == "teacher")
        checks.append(_compare("padding", f"{role} in a batch against each prompt alone", padded, alone, tolerance))
    return checks


def _check_loss(trainer: OPSDTrainer, batch: MicroBatch, tolerance: Tolerance) -> list[Check]:
    dense, statistics, _ = trainer.token_losses(trainer.model_wrapped, batch, "dense")  # (N,)
    divergence = statistics.divergence.mean().item()
    # A teacher that is the student, also in its prompt, has nothing to teach. The noise makes the student another
    # policy than a teacher with weights of its own.
    has_lesson = trainer.teacher.kind != "student" or trainer.args.teacher_context != "none"
    is_sound = bool(dense.isfinite().all()) and (divergence > 0.0 if has_lesson else divergence == 0.0)
    checks = [
        Check("loss", "divergence of the micro-batch", f"{divergence:.1e}", "> 0" if has_lesson else "0", is_sound)
    ]
    if trainer.args.loss_implementation == "fused":
        fused, *_ = trainer.token_losses(trainer.model_wrapped, batch, "fused")
        scale = dense.abs().mean().clamp(min=1.0)
        checks.append(_compare("loss", "fused against dense", fused / scale, dense / scale, tolerance))
    return checks


def choose_tolerance(trainer: OPSDTrainer) -> Tolerance:
    """Choose the tolerance of the dtype that student and vLLM compute in."""
    mixed_precision = {"bf16": "bfloat16", "fp16": "float16"}.get(trainer.accelerator.mixed_precision)
    dtype = mixed_precision or str(trainer.model.dtype).removeprefix("torch.")
    if dtype == "float32" and trainer.accelerator.device.type == "cuda":
        dtype = "tf32"
    return TOLERANCES[dtype]


def _compare(name: str, compared: str, values: Tensor, others: Tensor, tolerance: Tolerance) -> Check:
    gap = (values.float().cpu() - others.float().cpu()).abs()
    mean, maximum = gap.mean().item(), gap.max().item()
    passed = mean <= tolerance.mean and maximum <= tolerance.maximum  # NaN is not
    return Check(name, compared, f"mean {mean:.1e}, max {maximum:.1e}", str(tolerance), passed)


def _logprobs(
    trainer: OPSDTrainer, prompts: list[list[int]], completions: list[list[int]], as_teacher: bool = False
) -> Tensor:
    """Score the completions' tokens, (N,), float32 on the CPU, one by one and so without padding."""
    student, logprobs = trainer.model_wrapped, []
    with trainer.teacher.active(student) if as_teacher else nullcontext(student) as model:
        for prompt, completion in zip(prompts, completions, strict=True):
            if not completion:
                continue
            input_ids = torch.tensor([prompt + completion], device=trainer.accelerator.device)
            logits = model(input_ids=input_ids, logits_to_keep=len(completion) + 1, use_cache=False).logits[0, :-1]
            logprobs.append(selective_log_softmax(logits.float(), input_ids[0, len(prompt) :]).cpu())
    return torch.cat(logprobs)


def _other_logprobs(trainer: OPSDTrainer, prompts: list[list[int]], completions: list[list[int]]) -> Tensor:
    """Score as `_logprobs` does, with another attention kernel, which rounds in other places."""
    policy = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    attention = policy.config._attn_implementation
    policy.set_attn_implementation("sdpa" if attention == "eager" else "eager")
    try:
        return _logprobs(trainer, prompts, completions)
    finally:
        policy.set_attn_implementation(attention)


def _least_distance(
    trainer: OPSDTrainer, logprobs: Tensor, prompts: list[list[int]], completions: list[list[int]]
) -> float:
    """Return the mean distance of `logprobs` from the model as it is, or from its base if that is nearer."""
    others = [_logprobs(trainer, prompts, completions)]
    policy = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    if isinstance(policy, PeftModel):
        with policy.disable_adapter():
            others.append(_logprobs(trainer, prompts, completions))
    distance = torch.stack([(logprobs - other).abs().mean() for other in others]).min()
    # The same on all processes, for they all go on or stop.
    return trainer.accelerator.reduce(distance.to(trainer.accelerator.device), "mean").item()


def _sample(sampler: VLLMSampler, prompts: list[list[int]], base: bool = False) -> tuple[list[list[int]], Tensor]:
    """
    Sample short rollouts from vLLM, with the adapter or without.

    They come from the full distribution at temperature 1, for which vLLM reports the same log-probabilities in all
    modes.

    Returns:
        Token ids, and the log-probabilities (N,) that vLLM reports of them.
    """
    completions = sampler.sample(
        prompts,
        base=base,
        max_tokens=min(NUM_TOKENS, sampler.max_completion_length),
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        presence_penalty=0.0,
    )
    logprobs = torch.tensor([value for completion in completions for value in completion.logprobs or []])
    return [completion.ids for completion in completions], logprobs


# Noise that leaves no trace


@contextmanager
def _noise(trainer: OPSDTrainer) -> Iterator[Callable[[float], None]]:
    """
    Yields a function that adds normal noise of a given standard deviation to the trained weights as they were before
    the block, the same at each call. After the block they are as before, bit for bit.

    In full fine-tuning only vectors get noise, those of the norms: they are in every layer, and easily kept.
    """
    has_adapter = isinstance(trainer.model, PeftModel)
    weights = [
        weight
        for weight in trainer.model.parameters()
        if weight.requires_grad and (has_adapter or len(getattr(weight, "ds_shape", weight.shape)) == 1)
    ]
    with edit_local_shards(trainer.model_wrapped, weights) as shards:
        before = [shard.to("cpu", copy=True) for shard in shards]
    generator = torch.Generator().manual_seed(trainer.args.seed)
    noise = [torch.randn(shard.shape, generator=generator) for shard in before]

    def write(values: list[Tensor]) -> None:
        with edit_local_shards(trainer.model_wrapped, weights) as shards:
            for shard, value in zip(shards, values, strict=True):
                shard.copy_(value)

    try:
        yield lambda scale: write([shard + scale * noise_ for shard, noise_ in zip(before, noise, strict=True)])
    finally:
        write(before)


@contextmanager
def _float32_logits(trainer: OPSDTrainer) -> Iterator[None]:
    """Multiply with plain heads in float32 in the block, as the fused loss and vLLM do."""
    with ExitStack() as heads:
        for network in trainer.teacher.networks(trainer.model_wrapped):
            head = trainer.accelerator.unwrap_model(network).get_output_embeddings()
            if isinstance(head, nn.Linear) and not isinstance(head, BaseTunerLayer):  # else: as the model has it
                heads.enter_context(_float32_head(head))
        yield


@contextmanager
def _float32_head(head: nn.Linear) -> Iterator[None]:
    """Multiply with one head in float32 in the block."""

    def forward(hidden_states: Tensor) -> Tensor:
        bias = None if head.bias is None else head.bias.float()
        with torch.autocast(hidden_states.device.type, enabled=False):
            return nn.functional.linear(hidden_states.float(), head.weight.float(), bias)

    own = vars(head).pop("forward", None)
    head.forward = forward
    try:
        yield
    finally:
        del head.forward
        vars(head).update({} if own is None else {"forward": own})


@contextmanager
def _restore_rng_and_mode(trainer: OPSDTrainer) -> Iterator[None]:
    """Switch dropout off in the block; after it, restore the random state and the mode of the model."""
    device = trainer.accelerator.device
    python_state, numpy_state, is_training = random.getstate(), np.random.get_state(), trainer.model.training
    trainer.model_wrapped.eval()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            trainer.model_wrapped.train(is_training)
            np.random.set_state(numpy_state)
            random.setstate(python_state)
