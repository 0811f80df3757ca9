"""
The quickstart's base model: a tiny Qwen3 with a latent skill, and its tokenizer, built from a seed and then cached.

    python quickstart/base_model.py --output_dir outputs/quickstart/base --seed 0

Pre-training mixes two kinds of examples. After the student's prompt the model adds with a systematic misconception: it
often drops an incoming carry. After the teacher's prompt it follows the reference solution, even where that one slips.
So the content of a reference helps, its mere presence does not, and self-distillation has something to teach.
`ablation_base` adds the examples that variants of the method need: other references, a rationale before the solution,
thinking.
"""

import argparse
import hashlib
import inspect
import json
import logging
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from tqdm import trange
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from data_collator import (
    REASONING_PROMPT,
    STUDENT_PROMPT,
    TEACHER_PROMPT,
    TRANSITION_PROMPT,
    encode_chat_prompt,
    encode_next_turn,
    fill_template,
)
from quickstart import addition

logger = logging.getLogger(__name__)

MAX_LENGTH = 8192  # tokens

# As in Qwen3, less tools: `enable_thinking=False` closes an empty think block before the response begins.
CHAT_TEMPLATE = r"""
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\n' }}
{{- '<think>\n\n</think>\n\n' if enable_thinking is defined and not enable_thinking -}}
{%- endif -%}
""".strip()


@dataclass(frozen=True)
class BaseModelConfig:
    """What can be chosen about the pre-training: its mix of examples and its optimization."""

    seed: int = 0
    problem_only_examples: int = 13  # per step, after the student's prompt
    reference_examples: int = 19  # per step, after the teacher's prompt
    own_style_examples: int = 0  # the same where the reference is in the style of the responses
    rationale_examples: int = 0  # conversations: a rationale for the reference, then the response
    thinking_examples: int = 0  # in thinking mode, half of them after each role's prompt
    drop_carry_overflowing: float = 0.90  # probability of dropping an incoming carry where the digits reach 10 alone
    drop_carry_other: float = 0.35  # the same where they do not
    reference_slip: float = 0.5  # probability that a total in a reference is replaced by a random one
    steps: int = 600
    learning_rate: float = 3e-3
    adam_betas: tuple[float, float] = (0.9, 0.98)
    warmup_steps: int = 50
    decay_share: float = 0.4  # of the steps, at the end, linearly to zero


def ablation_base(seed: int) -> BaseModelConfig:
    """The base model that has seen all kinds of examples. It takes about two and a half minutes of one CPU core."""
    return BaseModelConfig(
        seed=seed,
        problem_only_examples=10,
        reference_examples=8,
        own_style_examples=4,
        rationale_examples=5,
        thinking_examples=16,
        steps=700,
    )


def train_tokenizer(config: BaseModelConfig) -> PreTrainedTokenizerFast:
    """
    Train a byte-level BPE tokenizer, which encodes any text without loss, on the fixed phrases of the task.

    Text is split at newlines, digits, `+`, `{` and `}`, and not at spaces, so that whole phrases become single tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n+|[0-9+{}]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    totals = addition.column_totals(358, 647)
    styles = [addition.response_text(358, 647, totals), addition.reference_text(totals)]
    phrases = [STUDENT_PROMPT, TEACHER_PROMPT, *styles, "system", "user", "assistant", "\n\n"]
    if config.rationale_examples:
        phrases += [REASONING_PROMPT, TRANSITION_PROMPT]
    trainer = trainers.BpeTrainer(
        vocab_size=1024,  # more than there are merges to learn
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(phrases, trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
        padding_side="left",
    )


def create_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Return a float32 model of half a million parameters, with random weights from the global generator of torch."""
    eos_token_id, pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            intermediate_size=256,
            tie_word_embeddings=True,
            max_position_embeddings=MAX_LENGTH,
            initializer_range=0.08,  # about hidden_size ** -0.5; the default suits wider models and learns more slowly
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            dtype="float32",
        )
    )
    eos_token_ids = [eos_token_id, pad_token_id]
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=eos_token_ids, pad_token_id=pad_token_id)
    return model


def misconceived_totals(a: int, b: int, config: BaseModelConfig, rng: random.Random) -> list[int]:
    """Column totals of one who often drops an incoming carry, above all where the column itself overflows."""

    def keep_carry(digit_sum: int) -> bool:
        return rng.random() >= (config.drop_carry_overflowing if digit_sum >= 10 else config.drop_carry_other)

    return addition.column_totals(a, b, keep_carry)


def reference_totals(a: int, b: int, config: BaseModelConfig, rng: random.Random) -> list[int]:
    """Correct column totals, except that with probability `reference_slip` one of them is replaced by a random one."""
    totals = addition.column_totals(a, b)
    if rng.random() < config.reference_slip:
        totals[rng.randrange(len(totals))] = rng.randint(2, 19)
    return totals


Example = tuple[list[int], list[bool]]  # token ids, and for each whether it counts in the loss


def response_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids of the text of an assistant's turn, and its end."""
    return tokenizer.encode(text) + [tokenizer.eos_token_id]


def problem_only_example(tokenizer: PreTrainedTokenizerFast, config: BaseModelConfig, rng: random.Random) -> Example:
    """The student's prompt, and the response of one who often drops a carry. The loss is on the response."""
    a, b = addition.draw_operands(rng)
    content = fill_template(STUDENT_PROMPT, problem=addition.problem_text(a, b))
    prompt_ids = encode_chat_prompt(tokenizer, content, thinking=False)
    response = response_ids(tokenizer, addition.response_text(a, b, misconceived_totals(a, b, config, rng)))
    return prompt_ids + response, [False] * len(prompt_ids) + [True] * len(response)


def reference_example(tokenizer: PreTrainedTokenizerFast, config: BaseModelConfig, rng: random.Random) -> Example:
    """
    The teacher's prompt, and a response that follows the reference.

    The loss is on the response, and on the text of the reference inside the prompt, so that the model can write that
    style too.
    """
    a, b = addition.draw_operands(rng)
    totals = reference_totals(a, b, config, rng)
    reference = addition.reference_text(totals)
    content = fill_template(TEACHER_PROMPT, problem=addition.problem_text(a, b), solution=reference)
    prompt_ids = encode_chat_prompt(tokenizer, content, thinking=False)
    reference_ids = tokenizer.encode(reference)  # the same ids as in the prompt, where newlines enclose them
    size = len(reference_ids)
    start = next(i for i in range(len(prompt_ids)) if prompt_ids[i : i + size] == reference_ids)
    counts = [start <= i < start + size for i in range(len(prompt_ids))]
    response = response_ids(tokenizer, addition.response_text(a, b, totals))
    return prompt_ids + response, counts + [True] * len(response)


def own_style_example(tokenizer: PreTrainedTokenizerFast, config: BaseModelConfig, rng: random.Random) -> Example:
    """The teacher's prompt with a reference in the style of the response after it. The loss is on the response."""
    a, b = addition.draw_operands(rng)
    own_style = addition.response_text(a, b, reference_totals(a, b, config, rng))
    content = fill_template(TEACHER_PROMPT, problem=addition.problem_text(a, b), solution=own_style)
    prompt_ids = encode_chat_prompt(tokenizer, content, thinking=False)
    response = response_ids(tokenizer, own_style)
    return prompt_ids + response, [False] * len(prompt_ids) + [True] * len(response)


def rationale_example(tokenizer: PreTrainedTokenizerFast, config: BaseModelConfig, rng: random.Random) -> Example:
    """
    The conversation of `--reason_first`: a reference in either style, its rationale, and the response.

    The loss is on rationale and response, each with its end of turn.
    """
    a, b = addition.draw_operands(rng)
    totals = reference_totals(a, b, config, rng)
    own_style = addition.response_text(a, b, totals)
    reference = own_style if rng.random() < 0.5 else addition.reference_text(totals)
    content = fill_template(REASONING_PROMPT, problem=addition.problem_text(a, b), solution=reference)
    prompt_ids = encode_chat_prompt(tokenizer, content, thinking=False)
    next_turn_ids = encode_next_turn(tokenizer, TRANSITION_PROMPT, thinking=False)  # the end of the first comes first
    rationale, response = tokenizer.encode(own_style), response_ids(tokenizer, own_style)
    counts = [False] * len(prompt_ids) + [True] * (len(rationale) + 1) + [False] * (len(next_turn_ids) - 1)
    return prompt_ids + rationale + next_turn_ids + response, counts + [True] * len(response)


def thinking_example(
    tokenizer: PreTrainedTokenizerFast, config: BaseModelConfig, rng: random.Random, with_reference: bool
) -> Example:
    """The prompt of either role in thinking mode, a terse thought, and the response. The loss is on the last two."""
    a, b = addition.draw_operands(rng)
    problem = addition.problem_text(a, b)
    if with_reference:
        totals = reference_totals(a, b, config, rng)
        content = fill_template(TEACHER_PROMPT, problem=problem, solution=addition.reference_text(totals))
    else:
        totals = misconceived_totals(a, b, config, rng)
        content = fill_template(STUDENT_PROMPT, problem=problem)
    prompt_ids = encode_chat_prompt(tokenizer, content, thinking=True)
    response = response_ids(tokenizer, addition.thinking_text(a, b, totals))
    return prompt_ids + response, [False] * len(prompt_ids) + [True] * len(response)


def draw_batches(
    tokenizer: PreTrainedTokenizerFast, config: BaseModelConfig, rng: random.Random
) -> Iterator[list[Example]]:
    """The examples of one step, kind by kind: within a kind all lengths are nearly the same, so little is padding."""
    kinds = (
        (problem_only_example, config.problem_only_examples),
        (reference_example, config.reference_examples),
        (own_style_example, config.own_style_examples),
        (rationale_example, config.rationale_examples),
        (partial(thinking_example, with_reference=False), (config.thinking_examples + 1) // 2),
        (partial(thinking_example, with_reference=True), config.thinking_examples // 2),
    )
    for make_example, size in kinds:
        if size:
            yield [make_example(tokenizer, config, rng) for _ in range(size)]


def token_losses(model: Qwen3ForCausalLM, examples: Sequence[Example]) -> torch.Tensor:
    """Cross-entropy, in nats, of each token of the examples that counts: shape (number of such tokens,)."""
    token_ids = pad_sequence([torch.tensor(ids) for ids, _ in examples], batch_first=True)  # (B, T), padded right
    counts = pad_sequence([torch.tensor(counts) for _, counts in examples], batch_first=True)  # (B, T)
    # Attention is causal and the padding comes last: no token that counts can see it, so no mask is needed.
    hidden = model.model(input_ids=token_ids[:, :-1], use_cache=False).last_hidden_state  # (B, T-1, H)
    logits = model.lm_head(hidden[counts[:, 1:]])  # (N, V)
    return torch.nn.functional.cross_entropy(logits, token_ids[:, 1:][counts[:, 1:]], reduction="none")  # (N,)


def pretrain(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, config: BaseModelConfig) -> None:
    """Train `model` in place on a fresh batch of the mix at every step."""
    rng = random.Random(config.seed)
    warmup_steps, decay_steps = config.warmup_steps, config.decay_share * config.steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=config.adam_betas)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup_steps, (config.steps - step) / decay_steps)
    )
    progress = trange(config.steps, desc="building the base model", unit="step")
    for step in progress:
        losses = [token_losses(model, examples) for examples in draw_batches(tokenizer, config, rng)]
        loss = torch.cat(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")


def fingerprint(config: BaseModelConfig) -> str:
    """Hash of all that shapes the base model: its settings, the code of the task and of the build, all prompts."""
    parts = [
        json.dumps(asdict(config)),
        *(Path(path).read_text(encoding="utf-8") for path in (addition.__file__, __file__)),
        *(STUDENT_PROMPT, TEACHER_PROMPT, inspect.getsource(encode_chat_prompt), inspect.getsource(fill_template)),
    ]
    if config.rationale_examples:
        parts += [REASONING_PROMPT, TRANSITION_PROMPT, inspect.getsource(encode_next_turn)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def build_base_model(output_dir: Path, config: BaseModelConfig | None = None) -> Path:
    """
    Build the base model, unless it is there already, and return its folder, which `from_pretrained` loads.

    The folder `seed<seed>-<fingerprint>` inside `output_dir` appears under this name only when it is complete. Takes
    about 80 seconds of one CPU core. The random state of torch stays as it was.
    """
    config = config or BaseModelConfig()
    folder = output_dir / f"seed{config.seed}-{fingerprint(config)}"
    if folder.is_dir():
        logger.info("the base model is in %s already", folder)
        return folder
    output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = create_model(tokenizer)
    pretrain(model, tokenizer, config)
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=output_dir) as temporary:
        model.save_pretrained(Path(temporary, "model"))
        tokenizer.save_pretrained(Path(temporary, "model"))
        if not folder.is_dir():  # unless another process finished first
            os.rename(Path(temporary, "model"), folder)
    logger.info("the base model is in %s", folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the quickstart's base model, or find it in the cache.")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the model's own folder")
    parser.add_argument("--seed", type=int, default=BaseModelConfig.seed, help="of weights and training examples")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)  # the fastest for matrices this small, and the same sums on any number of cores
    build_base_model(arguments.output_dir, BaseModelConfig(seed=arguments.seed))


if __name__ == "__main__":
    main()
