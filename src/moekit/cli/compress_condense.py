"""`moekit compress condense`."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekit.cli.common import (
    Dtype,
    DtypeOption,
    JsonOption,
    ModelArgument,
    SeedOption,
    ThreadsOption,
    note,
    output,
)
from moekit.cli.compress_finish import Destination, finish
from moekit.cli.compress_options import (
    BatchSizeOption,
    DataOption,
    EvalOption,
    ExpertsOption,
    MaxTokensOption,
    OutArgument,
    PlanOnlyOption,
    RatioOption,
    SaveStatsOption,
    SeqLenOption,
    SizeOption,
    StatsOption,
)
from moekit.cli.compress_protect import protected_experts
from moekit.cli.compress_stats import check_save, collect_stats, found_again
from moekit.cli.formats import (
    CodecOption,
    CopyCodeOption,
    DryRunOption,
    Format,
    FormatOptions,
    GgufPreOption,
    GgufTypeOption,
    GroupSizeOption,
    MaxShardOption,
    OverwriteOption,
    ResidentCodecOption,
    RestartOption,
)

if TYPE_CHECKING:
    from moekit.compress.condense.condense import Recipe
    from moekit.core.plan import ExpertPlan
    from moekit.core.rewrite import Rewrite
    from moekit.core.spec import MoESpec
    from moekit.core.stats import ExpertStats


class Scope(StrEnum):
    """Whether every layer keeps as many experts, or the important ones of all layers stay."""

    layer = "layer"
    global_ = "global"


NAMED = "NAME[:OPTION=VALUE,...]"


def condense(
    model: ModelArgument,
    out: OutArgument = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="A published pair of the two below (`moekit list --kind condenser`).",
        ),
    ] = "hc-smoe",
    grouping: Annotated[
        str | None,
        typer.Option(
            metavar=NAMED,
            help="Which experts become one (`moekit list --kind grouping`), with options as "
            "hierarchical:feature=output,linkage=complete.",
        ),
    ] = None,
    fuser: Annotated[
        str | None,
        typer.Option(
            metavar=NAMED, help="How they become one (`moekit list --kind fuser`), with options."
        ),
    ] = None,
    importance: Annotated[
        str | None,
        typer.Option(metavar="SCORE", help="What picks leaders (`moekit list --kind saliency`)."),
    ] = None,
    shares: Annotated[
        str | None, typer.Option(metavar="SCORE", help="What weighs members; or uniform.")
    ] = None,
    align: Annotated[
        str | None,
        typer.Option(help="Neurons in the order of the leader's: weights, activations or none."),
    ] = None,
    router: Annotated[
        str | None,
        typer.Option(
            help="alias: all rows stay and lead to the merged expert (--to packed shares it, other "
            "formats hold copies and do not shrink); mean: rows of a group are averaged; slice: "
            "one stays. The method's own with --to packed, else mean in place of alias."
        ),
    ] = None,
    ratio: RatioOption = None,
    experts: ExpertsOption = None,
    size: SizeOption = None,
    scope: Annotated[
        Scope,
        typer.Option(
            help="layer: as many stay in each. global: one threshold of importance over all layers."
        ),
    ] = Scope.layer,
    protect: Annotated[
        list[str] | None,
        typer.Option(metavar="LAYER:EXPERT", help="An expert that stays alone; repeatable."),
    ] = None,
    stats: StatsOption = None,
    data: DataOption = None,
    max_tokens: MaxTokensOption = None,
    seq_len: SeqLenOption = None,
    batch_size: BatchSizeOption = 8,
    save_stats: SaveStatsOption = None,
    to: Annotated[Format, typer.Option("--to", help="Format of OUT.")] = Format.fused,
    plan_only: PlanOnlyOption = None,
    evaluate: EvalOption = None,
    dtype: DtypeOption = Dtype.auto,
    max_shard_size: MaxShardOption = None,
    codec: CodecOption = None,
    group_size: GroupSizeOption = None,
    resident_codec: ResidentCodecOption = None,
    gguf_type: GgufTypeOption = None,
    gguf_pre: GgufPreOption = None,
    copy_code: CopyCodeOption = False,
    overwrite: OverwriteOption = False,
    restart: RestartOption = False,
    dry_run: DryRunOption = False,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Merge experts that do alike.

    Experts are grouped by what they compute or when they are chosen, and every group becomes one
    expert. Groups and how they merge come from a published method, and can be combined freely.
    """
    with output(as_json) as printed:
        formats = FormatOptions(
            to,
            dtype,
            max_shard_size,
            codec,
            group_size,
            resident_codec,
            gguf_type,
            gguf_pre,
            copy_code,
            overwrite,
            restart,
            dry_run,
        )
        formats.check(None)
        destination = Destination(
            "condense", model, out, plan_only, formats, seed, threads, tuple(evaluate or ())
        )
        destination.check()
        from moekit.compress.calibrate import Calibration
        from moekit.compress.request import check_protected, experts_per_layer
        from moekit.core.load import find_config
        from moekit.core.memory import bytes_of
        from moekit.core.spec import spec_from_config

        given = {"importance": importance, "shares": shares, "align": align, "router": router}
        recipe = _recipe(method, grouping, fuser, given)
        averaged = router is None and recipe.router == "alias" and to is not Format.packed
        if averaged:
            recipe = replace(recipe, router="mean")
        spec = spec_from_config(find_config(model))
        keep = experts_per_layer(
            spec, ratio=ratio, count=experts, size=None if size is None else bytes_of(size)
        )
        protected = protected_experts(protect or [])
        check_protected(spec, keep, protected)
        calibration = Calibration(stats, tuple(data or ()), max_tokens, seq_len, batch_size, seed)
        check_save(save_stats, calibration)
        if plan_only is not None and not recipe.fuser_class().linear:
            found_again(recipe.fuser, calibration, save_stats)
        settings = {
            "method": method,
            **recipe.to_dict(),
            "scope": scope.value,
            "keep": {str(layer): count for layer, count in keep.items()},
            "protect": protect,
            **calibration.to_dict(),
        }
        if dry_run:
            from moekit.compress.condense.condense import anyhow

            finish(printed, destination, anyhow(spec, keep, recipe.router), data=settings)
            return
        collected, stats_path = collect_stats(
            model, spec, recipe.sets(), calibration, save_stats, threads
        )
        if averaged:
            note(
                f"router rows of a group are averaged: --to {to.value} would hold a copy of the "
                "merged expert for each row (--router alias, or --to packed, which shares it)"
            )
        if scope is Scope.global_:
            from moekit.compress.condense.condense import spread_over_layers

            keep = spread_over_layers(spec, collected, keep, recipe.importance, protected)
        plan, rewrite = _decide(
            destination.source, spec, collected, keep, recipe, seed, protected, stats_path
        )
        finish(
            printed,
            destination,
            plan,
            rewrite,
            data=settings,
            numbers={"groups": _sizes(plan)},
        )


def _recipe(
    method: str, grouping: str | None, fuser: str | None, given: dict[str, str | None]
) -> Recipe:
    """The method's recipe with what was given in place of its own; checks every option."""
    from moekit.compress.condense.methods import recipe_of
    from moekit.core.method_text import check_options, parse_method
    from moekit.core.registry import registry

    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    for kind, text in (("grouping", grouping), ("fuser", fuser)):
        if text is not None:
            name, options = parse_method(text)
            check_options(registry.find(name, kind=kind), options, f"--{kind} {name}")
            changes |= {kind: name, f"{kind}_options": options}
    return recipe_of(method, **changes)


def _decide(
    source: Path,
    spec: MoESpec,
    stats: ExpertStats,
    keep: dict[int, int],
    recipe: Recipe,
    seed: int,
    protected: dict[int, set[int]],
    stats_path: str | None,
) -> tuple[ExpertPlan, Rewrite | None]:
    from moekit.compress.condense.condense import condense_plan
    from moekit.compress.condense.model_experts import experts_of
    from moekit.compress.fitted import rewrite_of

    with experts_of(source) as experts:
        plan = condense_plan(
            spec,
            stats,
            experts,
            keep,
            recipe,
            seed=seed,
            protect=protected,
            stats_path=stats_path,
        )
    plan.validate(spec)
    return plan, rewrite_of(plan, source, stats)


def _sizes(plan: ExpertPlan) -> dict[str, list[int]]:
    """Sizes of the groups of every layer, the largest first; lone experts are not counted."""
    return {
        str(layer): sorted((len(group) for group in plan.groups(layer).values()), reverse=True)
        for layer in plan.layers
    }
