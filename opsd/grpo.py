"""The trainer of the GRPO baseline."""

import logging
from contextlib import nullcontext
from typing import Any

from accelerate.utils import gather_object
from trl import GRPOConfig, GRPOTrainer

from opsd.adapters import AdapterTraining
from opsd.rollouts import VLLMSampler
from opsd.run.checkpoints import CompleteCheckpoints

logger = logging.getLogger(__name__)


class OnPolicyGRPOTrainer(CompleteCheckpoints, AdapterTraining, GRPOTrainer):
    """
    TRL's `GRPOTrainer` with this project's rollouts: vLLM serves the adapter natively, each sample has its own seed.

    Checkpoints are complete or not used, steps that are not finite are skipped, generated tokens are counted.
    """

    logged_counts = (*CompleteCheckpoints.logged_counts, "num_generated_tokens")

    def __init__(self, model: Any, args: GRPOConfig, vllm_adapter_dir: str | None = None, **kwargs: Any):
        use_vllm, args.use_vllm = args.use_vllm, False  # TRL would start an engine that gets its weights by merging
        super().__init__(model=model, args=args, **kwargs)
        self.use_vllm = args.use_vllm = use_vllm
        self.sampler = self.vllm_generation = self._start_sampler(vllm_adapter_dir) if use_vllm else None

    def _start_sampler(self, adapter_dir: str | None) -> VLLMSampler:
        """Start the sampler with the settings that `GRPOTrainer.__init__` gives its own one."""
        args = self.args
        sampler = VLLMSampler.from_config(
            args,
            self.model,
            self.accelerator,
            self.processing_class,
            max_num_seqs=args.per_device_train_batch_size * args.vllm_tensor_parallel_size * args.steps_per_generation,
            structured_outputs_regex=args.vllm_structured_outputs_regex,
            repetition_penalty=args.repetition_penalty,
            generation_kwargs=args.generation_kwargs,
            adapter_dir=adapter_dir,
            logprobs_mode="processed_logprobs",  # at the sampling temperature: what TRL's importance ratio takes
        )
        self._last_loaded_step = -1  # no step: the engine has not got the adapter yet
        if sampler.mode == "server" and args.vllm_importance_sampling_correction and self.accelerator.is_main_process:
            logprobs_mode = sampler.vllm_client.get_server_info()["model_config"]["logprobs_mode"]
            if logprobs_mode != "processed_logprobs":
                logger.warning(
                    "the vLLM server runs with --logprobs-mode %s, which biases the importance ratio: restart it with "
                    "--logprobs-mode processed_logprobs, or say --vllm_importance_sampling_correction false",
                    logprobs_mode,
                )
        return sampler

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> tuple[list[list[int]], list[list[float]] | None]:
        if self.sampler is not None:
            self.sampler.step = self.state.global_step
        # In training's precision, where the model itself samples; vLLM has its own
        with self.accelerator.autocast() if self.sampler is None else nullcontext():
            completion_ids, logprobs = super()._generate_single_turn(*args, **kwargs)
        if self.model.training:
            self._count("num_generated_tokens", sum(gather_object([sum(map(len, completion_ids))])))
        return completion_ids, logprobs
