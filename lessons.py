"""What each rollout is learned from, once it is sampled: how much it counts, and what the teacher sees."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from data_collator import SelfDistillationDataCollator, unpad_prompts
from opsd.rewards import Verifier, as_reference, group_advantages, pick_correct_peers
from opsd_config import OPSDConfig
from rationalization import Rationalizer


class Lessons:
    """
    Grades the rollouts of an optimizer step, and from that and the settings derives each rollout's weight, its advantage,
    and the reference in its teacher's prompt; lets the teacher rationalize the references.

    Args:
        args: settings.
        collator: encodes prompts.
        end_ids: end-of-sequence tokens.
        rationalizer: for `reason_first`.
    """

    def __init__(
        self,
        args: OPSDConfig,
        collator: SelfDistillationDataCollator,
        end_ids: Sequence[int],
        rationalizer: Rationalizer | None,
    ):
        self.args, self.collator, self.end_ids, self.rationalizer = args, collator, set(end_ids), rationalizer
        self.verifier = Verifier(args.student_thinking) if args.needs_answers else None
        # Since they were last taken: name -> sum and number of what it is the mean of
        self.sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def _record(self, name: str, values: Sequence[float]) -> None:
        self.sums[name][0] += sum(values)
        self.sums[name][1] += len(values)

    def __call__(self, batch: dict[str, Any], completions: Sequence[Sequence[int]], group_size: int) -> dict[str, Any]:
        """
        All processes call it together, each with its own rollouts.

        Args:
            batch: from the collator.
            completions: token ids of each row.
            group_size: so many rows in turn are rollouts of one problem.

        Returns:
            The batch with the teacher's prompts as they are to be; if rollouts are graded with `correct` (a list of true,
            false or `None` for what has no answer), float32 tensors (batch,) `weights` and, for a reward, `advantages`; and
            with `reason_first` with the list `rationalization`, of texts.
        """
        batch = dict(batch)
        num_rollouts = len(completions)
        if self.verifier is not None:
            decode = self.collator.tokenizer.batch_decode
            texts = decode(completions, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            correct = batch["correct"] = self.verifier(texts, batch["answer"])
            graded = [value for value in correct if value is not None]
            self._record("rollouts/correct_ratio", graded)
            self._record("rollouts/ungraded_ratio", [value is None for value in correct])
            groups = [correct[start : start + group_size] for start in range(0, num_rollouts, group_size)]
            groups = [group for group in groups if any(value is not None for value in group)]
            self._record("groups/none_correct_ratio", [not any(group) for group in groups])
            self._record("groups/all_correct_ratio", [all(group) for group in groups])
            weight_of = {True: self.args.correct_weight, False: self.args.incorrect_weight, None: 1.0}
            weights = [weight_of[value] for value in correct]
            if self.args.policy_gradient_weight > 0.0:
                batch["advantages"] = self._tensor(batch, group_advantages(correct, group_size))
            if self.args.teacher_reference == "rollout":
                self._refer_to_rollouts(batch, completions, texts, weights, group_size)
            batch["weights"] = self._tensor(batch, weights)
        if self.rationalizer is not None:
            self._rationalize(batch)
        return batch

    @staticmethod
    def _tensor(batch: dict[str, Any], values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=batch["prompts"].device)

    def _refer_to_rollouts(
        self,
        batch: dict[str, Any],
        completions: Sequence[Sequence[int]],
        texts: Sequence[str],
        weights: list[float],
        group_size: int,
    ) -> None:
        """Show the teacher another rollout that is right and has ended; where there is none, do as the settings say."""
        usable = [
            bool(is_correct) and not self.end_ids.isdisjoint(ids)
            for is_correct, ids in zip(batch["correct"], completions, strict=True)
        ]
        siblings = pick_correct_peers(usable, group_size)
        encoded: dict[tuple[str, str], dict[str, Any]] = {}  # (problem, reference) -> prompts
        prompts: list[dict[str, Any]] = []
        for row, sibling in enumerate(siblings):
            problem = batch["problem"][row]
            if sibling is not None:
                reference = as_reference(texts[sibling])
            elif self.args.reference_fallback == "solution":
                reference = batch["solution"][row]
            elif self.args.reference_fallback == "answer" and batch["answer"][row] is not None:
                reference = rf"\boxed{{{batch['answer'][row]}}}"
            else:
                reference = None
            if reference is not None and (problem, reference) not in encoded:
                encoded[problem, reference] = self.collator.encode_teacher(problem, reference)
            row_prompts = encoded.get((problem, reference), {"length_status": "dropped"})
            if row_prompts["length_status"] == "dropped":  # no reference, or one that is too long
                weights[row] = 0.0
            prompts.append(row_prompts)
        self._record("references/rollout_ratio", [sibling is not None for sibling in siblings])
        self._record("references/none_ratio", [row["length_status"] == "dropped" for row in prompts])
        self._record("references/shortened_ratio", [row["length_status"] == "shortened" for row in prompts])
        # Rows without a reference do not count: any prompt will do.
        student_prompts = unpad_prompts(batch["prompts"], batch["prompt_attention_mask"])
        self._set_teacher_prompts(
            batch, [row.get("teacher_prompt_ids") or own for row, own in zip(prompts, student_prompts, strict=True)]
        )
        batch["reasoning_prompt_ids"] = [row.get("reasoning_prompt_ids") for row in prompts]

    def _rationalize(self, batch: dict[str, Any]) -> None:
        """Put what the teacher writes about the reference into its prompt; where that is nothing, leave the prompt."""
        counts = batch["weights"].tolist() if "weights" in batch else [1.0] * len(batch["reasoning_prompt_ids"])
        reasoning_prompts = [
            prompt if weight > 0.0 else None
            for prompt, weight in zip(batch["reasoning_prompt_ids"], counts, strict=True)
        ]
        written = iter(self.rationalizer([prompt for prompt in reasoning_prompts if prompt]))
        rationalizations = [next(written) if prompt else None for prompt in reasoning_prompts]
        decode, transition_ids = self.collator.tokenizer.decode, self.collator.transition_ids
        texts = ["" if r is None else decode(r.ids, skip_special_tokens=False) for r in rationalizations]
        unpadded = unpad_prompts(batch["teacher_prompts"], batch["teacher_prompt_attention_mask"])
        teacher_prompts = [
            prompt + rationalization.ids + transition_ids if text.strip() else teacher_prompt
            for prompt, rationalization, text, teacher_prompt in zip(
                reasoning_prompts, rationalizations, texts, unpadded, strict=True
            )
        ]
        self._set_teacher_prompts(batch, teacher_prompts)
        batch["rationalization"] = texts
        made = [(r, text) for r, text in zip(rationalizations, texts, strict=True) if r is not None]
        self._record("rationalizations/mean_length", [len(r.ids) for r, _ in made])
        self._record("rationalizations/truncated_ratio", [r.is_truncated for r, _ in made])
        self._record("rationalizations/empty_ratio", [not text.strip() for _, text in made])
        self._record("rationalizations/cached_ratio", [r.is_cached for r, _ in made])

    def _set_teacher_prompts(self, batch: dict[str, Any], prompts: Sequence[Sequence[int]]) -> None:
        device = batch["prompts"].device
        token_ids, mask = self.collator.pad_prompts(prompts)
        batch["teacher_prompts"], batch["teacher_prompt_attention_mask"] = token_ids.to(device), mask.to(device)
