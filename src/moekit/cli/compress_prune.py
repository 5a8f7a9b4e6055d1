"""`moekit compress prune`."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moekit.cli.common import (
    Dtype,
    DtypeOption,
    JsonOption,
    ModelArgument,
    Output,
    SeedOption,
    ThreadsOption,
    check_out,
    open_model,
    output,
    progress,
)
from moekit.cli.compress_finish import Destination, finish
from moekit.cli.compress_keep import (
    SUPER,
    check_library,
    from_library,
    protected_experts,
    super_experts_of,
)
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
    write_format,
)
from moekit.core.errors import UserError

if TYPE_CHECKING:
    from moekit.compress.calibrate import Calibration
    from moekit.compress.prune.run import Pruned, PruneRequest
    from moekit.core.plan import ExpertPlan
    from moekit.core.spec import MoESpec
    from moekit.core.stats import ExpertStats


class Scope(StrEnum):
    """Whether every layer loses as many experts, or those that matter least in all layers go."""

    layer = "layer"
    global_ = "global"


def prune(
    model: ModelArgument,
    out: OutArgument = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME[:OPTION=VALUE,...]",
            help="A score or a search (`moekit list --kind saliency`, `--kind search`), with "
            "options as naee:how=descent; or zeros within experts (`--kind sparsifier`).",
        ),
    ] = "reap",
    ratio: RatioOption = None,
    experts: ExpertsOption = None,
    size: SizeOption = None,
    scope: Annotated[
        Scope,
        typer.Option(
            help="layer: as many go in each. global: one threshold over all layers, whose numbers "
            "then differ; --to packed holds that for every family."
        ),
    ] = Scope.layer,
    protect: Annotated[
        list[str] | None,
        typer.Option(
            metavar="super|FILE|LAYER:EXPERT",
            help="Experts that stay: those behind massive activations, those that a plan "
            "protects, or one, as 3:17; repeatable.",
        ),
    ] = None,
    domain: Annotated[
        str | None, typer.Option(help="Take the scores from this domain of the text alone.")
    ] = None,
    by_domain: Annotated[
        bool, typer.Option("--by-domain", help="Let every domain of the text count the same.")
    ] = False,
    stats: StatsOption = None,
    data: DataOption = None,
    max_tokens: MaxTokensOption = None,
    seq_len: SeqLenOption = None,
    batch_size: BatchSizeOption = 8,
    save_stats: SaveStatsOption = None,
    library: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="In place of a method: keep what a task needs, of a library made by moekit "
            "compress library. Needs --task or --query.",
        ),
    ] = None,
    task: Annotated[str | None, typer.Option(help="A task of --library.")] = None,
    query: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Take the task of --library that this text is like."),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            "--state", metavar="FILE", help="Keep what a search has done, to go on from there."
        ),
    ] = None,
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
    """Remove the experts that matter least.

    Which those are, a score says that is taken from statistics of a text, or a search that runs
    the model without them. A router keeps its rule and chooses among the experts that stay.
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
            "prune", model, out, plan_only, formats, seed, threads, tuple(evaluate or ())
        )
        destination.check()
        if save_stats is not None:
            check_out(save_stats)
        from moekit.compress.calibrate import Calibration
        from moekit.compress.prune.planning import any_plan
        from moekit.compress.prune.run import Pruned, PruneRequest, method_of
        from moekit.compress.request import experts_per_layer
        from moekit.core.load import find_config
        from moekit.core.memory import bytes_of
        from moekit.core.spec import spec_from_config

        found, options = method_of(method, seed)
        spec = spec_from_config(find_config(model))
        if found.kind == "sparsifier":
            if not (ratio is None and experts is None and size is None):
                raise UserError(
                    f"{found.name} removes weights, not experts: leave out --ratio, --experts "
                    "and --size"
                )
            ratio = 0.0
        keep = experts_per_layer(
            spec, ratio=ratio, count=experts, size=None if size is None else bytes_of(size)
        )
        request = PruneRequest(found, options, keep, scope.value, domain, by_domain)
        request.check()
        protected = protected_experts(protect or [])
        calibration = None
        if library is not None:
            check_library(task, query, stats, data)
        elif task is not None or query is not None:
            raise UserError("--task and --query choose from a --library, which is not given")
        elif stats is not None or data or found.needs:
            calibration = Calibration(
                stats, tuple(data or ()), max_tokens, seq_len, batch_size, seed
            )
        _check_text(request, calibration, protect or [], state, save_stats)
        if request.masks and plan_only is not None and stats is None and save_stats is None:
            raise UserError(
                f"a plan of {found.name} reads its statistics again when it is applied: give "
                "--stats, or --save-stats with --data"
            )
        anything = any_plan(spec, keep, scope.value, protected)
        _preflight(destination, anything)
        if dry_run:
            printed.line("which experts go is decided by the run; the forecast takes any")
            pruned = Pruned(anything)
        elif library is not None:
            pruned = from_library(
                printed, model, spec, keep, library, task, query, seed, threads, protected
            )
        else:
            pruned = _decide(
                printed,
                model,
                spec,
                request,
                calibration,
                protected,
                protect or [],
                state,
                save_stats,
                threads,
            )
        settings = {
            "method": method if library is None else "premoe",
            "library": library,
            "scope": scope.value,
            "keep": {str(layer): count for layer, count in keep.items()},
            "protect": protect,
            "domain": domain,
            "by_domain": by_domain,
            **(calibration.to_dict() if calibration else {}),
        }
        finish(
            printed,
            destination,
            pruned.plan,
            pruned.rewrite,
            data=settings,
            numbers=pruned.numbers,
        )


def _check_text(
    request: PruneRequest,
    calibration: Calibration | None,
    protect: list[str],
    state: Path | None,
    save_stats: Path | None,
) -> None:
    """Refuse what cannot be met by the text or the statistics that are given."""
    text = calibration is not None and bool(calibration.data)
    if request.searches and not text:
        raise UserError(f"{request.method.name} runs the model: give a text with --data")
    if SUPER in protect and not text:
        raise UserError("--protect super looks at the model as it runs: give a text with --data")
    if state is not None and not request.searches:
        raise UserError(f"--state is for searches; {request.method.name} is a score")
    if save_stats is not None and (request.searches or not text):
        raise UserError("--save-stats keeps what is collected from --data for a score")


def _decide(
    printed: Output,
    model: str,
    spec: MoESpec,
    request: PruneRequest,
    calibration: Calibration | None,
    protected: dict[int, set[int]],
    protect: list[str],
    state: Path | None,
    save_stats: Path | None,
    threads: int | None,
) -> Pruned:
    """Run what the method needs, and let it choose."""
    from moekit.compress.calibrate import batches_for, open_stats, stats_for
    from moekit.compress.prune.run import prune_by_score, prune_by_search, without_stats

    if calibration is None:
        return prune_by_score(spec, without_stats(spec), request, protected)
    if calibration.stats is not None:
        collected = open_stats(calibration.stats, spec, request.sets)
    else:
        from moekit.core.view import MoEView
        from moekit.profile import align_weights

        loaded = open_model(model, Dtype.auto, calibration.seed, threads)
        align_weights(loaded.model)
        view = MoEView(loaded.model)
        if SUPER in protect:
            for layer, expert in super_experts_of(view, batches_for(loaded, calibration)):
                printed.line(f"layer {layer}, expert {expert} makes massive activations: it stays")
                protected.setdefault(layer, set()).add(expert)
        if request.searches:
            batches = batches_for(loaded, calibration)
            identity = {"model": model, **calibration.to_dict(), "data": list(calibration.data)}
            unit = "layers" if request.method.name == "naee" else "models"
            with progress("search", unit) as advance:
                return prune_by_search(
                    view,
                    spec,
                    batches,
                    request,
                    protected,
                    state=state,
                    identity=identity,
                    progress=advance,
                )
        with progress("profile", "batches") as advance:
            collected = stats_for(loaded, calibration, request.sets, progress=advance)
        if save_stats is not None:
            collected.save(save_stats)
    if request.masks:
        from moekit.compress.prune.run import prune_weights

        return prune_weights(spec, collected, request, protected, calibration.stats or save_stats)
    pruned = prune_by_score(spec, collected, request, protected)
    _print_reach(printed, pruned, collected)
    return pruned


def _preflight(destination: Destination, plan: ExpertPlan) -> None:
    """Refuse now what the writer would refuse when everything is decided."""
    if destination.out is not None:
        dry = replace(destination.formats, dry_run=True)
        write_format(destination.source, destination.out, dry, plan)


def _print_reach(printed: Output, pruned: Pruned, stats: ExpertStats) -> None:
    """Name the experts that no token of the calibration chose."""
    never = pruned.numbers.get("never chosen", {})
    tokens = pruned.numbers.get("tokens", 0)
    for layer, experts in never.items():
        shown = ", ".join(map(str, experts[:8])) + (", ..." if len(experts) > 8 else "")
        printed.line(f"layer {layer}: {len(experts)} experts were never chosen: {shown}")
    if never:
        kept = pruned.numbers["never chosen but kept"]
        printed.line(
            f"the text has {tokens:,} tokens; a score knows nothing of these experts and lets them "
            f"go first ({kept} stay). More text shows whether they are used."
        )
