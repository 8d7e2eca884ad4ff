"""Drop the lines that torchao logs each time transformers imports it.

They are about torchao's own files: kernels that cannot load without a GPU, and enums that it registers in an old way.
Where there is a GPU, the kernels that did not load stay in the log.
"""

from __future__ import annotations

import logging

import torch


def drops(record: logging.LogRecord) -> bool:
    """Return whether a record is one of these lines."""
    if record.name == "torchao":
        return record.getMessage().startswith("Failed to load ") and not torch.cuda.is_available()
    registered = record.args[0] if isinstance(record.args, tuple) and record.args else None
    return "is an Enum subclass" in str(record.msg) and getattr(registered, "__module__", "").startswith("torchao.")


for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).addFilter(lambda record: not drops(record))
