"""Prompts of the two roles, and the collator that pairs them: the student sees the problem, the teacher also its solution."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import pad

# Paper Figure 2, inside the chat template, with the request for a boxed answer and visible limits around the solution.
STUDENT_PROMPT = r"""Problem: {problem}

Please reason step by step, and put your final answer within \boxed{}."""

REFERENCE = r"""Problem: {problem}

Here is a reference solution:
--- reference solution begins ---
{solution}
--- reference solution ends ---

"""
OWN_SOLUTION = r"""After understanding the reference solution, please try to solve this problem using your own approach below.
Derive every step yourself; do not copy or paraphrase the reference solution.

Please reason step by step, and put your final answer within \boxed{}."""

TEACHER_PROMPT = REFERENCE + OWN_SOLUTION

# With --reason_first the teacher's prompt is a conversation: it is asked to rationalize, it does, it is asked to solve.
REASONING_PROMPT = REFERENCE + "Explain in your own words, step by step, why this solution is right."
TRANSITION_PROMPT = OWN_SOLUTION

PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")  # \boxed{} is not one
ELLIPSIS = "\n[...]\n"


def check_template(flag: str, template: str, placeholders: set[str]) -> None:
    """Raise `ValueError`, naming `flag`, unless `template` holds exactly the given placeholders."""
    found = set(PLACEHOLDER.findall(template))
    names = ", ".join("{" + name + "}" for name in sorted(placeholders)) or "none"
    if missing := placeholders - found:
        raise ValueError(
            f"--{flag} lacks the placeholder {{{min(missing)}}}; it needs {names}. The template is: {template!r}"
        )
    if unknown := found - placeholders:
        raise ValueError(
            f"--{flag} has the unknown placeholder {{{min(unknown)}}}; it may hold {names}, and \\boxed{{}} without "
            f"a name inside. The template is: {template!r}"
        )


def fill_template(template: str, **fields: str) -> str:
    """Put `fields` in place of their placeholders, in one pass: braces inside a field stay as they are."""
    return PLACEHOLDER.sub(lambda match: fields[match.group(1)], template)


def check_chat_template(tokenizer: PreTrainedTokenizerBase, flag: str = "model_name_or_path") -> None:
    """Raise `ValueError`, naming `flag`, for a tokenizer without chat template, which all prompts need."""
    if tokenizer.chat_template is None:
        raise ValueError(
            f"--{flag} {tokenizer.name_or_path}: its tokenizer has no chat template, which the prompts need; use an "
            "instruction-tuned model"
        )


def encode_chat_prompt(tokenizer: PreTrainedTokenizerBase, content: str, thinking: bool) -> list[int]:
    """Token ids of one user turn up to and including the header of the assistant's turn."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
        enable_thinking=thinking,
    )


def encode_next_turn(tokenizer: PreTrainedTokenizerBase, content: str, thinking: bool) -> list[int]:
    """
    Token ids that go on after the text of an assistant's turn: its end, a user turn, and the header of the next turn.

    Raises:
        ValueError: for a chat template that does not write the text of an assistant's turn as it is.
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
            f"--reason_first: the chat template of {tokenizer.name_or_path!r} does not write an assistant's turn as it is, so "
            "that a rationalization cannot stand in a conversation; leave the flag out, or set `tokenizer.chat_template`"
        )
    return tokenizer(text.partition(mark)[2], add_special_tokens=False).input_ids


def unpad_prompts(prompts: torch.Tensor, attention_mask: torch.Tensor) -> list[list[int]]:
    """The token ids of each prompt of a padded batch, (batch, tokens), without the padding."""
    return [prompt[mask.bool()].tolist() for prompt, mask in zip(prompts, attention_mask, strict=True)]


class SelfDistillationDataCollator:
    """
    Encodes examples into the prompts of both roles, once, and pads batches of them.

    Prompts longer than `max_prompt_length` never lose a part of the template. A reference solution that is too long
    is cut in its middle (its beginning has the approach, its end the answer); an example is dropped if that leaves less
    than a quarter of it, or if its problem is too long, since a problem that is cut is another problem.

    Args:
        tokenizer: its chat template wraps both prompts; it may take `enable_thinking`.
        student_prompt: template with `{problem}`.
        teacher_prompt: template with `{problem}` and `{solution}`.
        student_thinking, teacher_thinking: thinking mode of the chat template, for each role.
        teacher_prefill: text behind the header of the assistant's turn in the teacher's prompt.
        teacher_sees_solution: `False` gives the teacher the student's prompt (a control: nothing is to be learned).
        max_prompt_length: in tokens, for each role; `None` for no limit.
        reason_first: whether examples also get the prompt behind which the teacher writes a rationalization.
        reasoning_prompt: template of that prompt, with `{problem}` and `{solution}`.
        transition_prompt: what the teacher is asked behind its rationalization.
        reasoning_thinking: thinking mode of the former; the latter has that of the teacher.
        max_reasoning_length: tokens of the teacher's prompt that are kept free for the rationalization.

    Raises:
        ValueError: for a template with missing or unknown placeholders, and for a tokenizer without chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        student_prompt: str = STUDENT_PROMPT,
        teacher_prompt: str = TEACHER_PROMPT,
        student_thinking: bool = False,
        teacher_thinking: bool = True,
        teacher_prefill: str = "",
        teacher_sees_solution: bool = True,
        max_prompt_length: int | None = None,
        reason_first: bool = False,
        reasoning_prompt: str = REASONING_PROMPT,
        transition_prompt: str = TRANSITION_PROMPT,
        reasoning_thinking: bool = False,
        max_reasoning_length: int = 1024,
    ):
        check_template("student_prompt", student_prompt, {"problem"})
        check_template("teacher_prompt", teacher_prompt, {"problem", "solution"})
        check_template("reasoning_prompt", reasoning_prompt, {"problem", "solution"})
        check_template("transition_prompt", transition_prompt, set())
        check_chat_template(tokenizer)
        self.tokenizer = tokenizer
        self.student_prompt = student_prompt
        self.teacher_prompt = teacher_prompt
        self.student_thinking = student_thinking
        self.teacher_thinking = teacher_thinking
        self.teacher_prefill_ids = tokenizer(teacher_prefill, add_special_tokens=False).input_ids
        self.teacher_sees_solution = teacher_sees_solution
        self.max_prompt_length = max_prompt_length
        self.reason_first = reason_first
        self.reasoning_prompt = reasoning_prompt
        self.reasoning_thinking = reasoning_thinking
        self.transition_ids: list[int] = []  # from the end of the rationalization to where the completion begins
        self.max_reasoning_prompt_length = max_prompt_length
        if reason_first:
            self.transition_ids = encode_next_turn(tokenizer, transition_prompt, teacher_thinking)
            self.transition_ids += self.teacher_prefill_ids
            if max_prompt_length is not None:
                self.max_reasoning_prompt_length = max_prompt_length - max_reasoning_length - len(self.transition_ids)
                content = fill_template(reasoning_prompt, problem="", solution="")
                least = len(encode_chat_prompt(tokenizer, content, reasoning_thinking))
                if least >= self.max_reasoning_prompt_length:
                    raise ValueError(
                        f"--max_reasoning_length {max_reasoning_length}: of the {max_prompt_length} tokens of the teacher's prompt "
                        f"(--max_length less --max_completion_length) it leaves {self.max_reasoning_prompt_length} for "
                        f"--reasoning_prompt, which takes {least} without problem and solution; lower it or raise --max_length"
                    )

    def _encode_student(self, problem: str) -> list[int]:
        content = fill_template(self.student_prompt, problem=problem)
        return encode_chat_prompt(self.tokenizer, content, self.student_thinking)

    def _fit(
        self, encode_solution: Callable[[str], list[int]], solution: str, max_length: int | None
    ) -> tuple[list[int] | None, str]:
        """A prompt with the solution, or with as much of its two ends as fits, or `None`; and which of the three."""
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

    def encode_teacher(self, problem: str, solution: str) -> dict[str, Any]:
        """
        The teacher's prompts with a reference solution.

        Returns:
            `teacher_prompt_ids`, with `reason_first` also `reasoning_prompt_ids` (lists of int), and `length_status`: "kept",
            "shortened" (the solution was cut in its middle) or "dropped" (it is too long; the lists are empty).
        """

        def encode_solution(solution: str) -> list[int]:
            content = fill_template(self.teacher_prompt, problem=problem, solution=solution)
            return encode_chat_prompt(self.tokenizer, content, self.teacher_thinking) + self.teacher_prefill_ids

        def encode_for_reasoning(solution: str) -> list[int]:
            content = fill_template(self.reasoning_prompt, problem=problem, solution=solution)
            return encode_chat_prompt(self.tokenizer, content, self.reasoning_thinking)

        prompts, statuses = {}, []
        prompts["teacher_prompt_ids"], status = self._fit(encode_solution, solution, self.max_prompt_length)
        statuses.append(status)
        if self.reason_first:
            prompts["reasoning_prompt_ids"], status = self._fit(
                encode_for_reasoning, solution, self.max_reasoning_prompt_length
            )
            statuses.append(status)
        if "dropped" in statuses:
            return dict.fromkeys(prompts, []) | {"length_status": "dropped"}
        return prompts | {"length_status": "shortened" if "shortened" in statuses else "kept"}

    def encode(self, example: Mapping[str, Any]) -> dict[str, Any]:
        """
        Prompt token ids of both roles, from the texts `problem` and `solution` of an example. Without a solution, and with
        `teacher_sees_solution=False`, the teacher has the student's prompt.

        Returns:
            `student_prompt_ids` (list of int) and what `encode_teacher` returns; of an example that is "dropped" all lists
            are empty: leave it out.
        """
        student_ids = self._encode_student(example["problem"])
        fits = self.max_prompt_length is None or len(student_ids) <= self.max_prompt_length
        if not self.teacher_sees_solution or example.get("solution") is None:
            encoded = {"teacher_prompt_ids": student_ids, "length_status": "kept"}
        else:
            encoded = self.encode_teacher(example["problem"], example["solution"])
        if not fits or encoded["length_status"] == "dropped":
            return {"student_prompt_ids": []} | dict.fromkeys(encoded, []) | {"length_status": "dropped"}
        return {"student_prompt_ids": student_ids} | encoded

    def pad_prompts(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts and their attention mask, left-padded, int64, (batch, longest prompt)."""
        pad_token_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        rows = [torch.tensor(prompt, dtype=torch.long) for prompt in prompts]
        return (
            pad(rows, padding_value=pad_token_id, padding_side="left"),
            pad([torch.ones_like(row) for row in rows], padding_value=0, padding_side="left"),
        )

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """
        Left-pad the prompts of encoded examples.

        Returns:
            int64 tensors: `prompts` and `prompt_attention_mask` of shape (batch, longest student prompt), under the
            names that TRL's GOLD trainer samples from; `teacher_prompts` and `teacher_prompt_attention_mask` of shape
            (batch, longest teacher prompt). And lists, where the examples have them: `problem`, `solution`, `answer` and
            `reasoning_prompt_ids`.
        """
        batch: dict[str, Any] = {}
        for prefix, column in (("", "student_prompt_ids"), ("teacher_", "teacher_prompt_ids")):
            prompts = [feature[column] for feature in features]
            batch[f"{prefix}prompts"], batch[f"{prefix}prompt_attention_mask"] = self.pad_prompts(prompts)
        for column in ("problem", "solution", "answer", "reasoning_prompt_ids"):
            if column in features[0]:
                batch[column] = [feature[column] for feature in features]
        return batch
