"""The prompts of both roles, and the collator that pairs them with rollouts: only the teacher sees the solution."""

import dataclasses
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import global_then_local_main_first, pad

logger = logging.getLogger(__name__)

# Paper Figure 2, inside the chat template, with the request for a boxed answer and visible limits around the solution.
STUDENT_PROMPT = r"""Problem: {problem}

Please reason step by step, and put your final answer within \boxed{}."""

SOLUTION = """Here is a reference solution:
--- reference solution begins ---
{solution}
--- reference solution ends ---

"""
REFERENCE = "Problem: {problem}\n\n" + SOLUTION
OWN_SOLUTION = (
    "After understanding the reference solution, please try to solve this problem using your own approach below.\n"
    "Derive every step yourself; do not copy or paraphrase the reference solution.\n"
    "\n"
    r"Please reason step by step, and put your final answer within \boxed{}."
)
TEACHER_PROMPT = REFERENCE + OWN_SOLUTION
REFERENCE_ONLY_PROMPT = SOLUTION + OWN_SOLUTION  # with --teacher_context reference_only

# With --reason_first the teacher's prompt is a conversation: a request, its rationale, and the request to solve.
REASONING_PROMPT = REFERENCE + "Explain in your own words, step by step, why this solution is right."
TRANSITION_PROMPT = OWN_SOLUTION

PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")  # \boxed{} is not one
# Names in the rows that hold no text of the data
RESERVED = {
    "history",
    "reference",
    "row",
    "length_status",
    "student_prompt_ids",
    "teacher_prompt_ids",
    "reasoning_prompt_ids",
}
RESERVED |= {"problem_column", "solution_column", "answer_column", "answer_type_column"}
ELLIPSIS = "\n[...]\n"
MARK = "\ufdd0"  # stands for a control token in a text; Unicode keeps this one out of texts


def placeholders(*templates: str) -> set[str]:
    """Return the names in braces, each of which stands for the text of a column."""
    return {name for template in templates for name in PLACEHOLDER.findall(template)}


def check_template(flag: str, template: str, needed: set[str], refused: AbstractSet[str] = frozenset()) -> None:
    """Raise `ValueError`, naming `flag`, for a template without what it needs, or with what it must not show."""
    found = placeholders(template)
    if missing := needed - found:
        raise ValueError(f"--{flag} lacks the placeholder {{{min(missing)}}}. The template is: {template!r}")
    if shown := found & refused:
        raise ValueError(
            f"--{flag} has the placeholder {{{min(shown)}}}, which it must not show. The template is: {template!r}"
        )
    if taken := found & RESERVED:
        raise ValueError(
            f"--{flag} has the placeholder {{{min(taken)}}}, a name that this program uses itself; rename the column"
        )


def check_templates(
    student_prompt: str, teacher_prompt: str, reasoning_prompt: str, hides_problem: bool = False
) -> None:
    """Raise `ValueError` for a template without what it needs. Other placeholders stand for columns of their names."""
    check_template("student_prompt", student_prompt, {"problem"}, refused={"solution", "answer"})
    check_template("teacher_prompt", teacher_prompt, set() if hides_problem else {"problem"})
    check_template("reasoning_prompt", reasoning_prompt, {"problem", "solution"})


def fill_template(template: str, **fields: str) -> str:
    """Replace all placeholders by `fields` in one pass, so that braces inside a field stay as they are."""
    return PLACEHOLDER.sub(lambda match: fields[match.group(1)], template)


def texts_of(row: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts of a row: what a template may show."""
    return {name: value for name, value in row.items() if isinstance(value, str)}


def check_chat_template(tokenizer: PreTrainedTokenizerBase, flag: str = "model_name_or_path") -> None:
    """Raise `ValueError`, naming `flag`, for a tokenizer without chat template, which all prompts need."""
    if tokenizer.chat_template is None:
        folder = Path(tokenizer.name_or_path)
        if folder.is_dir() and not any(folder.glob("tokenizer*")):  # transformers makes an empty one
            raise ValueError(
                f"--{flag} {folder}: there is no tokenizer in it; save the one of the model that it comes from beside "
                f'the weights: AutoTokenizer.from_pretrained("...").save_pretrained("{folder}")'
            )
        raise ValueError(
            f"--{flag} {tokenizer.name_or_path}: its tokenizer has no chat template, which the prompts need; use an "
            "instruction-tuned model"
        )


def check_history(tokenizer: PreTrainedTokenizerBase, dataset: Dataset) -> None:
    """
    Raise `ValueError` for a chat template that refuses the turns before a problem, or leaves one of them out.

    Args:
        dataset: rows that may have a `history`: turns with `role` and `content`.
    """
    histories = dataset["history"][:] if "history" in dataset.column_names else []
    for roles in sorted({tuple(turn["role"] for turn in history) for history in histories if history}):
        marks = [f"-={place}=-" for place in range(len(roles) + 1)]
        turns = [{"role": role, "content": mark} for role, mark in zip((*roles, "user"), marks, strict=True)]
        fault = "it leaves some of them out"
        try:
            text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            found = re.findall(r"-=\d+=-", text)
        except TemplateError as error:
            found, fault = [], str(error)
        if found != marks:
            raise ValueError(
                f"the chat template of {tokenizer.name_or_path} cannot hold the turns {', '.join(roles)} before the "
                f"problem ({fault}): leave these rows out, and --system_prompt or --teacher_system_prompt where it "
                "is that"
            )


def encode_chat_prompt(
    tokenizer: PreTrainedTokenizerBase, content: str, thinking: bool, history: Sequence[Mapping[str, str]] = ()
) -> list[int]:
    """
    Encode one user turn, up to and including the header of the assistant's turn.

    Control tokens that stand in the content, such as `<|im_end|>`, become tokens of text: only the template has turns.

    Args:
        history: turns before it, with `role` and `content`.

    Raises:
        ValueError: for a content with control tokens, if the chat template does not repeat it exactly once.
    """
    turns, controls = [], []
    for turn in (*history, {"role": "user", "content": content}):
        texts_and_controls = re.split(f"({control_tokens(tokenizer)})", turn["content"])
        controls += texts_and_controls[1::2]
        turns.append({"role": turn["role"], "content": MARK.join(texts_and_controls[::2])})
    rendered = tokenizer.apply_chat_template(
        turns,
        add_generation_prompt=True,
        tokenize=False,
        enable_thinking=thinking,
    )
    first, *others = rendered.split(MARK) if controls else [rendered]
    if len(others) != len(controls):
        raise ValueError(f"the chat template does not keep {controls[0]!r} in the text {content[:80]!r}: leave it out")
    token_ids = tokenizer(first, add_special_tokens=False).input_ids
    for control, text in zip(controls, others, strict=True):
        token_ids += tokenizer(control, add_special_tokens=False, split_special_tokens=True).input_ids
        token_ids += tokenizer(text, add_special_tokens=False).input_ids
    return token_ids


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a regular expression for the special tokens, which in a text would be those of the chat template."""
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)"


def encode_next_turn(tokenizer: PreTrainedTokenizerBase, content: str, thinking: bool) -> list[int]:
    """
    Encode what follows the text of an assistant's turn: its end, a user turn, and the header of the next turn.

    Raises:
        ValueError: for a chat template that changes the text of an assistant's turn.
    """
    mark = "-=*=-"
    turns = [("user", "?"), ("assistant", mark), ("user", content)]
    text = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns],
        add_generation_prompt=True,
        tokenize=False,
        enable_thinking=thinking,
    )
    if text.count(mark) != 1:
        raise ValueError(
            f"--reason_first: the chat template of {tokenizer.name_or_path!r} changes the text of an assistant's "
            "turn, so that a rationale cannot stand in a conversation; leave the flag out, or set "
            "`tokenizer.chat_template`"
        )
    return tokenizer(text.partition(mark)[2], add_special_tokens=False).input_ids


@dataclass
class Rollout:
    """
    One example on its way through an optimizer step: first its prompts, then also a completion and its lesson.

    Token ids are plain lists: only `SelfDistillationDataCollator` pads them.
    """

    row: int  # of the training data
    problem: str
    prompt_ids: list[int]  # the student's
    teacher_prompt_ids: list[int]
    history: Sequence[Mapping[str, str]] = ()  # turns before the problem, with `role` and `content`
    solution: str | None = None
    answer: str | None = None
    reference: str | None = None  # what the teacher sees as `{solution}`
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of all columns, for the templates
    reasoning_prompt_ids: list[int] | None = None  # asks the teacher for a rationale
    completion_ids: list[int] = dataclasses.field(default_factory=list)  # with the end-of-sequence token, if sampled
    sampler_logprobs: list[float] | None = None  # log-probabilities that the sampler gave the completion's tokens
    # Largest log-probabilities of the completion's tokens and their ids, (T, k) each, by a teacher on a server
    teacher_top: tuple[Tensor, Tensor] | None = None
    is_truncated: bool = False  # no end-of-sequence token within --max_completion_length
    is_correct: bool | None = None  # None: not graded
    weight: float = 1.0  # of the divergence of the completion's tokens
    advantage: float = 0.0  # of the reward's policy gradient
    rationale_ids: list[int] | None = None

    @property
    def is_learned(self) -> bool:
        """True if the rollout has a part in the loss."""
        return self.weight > 0.0 or self.advantage != 0.0


def start_rollouts(examples: Sequence[Mapping[str, Any]]) -> list[Rollout]:
    """Make rollouts without completions from encoded examples: the `collate_fn` of the data loader."""
    return [
        Rollout(
            row=example.get("row", 0),
            problem=example["problem"],
            prompt_ids=example["student_prompt_ids"],
            teacher_prompt_ids=example["teacher_prompt_ids"],
            history=example.get("history") or (),
            solution=example.get("solution"),
            answer=example.get("answer"),
            reference=example.get("reference", example.get("solution")),
            texts=texts_of(example),
            reasoning_prompt_ids=example.get("reasoning_prompt_ids"),
        )
        for example in examples
    ]


@dataclass
class PackedRole:
    """The B sequences of one role, prompt and completion each, end to end in one row of T tokens."""

    input_ids: Tensor  # (1, T), int64
    position_ids: Tensor  # (1, T), int64: from 0 in each sequence
    bounds: Tensor  # (B + 1,), int32: where each sequence begins, and T
    lengths: list[int]  # of the sequences

    @classmethod
    def of_sequences(cls, sequences: Sequence[list[int]]) -> "PackedRole":
        """Lay sequences of token ids end to end."""
        lengths = [len(sequence) for sequence in sequences]
        return cls(
            input_ids=torch.tensor([[token_id for sequence in sequences for token_id in sequence]]),
            position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
            bounds=torch.tensor([0, *lengths]).cumsum(0).int(),
            lengths=lengths,
        )

    def to(self, device: torch.device) -> "PackedRole":
        """Return the row on another device."""
        tensors = (self.input_ids.to(device), self.position_ids.to(device), self.bounds.to(device))
        return PackedRole(*tensors, self.lengths)


@dataclass
class MicroBatch:
    """Padded rollouts of one forward and backward pass, B rows. Prompts are left-padded, completions right-padded."""

    rows: list[int]  # rows of the training data
    prompt_ids: Tensor  # (B, longest student prompt), int64
    prompt_mask: Tensor  # the same shape, int64: 1 at tokens, 0 at padding
    teacher_prompt_ids: Tensor  # (B, longest teacher prompt), int64
    teacher_prompt_mask: Tensor
    completion_ids: Tensor  # (B, C), int64, C the longest completion
    completion_mask: Tensor  # (B, C), bool: true at tokens
    loss_mask: Tensor  # (B, C), bool: true at tokens that have a part in the loss
    weights: Tensor  # (B,), float32: of the divergence
    advantages: Tensor  # (B,), float32
    sampler_logprobs: Tensor | None  # (B, C), float32
    teacher_top_logprobs: Tensor | None  # (B, C, k), float32: by a teacher on a server
    teacher_top_ids: Tensor | None  # (B, C, k), int64
    student: PackedRole  # the same sequences without padding
    teacher: PackedRole

    # A mask and its places. No field, since FSDP2 makes copies of all fields
    _places_of_mask = cast(tuple[Tensor | None, Sequence[Tensor]], (None, ()))

    def to(self, device: torch.device) -> "MicroBatch":
        """Return the batch on another device."""
        moved = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor | PackedRole)
        }
        batch = dataclasses.replace(self, **cast(dict[str, Any], moved))
        batch._places_of_mask = batch.loss_mask, [places.to(device) for places in self.token_places()]
        return batch

    def packed(self, role: str) -> PackedRole:
        """Return the sequences of "student" or "teacher" in one row."""
        return self.student if role == "student" else self.teacher

    def predictors(self, role: str) -> Tensor:
        """Return the places (N,) in the row of `packed` from which the tokens of the loss are predicted, int64."""
        ends = self.packed(role).bounds[1:].long()
        places = torch.arange(-1, self.completion_ids.shape[1] - 1, device=ends.device)
        return self.of_tokens((ends - self.completion_mask.sum(1))[:, None] + places)

    def token_places(self) -> Sequence[Tensor]:
        """Return row and column of the N tokens of the loss, (N,) each, int64."""
        mask, places = self._places_of_mask  # counted before the move to a GPU, which would stop for it
        return places if mask is self.loss_mask else self.loss_mask.nonzero(as_tuple=True)

    def model_inputs(self, role: str) -> dict[str, Tensor]:
        """Return the model's inputs for "student" or "teacher": the role's prompts, each with its completion."""
        prompt_ids, prompt_mask = self.prompt_ids, self.prompt_mask
        if role == "teacher":
            prompt_ids, prompt_mask = self.teacher_prompt_ids, self.teacher_prompt_mask
        attention_mask = torch.cat([prompt_mask, self.completion_mask.long()], dim=1)
        return {
            "input_ids": torch.cat([prompt_ids, self.completion_ids], dim=1),
            "attention_mask": attention_mask,
            "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0),  # as without the padding on the left
        }

    def of_tokens(self, values: Tensor) -> Tensor:
        """Select the N tokens of the loss: (B,) values of rows or (B, C, ...) values of tokens -> (N, ...)."""
        rows, columns = self.token_places()
        return values[rows] if values.dim() == 1 else values[rows, columns]

    @property
    def teacher_top(self) -> tuple[Tensor, Tensor] | None:
        """Log-probabilities and ids that a teacher on a server told of the tokens of the loss, (N, k) each."""
        if self.teacher_top_logprobs is None or self.teacher_top_ids is None:
            return None
        return self.of_tokens(self.teacher_top_logprobs), self.of_tokens(self.teacher_top_ids)


class SelfDistillationDataCollator:
    """
    Encodes the prompts of both roles, once for each example, and pads rollouts into micro-batches.

    Prompts longer than `max_prompt_length` never lose a part of the template. A reference solution that is too long
    is cut in its middle: its beginning has the approach, its end the answer. An example is dropped if that leaves less
    than a quarter of its solution, or if its problem is too long, since a shortened problem is another problem.

    Args:
        tokenizer: its chat template wraps both prompts; it may take `enable_thinking`.
        student_prompt: template with `{problem}`, and with `{name}` of any other column of texts but the solution.
        teacher_prompt: template with `{problem}`, `{solution}` where the teacher sees it, and any other column.
        teacher_system_prompt: system turn of the teacher alone, in place of the one in the history; empty for none.
        student_thinking, teacher_thinking: thinking mode of the chat template, for each role.
        teacher_prefill: text after the header of the assistant's turn in the teacher's prompt.
        sees_more: `False` gives the teacher the student's prompt (a control that must not learn anything).
        sees_problem: `False` leaves the problem and the turns before it, but not the system's, out of the teacher's
            prompt.
        references: makes of the rows of a data set what the teacher sees as `{solution}`; by default it is `solution`.
        max_prompt_length: in tokens, for each role; `None` for no limit.
        num_loss_tokens_to_skip: number of first tokens of each completion that are left out of the loss.
        reason_first: examples also get the prompt that asks the teacher for a rationale.
        reasoning_prompt: template of that prompt, with `{problem}` and `{solution}`. It has no thinking mode.
        max_reasoning_length: number of tokens of the teacher's prompt that are kept free for the rationale.

    Raises:
        ValueError: for a template without what it needs, and for a tokenizer without chat template, or whose
            template has no place for `teacher_system_prompt`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        student_prompt: str = STUDENT_PROMPT,
        teacher_prompt: str = TEACHER_PROMPT,
        teacher_system_prompt: str | None = None,
        student_thinking: bool = False,
        teacher_thinking: bool = True,
        teacher_prefill: str = "",
        sees_more: bool = True,
        sees_problem: bool = True,
        references: Callable[[Dataset], list[str]] | None = None,
        max_prompt_length: int | None = None,
        num_loss_tokens_to_skip: int = 0,
        reason_first: bool = False,
        reasoning_prompt: str = REASONING_PROMPT,
        max_reasoning_length: int = 1024,
    ):
        check_templates(student_prompt, teacher_prompt, reasoning_prompt, not sees_problem)
        check_chat_template(tokenizer)
        self.tokenizer = tokenizer
        self.student_prompt = student_prompt
        self.teacher_prompt = teacher_prompt
        self.sees_more, self.sees_problem, self.references = sees_more, sees_problem, references
        self.teacher_system_prompt = teacher_system_prompt
        if teacher_system_prompt:
            check_history(tokenizer, Dataset.from_dict({"history": [self.teacher_history(())]}))
        self.student_thinking = student_thinking
        self.teacher_thinking = teacher_thinking
        self.teacher_prefill_ids: list[int] = tokenizer(teacher_prefill, add_special_tokens=False).input_ids
        self.max_prompt_length = max_prompt_length
        self.num_loss_tokens_to_skip = num_loss_tokens_to_skip
        self.reason_first = reason_first
        self.reasoning_prompt = reasoning_prompt
        self.transition_ids: list[int] = []  # from the end of the rationale to where the completion begins
        self.max_reasoning_prompt_length = max_prompt_length
        if reason_first:
            self.transition_ids = encode_next_turn(tokenizer, TRANSITION_PROMPT, teacher_thinking)
            self.transition_ids += self.teacher_prefill_ids
            if max_prompt_length is not None:
                self._limit_reasoning_prompt(max_prompt_length, max_reasoning_length)

    def _limit_reasoning_prompt(self, max_prompt_length: int, max_reasoning_length: int) -> None:
        """Keep room for the rationale in the teacher's prompt; raise `ValueError` if the request does not fit."""
        limit = max_prompt_length - max_reasoning_length - len(self.transition_ids)
        content = fill_template(self.reasoning_prompt, problem="", solution="")
        template_length = len(encode_chat_prompt(self.tokenizer, content, thinking=False))
        if template_length >= limit:
            raise ValueError(
                f"--max_reasoning_length {max_reasoning_length}: of the {max_prompt_length} tokens of the "
                f"teacher's prompt (--max_length less --max_completion_length) it leaves {limit} for "
                f"--reasoning_prompt, which takes {template_length} without problem and solution; lower it or raise "
                "--max_length"
            )
        self.max_reasoning_prompt_length = limit

    # Prompts

    def _fit(
        self, encode_solution: Callable[[str], list[int]], solution: str, max_length: int | None
    ) -> tuple[list[int] | None, str]:
        """Encode with the solution, cutting its middle if too long. Returns (ids or None, "kept", "shortened" or
        "dropped")."""
        prompt_ids = encode_solution(solution)
        if max_length is None or len(prompt_ids) <= max_length:
            return prompt_ids, "kept"
        low, high = len(solution) // 8, len(solution) // 2 - 1  # characters kept at each end; bisected for the most
        best = None
        while low <= high:
            kept = (low + high) // 2
            shortened = solution[:kept] + ELLIPSIS + solution[len(solution) - kept :]
            prompt_ids = encode_solution(shortened)
            if len(prompt_ids) <= max_length:
                best, low = prompt_ids, kept + 1
            else:
                high = kept - 1
        return best, "dropped" if best is None else "shortened"

    def teacher_history(self, history: Sequence[Mapping[str, str]]) -> Sequence[Mapping[str, str]]:
        """Return the turns that the teacher sees before the problem, with its own system turn if it has one."""
        if not self.sees_problem:
            history = [turn for turn in history if turn["role"] == "system"]
        if self.teacher_system_prompt is None:
            return history
        own = [{"role": "system", "content": self.teacher_system_prompt}] if self.teacher_system_prompt else []
        return [*own, *(turn for turn in history if turn["role"] != "system")]

    def encode_teacher(
        self,
        problem: str,
        solution: str,
        history: Sequence[Mapping[str, str]] = (),
        texts: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """
        Encode the teacher's prompts with a reference solution, and the turns of `history` before it.

        `texts` has those of other columns that the templates show.

        Returns:
            `teacher_prompt_ids`, with `reason_first` also `reasoning_prompt_ids` (lists of int), and `length_status`:
            "kept", "shortened" (the solution was cut in its middle) or "dropped" (it is too long; the lists are
            empty).
        """

        history = self.teacher_history(history)
        texts = dict(texts or {})

        def encode_solution(solution: str) -> list[int]:
            content = fill_template(self.teacher_prompt, **texts | {"problem": problem, "solution": solution})
            prompt_ids = encode_chat_prompt(self.tokenizer, content, self.teacher_thinking, history)
            return prompt_ids + self.teacher_prefill_ids

        def encode_request(solution: str) -> list[int]:
            content = fill_template(self.reasoning_prompt, **texts | {"problem": problem, "solution": solution})
            return encode_chat_prompt(self.tokenizer, content, thinking=False, history=history)

        prompts, statuses = {}, []
        prompts["teacher_prompt_ids"], status = self._fit(encode_solution, solution, self.max_prompt_length)
        statuses.append(status)
        if self.reason_first:
            limit = self.max_reasoning_prompt_length
            prompts["reasoning_prompt_ids"], status = self._fit(encode_request, solution, limit)
            statuses.append(status)
        if "dropped" in statuses:
            return dict.fromkeys(prompts, []) | {"length_status": "dropped"}
        return prompts | {"length_status": "shortened" if "shortened" in statuses else "kept"}

    def encode(self, example: Mapping[str, Any]) -> dict[str, Any]:
        """
        Encode the prompts of both roles, from the texts `problem` and `solution` of an example, and from the turns of
        its `history`, which come before. The teacher sees a `reference`, where there is one, in place of the solution.

        Without a solution that the teacher's prompt shows, and with `sees_more=False`, it is the student's prompt.

        Returns:
            `student_prompt_ids` (list of int) and what `encode_teacher` returns. An example that is "dropped" has
            empty lists: leave it out.
        """
        problem, history, texts = example["problem"], example.get("history") or (), texts_of(example)
        content = fill_template(self.student_prompt, **texts)
        student_ids = encode_chat_prompt(self.tokenizer, content, self.student_thinking, history)
        fits = self.max_prompt_length is None or len(student_ids) <= self.max_prompt_length
        reference = example.get("reference", example.get("solution"))
        shows_solution = self.reason_first or "solution" in placeholders(self.teacher_prompt)
        if not self.sees_more or (shows_solution and reference is None):
            encoded = {"teacher_prompt_ids": student_ids, "length_status": "kept"}
        else:
            encoded = self.encode_teacher(problem, reference or "", history, texts)
        if not fits or encoded["length_status"] == "dropped":
            return {"student_prompt_ids": []} | dict.fromkeys(encoded, []) | {"length_status": "dropped"}
        return {"student_prompt_ids": student_ids} | encoded

    @staticmethod
    def check_columns(dataset: Dataset, name: str, needed: Iterable[str], optional: Iterable[str] = ()) -> None:
        """Raise `ValueError` for a column that is missing or holds no text, or where a `needed` one lacks a text."""
        for column in (*needed, *optional):
            if column not in dataset.column_names:
                raise ValueError(
                    f"the {name} dataset has no column {column!r}, which these settings need; it has "
                    f"{', '.join(dataset.column_names)}"
                )
            if column in optional:
                continue
            kinds = {type(value) for value in dataset[column]}
            if type(None) in kinds:
                raise ValueError(f"the {name} dataset has rows without {column!r}: leave them out")
            if kinds - {str}:
                raise ValueError(
                    f"the {name} dataset has in column {column!r} {min(kind.__name__ for kind in kinds - {str})}, and "
                    "a prompt shows text: write it as text"
                )

    def encode_dataset(self, dataset: Dataset, name: str, num_proc: int | None = None) -> Dataset:
        """
        Encode the prompts of all examples; leave out, and count in the log, those that are too long.

        Args:
            dataset: rows with `problem`, where the teacher sees one `solution`, and where there is one `history`.
            name: of the data set, for messages.
            num_proc: number of processes.
        """
        if self.references is not None:
            dataset = dataset.add_column("reference", self.references(dataset))
        with global_then_local_main_first():
            encoded = dataset.map(self.encode, num_proc=num_proc, desc=f"Encoding the prompts of the {name} dataset")
            fitting = encoded.filter(lambda status: status != "dropped", input_columns="length_status")
        num_dropped, num_shortened = (encoded["length_status"][:].count(status) for status in ("dropped", "shortened"))
        if num_dropped or num_shortened:
            logger.warning(
                "%s dataset, prompts over %d tokens (--max_length less --max_completion_length): %d of %d examples "
                "left out as too long, %d solutions cut in their middle",
                name, self.max_prompt_length, num_dropped, len(encoded), num_shortened,
            )  # fmt: skip
        return fitting

    # Batches

    def _pad_left(self, prompts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Pad prompts on the left: ids and mask, int64, (batch, longest prompt)."""
        rows = [torch.tensor(prompt, dtype=torch.long) for prompt in prompts]
        masks = [torch.ones_like(row) for row in rows]
        pad_token_id = self.tokenizer.pad_token_id or 0  # any token will do: the mask hides it
        return pad(rows, pad_token_id, padding_side="left"), pad(masks, 0, padding_side="left")

    def __call__(self, rollouts: Sequence[Rollout]) -> MicroBatch:
        """Pad rollouts into a micro-batch. This is the only place that pads."""
        prompt_ids, prompt_mask = self._pad_left([rollout.prompt_ids for rollout in rollouts])
        teacher_prompt_ids, teacher_prompt_mask = self._pad_left([rollout.teacher_prompt_ids for rollout in rollouts])
        completions = [torch.tensor(rollout.completion_ids, dtype=torch.long) for rollout in rollouts]
        completion_mask = pad([torch.ones_like(ids, dtype=torch.bool) for ids in completions], False)
        is_learned = torch.tensor([rollout.is_learned for rollout in rollouts])
        loss_mask = completion_mask & is_learned.unsqueeze(1)
        loss_mask[:, : self.num_loss_tokens_to_skip] = False
        sampler_logprobs = None
        if rollouts[0].sampler_logprobs is not None:
            sampler_logprobs = pad([torch.tensor(rollout.sampler_logprobs) for rollout in rollouts], 0.0)
        tops = [rollout.teacher_top for rollout in rollouts if rollout.teacher_top is not None]  # all or none
        return MicroBatch(
            rows=[rollout.row for rollout in rollouts],
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            teacher_prompt_ids=teacher_prompt_ids,
            teacher_prompt_mask=teacher_prompt_mask,
            completion_ids=pad(completions, self.tokenizer.pad_token_id or 0),
            completion_mask=completion_mask,
            loss_mask=loss_mask,
            weights=torch.tensor([rollout.weight for rollout in rollouts]),
            advantages=torch.tensor([rollout.advantage for rollout in rollouts]),
            sampler_logprobs=sampler_logprobs,
            teacher_top_logprobs=pad([logprobs for logprobs, _ in tops], 0.0) if tops else None,
            teacher_top_ids=pad([ids for _, ids in tops], 0) if tops else None,
            student=PackedRole.of_sequences([r.prompt_ids + r.completion_ids for r in rollouts]),
            teacher=PackedRole.of_sequences([r.teacher_prompt_ids + r.completion_ids for r in rollouts]),
        )
