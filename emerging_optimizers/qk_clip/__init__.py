"""QK-Clip: attention logits that stay below a threshold, beside any optimizer."""

from emerging_optimizers.qk_clip.clip import QKClip
from emerging_optimizers.qk_clip.heads import Heads

__all__ = ["Heads", "QKClip"]
