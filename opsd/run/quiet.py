"""Messages of other libraries that no user can act on, and that stay away from the terminal."""

import logging
import warnings

# logger -> beginning of a message
MESSAGES = {
    "DeepSpeed": "Setting accelerator to CPU",  # said in each run without a GPU, also where nobody uses DeepSpeed
    "vllm.triton_utils.importing": "Triton ",  # that it is not there, or cannot be imported: so on each CPU
}
# category, beginning of a message
WARNINGS: tuple[tuple[type[Warning], str], ...] = (
    (FutureWarning, r"`torch\.distributed\.reduce_op` is deprecated"),  # vLLM looks at all names of torch.distributed
)


class _Unwanted(logging.Filter):
    """Keeps out the records whose message begins with a given text."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.name)


def silence_libraries() -> None:
    """Keep out `MESSAGES` and `WARNINGS` from now on. Call it before the libraries are imported."""
    for name, message in MESSAGES.items():
        logging.getLogger(name).addFilter(_Unwanted(message))
    for category, message in WARNINGS:
        warnings.filterwarnings("ignore", message, category)
