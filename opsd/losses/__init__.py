"""The objectives of OPSD as pure tensor functions, from logits (dense) or from hidden states (fused)."""

from opsd.losses.divergence import (
    CLIP_MODES,
    TOP_K_SUPPORTS,
    Objective,
    TokenLosses,
    TokenStatistics,
    TopLogprobs,
    dense_token_losses,
    generalized_jsd,
    policy_gradient_loss,
    sampled_token_loss,
)
from opsd.losses.elementwise import HeadSettings
from opsd.losses.fused import (
    check_head,
    fused_linear_jsd,
    fused_linear_sampled_token_loss,
    fused_token_losses,
    read_head_settings,
)

__all__ = [
    "CLIP_MODES",
    "TOP_K_SUPPORTS",
    "HeadSettings",
    "Objective",
    "TokenLosses",
    "TokenStatistics",
    "TopLogprobs",
    "check_head",
    "dense_token_losses",
    "fused_linear_jsd",
    "fused_linear_sampled_token_loss",
    "fused_token_losses",
    "generalized_jsd",
    "policy_gradient_loss",
    "read_head_settings",
    "sampled_token_loss",
]
