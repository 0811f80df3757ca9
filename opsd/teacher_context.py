"""The teacher's context: the reference in its prompt, its rationale, and how much each graded rollout counts."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from data_collator import Rollout, SelfDistillationDataCollator
from opsd.config import OPSDConfig
from opsd.contexts import Peer, boxed
from opsd.grading import RIGHT
from opsd.metrics import Metrics
from opsd.rewards import Verifier, as_reference, group_advantages
from opsd.rollouts import Sampler
from opsd.teacher import Teacher
from opsd.thinking import decode_response


class TeacherContext:
    """
    Settles the lesson of each rollout: its weight, its advantage, and the prompt from which the teacher scores it.

    Args:
        args: settings.
        collator: encodes prompts.
        sampler: samples rationales.
        teacher: whose weights write them.
        metrics: where grades, references and rationales are counted.
        end_ids: end-of-sequence tokens.
    """

    def __init__(
        self,
        args: OPSDConfig,
        collator: SelfDistillationDataCollator,
        sampler: Sampler,
        teacher: Teacher,
        metrics: Metrics,
        end_ids: Sequence[int],
    ):
        self.args, self.collator, self.sampler, self.teacher = args, collator, sampler, teacher
        self.metrics, self.end_ids = metrics, set(end_ids)
        self.num_rationale_tokens = 0  # sampled for the last step
        self.verifier = Verifier(args.student_thinking, args.extract, args.verifier) if args.grades_rollouts else None

    def build(self, rollouts: Sequence[Rollout], group_size: int, model: nn.Module) -> None:
        """
        Set `is_correct`, `weight`, `advantage`, `teacher_prompt_ids` and `rationale_ids` of completed rollouts, and
        `teacher_top` if the teacher is on a server.

        All processes call it together, each with its own rollouts.

        Args:
            rollouts: of an optimizer step on this process.
            group_size: number of successive rollouts that belong to one problem.
            model: the model in training, as its launcher has wrapped it.
        """
        if self.verifier is not None:
            texts = [decode_response(self.collator.tokenizer, rollout.completion_ids) for rollout in rollouts]
            answers, rows = [rollout.answer for rollout in rollouts], [rollout.texts for rollout in rollouts]
            self._grade(rollouts, self.verifier(texts, answers, rows), group_size)
            if (find_peers := self.args.context.of_group) is not None:
                seen = [Peer(r.is_correct, not r.is_truncated, len(r.completion_ids)) for r in rollouts]
                self._refer_to_peers(rollouts, find_peers(seen, group_size), texts, group_size)
        if self.args.reason_first:
            self._add_rationales(rollouts, model)
        if self.teacher.server is not None:
            with self.metrics.timed("teacher"):
                self.teacher.server.score(rollouts)

    def _grade(self, rollouts: Sequence[Rollout], scores: Sequence[float | None], group_size: int) -> None:
        """Set weights by what is right, and advantages by the scores."""
        correct = [None if score is None else score >= RIGHT for score in scores]
        weight_of = {True: self.args.correct_weight, False: self.args.incorrect_weight, None: 1.0}
        for rollout, is_correct in zip(rollouts, correct, strict=True):
            rollout.is_correct, rollout.weight = is_correct, weight_of[is_correct]
        if self.args.policy_gradient_weight > 0.0:
            for rollout, advantage in zip(rollouts, group_advantages(scores, group_size), strict=True):
                rollout.advantage = advantage
        graded = [is_correct for is_correct in correct if is_correct is not None]
        self.metrics.add_values("rewards/accuracy/mean", graded)
        if self.args.verifier != "math":
            self.metrics.add_values("rewards/score/mean", [score for score in scores if score is not None])
        self.metrics.add_values("rewards/ungraded_ratio", [is_correct is None for is_correct in correct])
        if group_size == 1:
            return
        groups = [set(scores[start : start + group_size]) for start in range(0, len(scores), group_size)]
        groups = [group - {None} for group in groups]
        self.metrics.add_values("frac_reward_zero_std", [len(group) == 1 for group in groups if group])

    def _refer_to_peers(
        self, rollouts: Sequence[Rollout], peers: Sequence[int | None], texts: Sequence[str], group_size: int
    ) -> None:
        """Show the teacher of each rollout its peer, or else what `reference_fallback` says."""
        encoded: dict[tuple[int, str], dict[str, Any]] = {}  # (group, reference) -> prompts
        statuses = []
        for place, (rollout, peer) in enumerate(zip(rollouts, peers, strict=True)):
            reference = self._fallback(rollout) if peer is None else as_reference(texts[peer])
            prompts: dict[str, Any] = {"length_status": "dropped"}
            if reference is not None:
                key = place // group_size, reference
                if key not in encoded:
                    encoded[key] = self.collator.encode_teacher(
                        rollout.problem, reference, rollout.history, rollout.texts
                    )
                prompts = encoded[key]
            rollout.reference = reference
            statuses.append(prompts["length_status"])
            if statuses[-1] == "dropped":  # no reference, or one that is too long
                rollout.weight = 0.0
                prompts = {"teacher_prompt_ids": rollout.prompt_ids}  # any prompt will do: it does not count
            rollout.teacher_prompt_ids = prompts["teacher_prompt_ids"]
            rollout.reasoning_prompt_ids = prompts.get("reasoning_prompt_ids")
        self.metrics.add_values("references/peer_ratio", [peer is not None for peer in peers])
        self.metrics.add_values("references/none_ratio", [status == "dropped" for status in statuses])
        self.metrics.add_values("references/shortened_ratio", [status == "shortened" for status in statuses])

    def _fallback(self, rollout: Rollout) -> str | None:
        """Return the reference of a rollout without a correct peer."""
        if self.args.reference_fallback == "solution":
            return rollout.solution
        if self.args.reference_fallback == "answer" and rollout.answer is not None:
            return boxed(rollout.answer)
        return None

    def _add_rationales(self, rollouts: Sequence[Rollout], model: nn.Module) -> None:
        """Let the teacher write about the reference, and put that into its prompt. An empty rationale is left out."""
        asked = [
            (tuple(rollout.reasoning_prompt_ids), rollout)
            for rollout in rollouts
            if rollout.weight > 0.0 and rollout.reasoning_prompt_ids
        ]
        prompts = dict.fromkeys(prompt for prompt, _ in asked)  # one rationale for each distinct prompt
        with self.metrics.timed("rationale"), self.teacher.active(model):
            if self.teacher.weights is not None:
                self.sampler.sync_weights()  # the teacher's; `sync` brings the student's back
            written = self.sampler.sample(
                list(map(list, prompts)),
                base=self.teacher.is_base,
                **self.args.rationale_sampling,
            )
        self.num_rationale_tokens = sum(len(completion.ids) for completion in written)
        rationales = {}  # token ids, without the end-of-sequence token
        for prompt, completion in zip(prompts, written, strict=True):
            end = next((place for place, token_id in enumerate(completion.ids) if token_id in self.end_ids), None)
            rationales[prompt] = completion.ids[:end]
            self.metrics.add("rationales/clipped_ratio", end is None, 1.0)
        self.metrics.add_values("rationales/mean_length", list(map(len, rationales.values())))
        decode = self.collator.tokenizer.decode
        is_empty = {prompt: not decode(ids, skip_special_tokens=False).strip() for prompt, ids in rationales.items()}
        self.metrics.add_values("rationales/empty_ratio", list(is_empty.values()))
        for prompt, rollout in asked:
            if not is_empty[prompt]:
                rollout.rationale_ids = rationales[prompt]
                rollout.teacher_prompt_ids = [*prompt, *rationales[prompt], *self.collator.transition_ids]
