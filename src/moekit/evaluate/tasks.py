"""The bridge to lm-eval (an extra): run its tasks, or local YAML tasks, on a loaded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moekit.core.errors import UserError
from moekit.core.registry import register


@register(
    "measure",
    "lm-eval",
    title="Tasks of lm-eval, and local YAML tasks that work offline",
    paper="Language Model Evaluation Harness",
    needs=("weights", "data"),
    limits="Needs the extra moekit[eval]; tasks of lm-eval itself download their data.",
    options={
        "include_path": "directory with YAML tasks of your own",
        "num_fewshot": "examples before each question; the task's own number by default",
        "limit": "questions a task",
        "batch_size": "questions in one forward pass",
        "seed": "seed of the choice of examples",
    },
)
def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: list[str],
    *,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> dict[str, dict[str, float | str]]:
    """Metrics by task, each with its standard error beside it, as lm-eval names them.

    Raises UserError where lm-eval is not installed or a task is unknown.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"--tasks needs lm-eval ({error.name} is missing): pip install 'moekit[eval]'"
        ) from error
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include-path {include_path}: no such directory")
    # Local tasks alone where there are any: indexing the thousands of built-in ones takes long.
    manager = TaskManager(
        include_path=str(include_path) if include_path is not None else None,
        include_defaults=include_path is None,
    )
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown and include_path is not None:
        manager = TaskManager(include_path=str(include_path))
        unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        where = "lm-eval" if include_path is None else f"{include_path} or lm-eval"
        raise UserError(f"--tasks: {', '.join(unknown)} not found in {where}")
    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=tasks,
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        bootstrap_iters=1000,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
        log_samples=False,
    )
    return {task: dict(results["results"][task]) for task in results["results"]}
