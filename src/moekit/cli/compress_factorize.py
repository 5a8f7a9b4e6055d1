"""`moekit compress factorize`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekit.cli.common import (
    Dtype,
    DtypeOption,
    JsonOption,
    ModelArgument,
    Output,
    SeedOption,
    ThreadsOption,
    output,
    progress,
)
from moekit.cli.compress_finish import Destination, finish
from moekit.cli.compress_options import (
    BatchSizeOption,
    DataOption,
    EvalOption,
    MaxTokensOption,
    OutArgument,
    PlanOnlyOption,
    SaveStatsOption,
    SeqLenOption,
    StatsOption,
)
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
from moekit.core.errors import UserError

if TYPE_CHECKING:
    from moekit.compress.factorize.plan import FactorizeRequest
    from moekit.core.plan import ExpertPlan
    from moekit.core.rewrite import Rewrite
    from moekit.core.spec import MoESpec
    from moekit.core.stats import ExpertStats


def factorize(
    model: ModelArgument,
    out: OutArgument = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME[:OPTION=VALUE,...]",
            help="A factorisation (`moekit list --kind factorizer`), with options as "
            "molae:group=4 or mole:first_rank=64.",
        ),
    ] = "molae-white",
    rank: Annotated[
        int | None, typer.Option(min=1, help="Rank of every projection, private or shared.")
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Share of the experts' numbers that the factors save."),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Share of the squared singular values that stays; each layer then has its rank.",
        ),
    ] = None,
    factored: Annotated[
        bool,
        typer.Option(
            "--factored",
            help="Write the factors themselves, which moekit alone loads, in place of --to.",
        ),
    ] = False,
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
    """Replace experts by products of smaller matrices.

    No stock class holds the factors, so they are multiplied out when they are written, at the size
    of the model; --factored writes them as they are, for moekit's verbs.
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
            "factorize", model, out, plan_only, formats, seed, threads, tuple(evaluate or ())
        )
        destination.check()
        from moekit.compress.calibrate import Calibration
        from moekit.compress.factorize.plan import FactorizeRequest, factorize_plan, stored_share
        from moekit.compress.fitted import rewrite_of
        from moekit.core.load import find_config
        from moekit.core.method_text import parse_method
        from moekit.core.spec import spec_from_config

        if factored and (plan_only or dry_run or evaluate or overwrite or to is not Format.fused):
            raise UserError(
                "--factored writes factors to OUT; it does not go with --plan-only, --dry-run, "
                "--eval, --overwrite or --to"
            )
        name, options = parse_method(method)
        request = FactorizeRequest(name, options, rank, ratio, energy)
        calibration = None
        if request.sets():
            calibration = Calibration(
                stats, tuple(data or ()), max_tokens, seq_len, batch_size, seed
            )
        elif stats is not None or data:
            raise UserError(
                f"--method {name} looks at no text: leave --stats and --data out, or give it "
                "white=true"
            )
        check_save(save_stats, calibration)
        if plan_only is not None:
            found_again(name, calibration, save_stats)
        spec = spec_from_config(find_config(model))
        if request.energy is None:
            # Refuses what the method cannot reach before anything is run.
            factorize_plan(spec, request)
        collected, path = None, None
        if calibration is not None and not dry_run:
            sets = ["default", *request.sets()]
            collected, path = collect_stats(model, spec, sets, calibration, save_stats, threads)
        plan = _planned(destination.source, spec, request, collected, path, dry_run)
        rewrite = None if dry_run else rewrite_of(plan, destination.source, collected)
        share = stored_share(spec, plan, request)
        printed.line(f"as factors the experts take {share:.3f} of their numbers")
        data_of = {
            "method": method,
            **request.settings,
            "rank": rank,
            "ratio": ratio,
            "energy": energy,
            **(calibration.to_dict() if calibration else {}),
        }
        ranks = {str(layer): plan.action(layer, 0).rank for layer in plan.layers}
        numbers = {"share of the experts' numbers": round(share, 4), "ranks": ranks}
        if factored:
            _write_factors(printed, destination, plan, rewrite, data_of, numbers)
        else:
            finish(printed, destination, plan, rewrite, data=data_of, numbers=numbers)


def _write_factors(
    printed: Output,
    to: Destination,
    plan: ExpertPlan,
    rewrite: Rewrite | None,
    data: dict[str, Any],
    numbers: dict[str, Any],
) -> None:
    """Write the factors, with a record beside them."""
    from moekit.compress.factorize.factorizers import Factorizer
    from moekit.compress.factorize.store import write_factored
    from moekit.core.memory import format_bytes
    from moekit.core.record import start_record

    assert to.out is not None
    assert isinstance(rewrite, Factorizer)
    record = start_record("compress factorize", {"model": to.source, **data}, seed=to.seed)
    with progress("writing", "B") as advance:
        size = write_factored(to.source, to.out, plan, rewrite, progress=advance)
    record.finish({"bytes": size, **numbers}).save(to.out)
    printed.line(f"wrote {to.out}: {format_bytes(size)}, as factors")
    printed.result({"out": str(to.out), "bytes": size, "numbers": numbers, "data": data})


def _planned(
    source: Path,
    spec: MoESpec,
    request: FactorizeRequest,
    stats: ExpertStats | None,
    path: str | None,
    dry_run: bool,
) -> ExpertPlan:
    """The plan; a forecast leaves the ranks of an energy open, since they need the weights."""
    from moekit.compress.condense.model_experts import experts_of
    from moekit.compress.factorize.plan import factorize_plan

    if request.energy is None:
        return factorize_plan(spec, request, stats=stats, stats_path=path)
    if dry_run:
        raise UserError("--dry-run with --energy: the ranks are known from the weights; use --rank")
    with experts_of(source) as experts:
        return factorize_plan(spec, request, experts, stats, stats_path=path)
