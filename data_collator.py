"""Prompts of the two roles, and the collator that pairs them: the student sees the problem, the teacher also its solution."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import pad

# Paper Figure 2, inside the chat template, with the request for a boxed answer and visible limits around the solution.
STUDENT_PROMPT = r"""Problem: {problem}

Please reason step by step, and put your final answer within \boxed{}."""

TEACHER_PROMPT = r"""Problem: {problem}

Here is a reference solution:
--- reference solution begins ---
{solution}
--- reference solution ends ---

After understanding the reference solution, please try to solve this problem using your own approach below.
Derive every step yourself; do not copy or paraphrase the reference solution.

Please reason step by step, and put your final answer within \boxed{}."""

PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")  # \boxed{} is not one
ELLIPSIS = "\n[...]\n"


def check_template(flag: str, template: str, placeholders: set[str]) -> None:
    """Raise `ValueError`, naming `flag`, unless `template` holds exactly the given placeholders."""
    found = set(PLACEHOLDER.findall(template))
    names = ", ".join("{" + name + "}" for name in sorted(placeholders))
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


def encode_chat_prompt(tokenizer: PreTrainedTokenizerBase, content: str, thinking: bool) -> list[int]:
    """Token ids of one user turn up to and including the header of the assistant's turn."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
        enable_thinking=thinking,
    )


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
    ):
        check_template("student_prompt", student_prompt, {"problem"})
        check_template("teacher_prompt", teacher_prompt, {"problem", "solution"})
        if tokenizer.chat_template is None:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template, which both prompts need; use an "
                "instruction-tuned model or set `tokenizer.chat_template`"
            )
        self.tokenizer = tokenizer
        self.student_prompt = student_prompt
        self.teacher_prompt = teacher_prompt
        self.student_thinking = student_thinking
        self.teacher_thinking = teacher_thinking
        self.teacher_prefill_ids = tokenizer(teacher_prefill, add_special_tokens=False).input_ids
        self.teacher_sees_solution = teacher_sees_solution
        self.max_prompt_length = max_prompt_length

    def _fits(self, prompt_ids: list[int]) -> bool:
        return self.max_prompt_length is None or len(prompt_ids) <= self.max_prompt_length

    def _encode_student(self, problem: str) -> list[int]:
        content = fill_template(self.student_prompt, problem=problem)
        return encode_chat_prompt(self.tokenizer, content, self.student_thinking)

    def _encode_teacher(self, problem: str, solution: str) -> list[int]:
        content = fill_template(self.teacher_prompt, problem=problem, solution=solution)
        return encode_chat_prompt(self.tokenizer, content, self.teacher_thinking) + self.teacher_prefill_ids

    def _shorten(self, problem: str, solution: str) -> list[int] | None:
        """The teacher's prompt with as much of the solution's two ends as fits, or `None`."""
        low, high = len(solution) // 8, len(solution) // 2 - 1  # characters kept at each end; bisected for the most
        best = None
        while low <= high:
            kept = (low + high) // 2
            shortened = solution[:kept] + ELLIPSIS + solution[len(solution) - kept :]
            prompt_ids = self._encode_teacher(problem, shortened)
            if self._fits(prompt_ids):
                best, low = prompt_ids, kept + 1
            else:
                high = kept - 1
        return best

    def encode(self, example: Mapping[str, Any]) -> dict[str, Any]:
        """
        Prompt token ids of both roles, from the texts `problem` and `solution` of an example.

        Returns:
            `student_prompt_ids` and `teacher_prompt_ids` (lists of int), and `length_status`: "kept", "shortened" (the
            solution was cut in its middle) or "dropped" (both lists are empty: leave the example out).
        """
        problem, solution = example["problem"], example["solution"]
        status = "kept"
        student_ids = self._encode_student(problem)
        if self.teacher_sees_solution:
            teacher_ids = self._encode_teacher(problem, solution)
            if self._fits(student_ids) and not self._fits(teacher_ids):
                status, teacher_ids = "shortened", self._shorten(problem, solution)
        else:
            teacher_ids = student_ids
        if not self._fits(student_ids) or teacher_ids is None:
            status, student_ids, teacher_ids = "dropped", [], []
        return {"student_prompt_ids": student_ids, "teacher_prompt_ids": teacher_ids, "length_status": status}

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """
        Left-pad the prompts of encoded examples.

        Returns:
            int64 tensors: `prompts` and `prompt_attention_mask` of shape (batch, longest student prompt), under the
            names that TRL's GOLD trainer samples from; `teacher_prompts` and `teacher_prompt_attention_mask` of shape
            (batch, longest teacher prompt). And `answer`, a list of strings, where the examples have one.
        """
        pad_token_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        batch = {}
        for prefix, column in (("", "student_prompt_ids"), ("teacher_", "teacher_prompt_ids")):
            prompts = [torch.tensor(feature[column], dtype=torch.long) for feature in features]
            batch[f"{prefix}prompts"] = pad(prompts, padding_value=pad_token_id, padding_side="left")
            batch[f"{prefix}prompt_attention_mask"] = pad(
                [torch.ones_like(prompt) for prompt in prompts], padding_value=0, padding_side="left"
            )
        if "answer" in features[0]:
            batch["answer"] = [feature["answer"] for feature in features]
        return batch
