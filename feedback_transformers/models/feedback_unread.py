"""Fields of a FeedbackConfig that were set and that nothing reads; they are warned of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def unread(config: Any) -> Iterator[str]:
    """Yield a sentence for each field that was set and that nothing reads."""
    depth, solver = config.feedback_axis == "depth", config.solver
    if config.feedback_signal == "none":
        passes = "use feedback_axis='depth' for passes"
    elif config.in_passes:
        passes = "set solver_steps for its passes"
    else:
        passes = "set solver='jacobi' and solver_steps for passes"
    fixed = "with halting='fixed': set halting='converged', 'learned' or 'act'"
    idle = {
        "num_feedback_steps": (not depth, f"with feedback_axis='time': {passes}"),
        "solver_steps": (
            not config.in_passes or depth,
            "with feedback_axis='depth': set num_feedback_steps for its passes"
            if depth
            else f"with solver={solver!r}: it is for 'jacobi' and 'gauss_seidel'",
        ),
        "solver_tolerance": (
            solver == "sequential" and not depth,
            "with solver='sequential': it is for 'jacobi', 'gauss_seidel' and 'newton'",
        ),
        "solver_block_size": (solver != "gauss_seidel", f"with solver={solver!r}: it is for 'gauss_seidel'"),
        "supervision": (not config.in_passes, f"with one pass in order: {passes}"),
        "halting_threshold": (config.halting == "fixed", fixed),
        "halting_measure": (config.halting == "fixed", "with halting='fixed': it is for 'converged'"),
        "halting_prior": (
            config.halting not in ("learned", "select") or config.halting_scope == "sequence",
            f"with halting={config.halting!r}: it is for 'learned', and for 'select' with halting_scope='position'",
        ),
        "halting_weight": (
            config.halting not in ("learned", "act", "select"),
            f"with halting={config.halting!r}: it is for 'learned', 'act' and 'select'",
        ),
        "halting_scope": (config.halting != "select", f"with halting={config.halting!r}: it is for 'select'"),
        **dict.fromkeys(
            ("num_low_steps", "relaxation", "state_noise"),
            (
                config.feedback_recursion not in ("hierarchical", "refinement"),
                f"with feedback_recursion={config.feedback_recursion!r}: it is for 'hierarchical' and 'refinement'",
            ),
        ),
        "share_levels": (
            config.feedback_recursion != "hierarchical",
            f"with feedback_recursion={config.feedback_recursion!r}: it is for 'hierarchical'",
        ),
        **dict.fromkeys(
            ("initial_state_scale", "initial_state_cut", "initial_state_seed"),
            (config.initial_state != "random", "without initial_state='random'"),
        ),
        "mixer_size": (config.token_mixer != "mlp", "without token_mixer='mlp'"),
        "prefix_size": (config.num_prefix_tokens == 0, "without num_prefix_tokens"),
        "num_prefixes": (config.num_prefix_tokens == 0, "without num_prefix_tokens"),
    }
    for name, (unused, why) in idle.items():
        if unused and getattr(config, name) != getattr(type(config), name):
            yield f"{name} has no effect {why}."
