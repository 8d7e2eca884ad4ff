"""Load published feedback models as ours, and write ours in their layouts.

    from feedback_transformers import FeedbackForCausalLM

    model = FeedbackForCausalLM.from_pretrained("ByteDance/Ouro-1.4B")   # recognises the published config

`convert` does the same for weights at hand, and `to_official` goes back.
"""

from __future__ import annotations

from .convert import FAMILIES, convert, family_of, load_official, to_official

__all__ = ["FAMILIES", "convert", "family_of", "load_official", "to_official"]
