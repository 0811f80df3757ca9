"""Another model in the teacher's role, on a vLLM server: it tells the most probable next tokens, and no more."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from trl.generation.vllm_client import VLLMClient

from data_collator import Rollout
from opsd.losses import TopLogprobs

if TYPE_CHECKING:
    from opsd.config import OPSDConfig

NUM_REQUESTS = 16  # of a process at once: with k = 100, 10,000 tokens make a reply of 0.4 GB when it is read
MAX_SUM = 1.001  # of probabilities


class TeacherServer:
    """
    A vLLM server that scores rollouts as the teacher (`--teacher_model_server_url`).

    The server gives the `top_k_loss` largest log-probabilities at each token. The divergence takes them, and one entry
    for all the others together.

    Args:
        args: settings.

    Raises:
        ConnectionError: if the server does not answer, or refuses a request.
        ValueError: if it serves another model, reads too short sequences, or reports no log-probabilities.
    """

    def __init__(self, args: "OPSDConfig"):
        self.args, self.url = args, str(args.teacher_model_server_url).rstrip("/")
        name = args.teacher_model_name_or_path
        try:
            self.client = VLLMClient(base_url=self.url, connection_timeout=args.vllm_server_timeout)
            models: list[dict[str, Any]] = self.client._get(f"{self.url}/v1/models")["data"]
        except Exception as error:  # TRL's client raises nothing more specific
            raise self._failure(error) from error
        served = next((model for model in models if name in (model["id"], model.get("root"))), None)
        if served is None:
            raise ValueError(
                f"--teacher_model_server_url {self.url}: serves {', '.join(model['id'] for model in models)}, not "
                f"--teacher_model_name_or_path {name}; name the model that it serves, or start it with "
                f"--served-model-name {name}"
            )
        self.client.model = served["id"]
        self.max_length: int = served.get("max_model_len") or 0
        if self.max_length and args.max_length is not None and self.max_length <= args.max_length:
            raise ValueError(
                f"--teacher_model_server_url {self.url}: reads {self.max_length} tokens, and --max_length is "
                f"{args.max_length}; lower it, or start the server with --max-model-len {args.max_length + 1}"
            )
        self._ask([[0, 0]], [1])  # refuses what it cannot do before the first step

    def _failure(self, error: Exception) -> ConnectionError:
        return ConnectionError(
            f"--teacher_model_server_url {self.url}: {error}\nStart the server with: "
            f"MODEL={self.args.teacher_model_name_or_path} bash scripts/serve_vllm.sh --max-logprobs "
            f"{self.args.top_k_loss}\n--resume_from_checkpoint true goes on from the last complete checkpoint"
        )

    def _ask(self, sequences: list[list[int]], prompt_lengths: list[int]) -> list[TopLogprobs]:
        """Return the top entries of each token after the prompt, (T, k), for each sequence."""
        try:
            reply = self.client.get_sequence_logprobs(
                sequences,
                prompt_lengths,
                top_logprobs=self.args.top_k_loss,
                chunk_size=1,
                max_concurrent_requests=NUM_REQUESTS,
            )
        except Exception as error:  # TRL's client raises nothing more specific
            raise self._failure(error) from error
        shape = (-1, self.args.top_k_loss)
        tops = [
            TopLogprobs(torch.tensor(logprobs).view(shape), torch.tensor(ids, dtype=torch.int64).view(shape))
            for logprobs, ids in zip(reply["logprobs"], reply["logprob_token_ids"], strict=True)
        ]
        for top in tops:
            largest = top.logprobs.double().exp().sum(-1).max().item() if len(top.logprobs) else 0.0
            if not top.logprobs.isfinite().all() or not largest <= MAX_SUM:
                raise ValueError(
                    f"--teacher_model_server_url {self.url}: the {self.args.top_k_loss} values of a token are not all "
                    f"log-probabilities (as such their sum is {largest:.3g}); start the server with --logprobs-mode "
                    "raw_logprobs, and lower --top_k_loss if the vocabulary is smaller"
                )
        return tops

    def score(self, rollouts: Sequence[Rollout]) -> None:
        """
        Set `teacher_top` of completed rollouts whose teacher's prompt is settled.

        Each process asks for its own, `NUM_REQUESTS` at once.

        Raises:
            ConnectionError: if the server fails.
            ValueError: for a sequence that is longer than it reads.
        """
        longest = max((len(r.teacher_prompt_ids) + len(r.completion_ids) for r in rollouts), default=0)
        if 0 < self.max_length <= longest:
            raise ValueError(
                f"--teacher_model_server_url {self.url}: reads {self.max_length} tokens, and a prompt of the teacher "
                f"with its completion has {longest}; start it with --max-model-len {longest + 1} or more, or give "
                "--max_length"
            )
        sequences = [rollout.teacher_prompt_ids + rollout.completion_ids for rollout in rollouts]
        tops = self._ask(sequences, [len(rollout.teacher_prompt_ids) for rollout in rollouts]) if sequences else []
        for rollout, top in zip(rollouts, tops, strict=True):
            rollout.teacher_top = top
