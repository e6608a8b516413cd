"""`kvpref plan`."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from kvpref.cli.given_data import GivenData
from kvpref.cli.options import (
    BATCH_SIZE,
    BF16,
    CHECKPOINT,
    COLUMN,
    DEFAULT_BATCH_SIZE,
    DEFAULT_CHECKPOINT,
    DEFAULT_DTYPE,
    DEFAULT_PREFIX_CACHE,
    DTYPE,
    GROUP_BY,
    LORA_R,
    LORA_TARGET_MODULES,
    PREFIX_CACHE,
    SPLIT,
    TOKENIZER,
    check_counts,
)
from kvpref.cli.sizes import parse_bytes
from kvpref.errors import InputError

if TYPE_CHECKING:
    from rich.progress import Progress

    from kvpref.engine.options import EngineOptions
    from kvpref.profiling.prediction.fit import VariantPlan
    from kvpref.profiling.prediction.images import PromptStart
    from kvpref.profiling.prediction.model import TrainingSetup
    from kvpref.profiling.prediction.peak import Predictor
    from kvpref.profiling.prediction.ranks import Ranks
    from kvpref.profiling.prediction.step import GroupShape

_OF_DATA = "that of --data"
_LENGTHS = ("max", "p90", "p50")


def plan(
    model: Annotated[str, typer.Argument(help="CONFIG.json, a folder with config.json, or a hub name.")],
    gpu_memory: Annotated[str, typer.Option(help="Memory of one device, such as 80GiB; without unit GiB.")] = "80GiB",
    reserve: Annotated[str, typer.Option(help="Kept free for fragmentation and the CUDA context.")] = "2GiB",
    prompt_tokens: Annotated[int | None, typer.Option(help="Tokens of a prompt.", show_default=_OF_DATA)] = None,
    response_tokens: Annotated[int | None, typer.Option(help="Tokens of a response.", show_default=_OF_DATA)] = None,
    num_responses: Annotated[int | None, typer.Option(help="Responses per prompt.", show_default=_OF_DATA)] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Take lengths not given from this data.", show_default="none")
    ] = None,
    split: Annotated[str | None, SPLIT] = None,
    column: Annotated[list[str] | None, COLUMN] = None,
    group_by: Annotated[str | None, GROUP_BY] = None,
    tokenizer: Annotated[str | None, TOKENIZER] = None,
    images: Annotated[int, typer.Option(help="Images per prompt, made up; those of --data otherwise.")] = 0,
    image_size: Annotated[str, typer.Option(help="Width x height of made-up images, in pixels.")] = "640x480",
    lengths: Annotated[str, typer.Option(help="Which of the data's lengths: max, p90, p50.")] = "max",
    dtype: Annotated[str, DTYPE] = DEFAULT_DTYPE,
    bf16: Annotated[bool | None, BF16] = None,
    optimizer: Annotated[str, typer.Option(help="adamw, sgd, sgd_momentum.")] = "adamw",
    lora_r: Annotated[int | None, LORA_R] = None,
    lora_target_modules: Annotated[str | None, LORA_TARGET_MODULES] = None,
    checkpoint: Annotated[str, CHECKPOINT] = DEFAULT_CHECKPOINT,
    prefix_cache: Annotated[str, PREFIX_CACHE] = DEFAULT_PREFIX_CACHE,
    world_size: Annotated[int, typer.Option("--world-size", "--num-shards", help="Devices that train together.")] = 1,
    shard: Annotated[str, typer.Option(help="How they share the model: ddp, zero1, zero2, zero3, fsdp2.")] = "fsdp2",
    sequence_parallel: Annotated[int, typer.Option(help="Devices that share each micro-batch.")] = 1,
    batch_size: Annotated[int, BATCH_SIZE] = DEFAULT_BATCH_SIZE,
    device: Annotated[str, typer.Option(help="Whose kernels: cuda, cpu.")] = "cuda",
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on the last line of stdout.")] = False,
) -> None:
    """Predict peak memory, and the largest budgets that fit. Needs no GPU and loads no weights.

    Planned is what `kvpref train` runs: weights in float32 with bf16 autocast, unless named otherwise. The commands
    printed train with exactly the settings planned for.

    Example: kvpref plan ./llama --gpu-memory 80GiB --prompt-tokens 4096 --response-tokens 512 --num-responses 16
    """
    from kvpref.cli.adapters import refuse_to_plan

    refuse_to_plan(model)
    given = (prompt_tokens, response_tokens, num_responses)
    if not data and None in given:
        raise InputError("give --prompt-tokens, --response-tokens and --num-responses, or --data")
    # After that, since they import torch.
    from kvpref.cli.made_up_images import made_up_start
    from kvpref.cli.plan_command import Subject
    from kvpref.cli.plan_report import PlanReport, describe
    from kvpref.models.lora_targets import ALL_LINEAR
    from kvpref.profiling.prediction.ranks import Ranks

    memory_bytes, reserve_bytes = parse_bytes(gpu_memory, "--gpu-memory"), parse_bytes(reserve, "--reserve")
    if reserve_bytes >= memory_bytes:
        raise InputError(f"--reserve {reserve} leaves nothing of --gpu-memory {gpu_memory}")
    check_counts(batch_size=batch_size)
    ranks = Ranks(world_size=world_size, shard=shard, sequence_parallel=sequence_parallel)
    source = GivenData.of(data, split=split, column=column, group_by=group_by) if data else None
    made_up = made_up_start(tokenizer or model, images, image_size) if images else None
    shape = _shape(model, source, tokenizer, lengths, given, made_up)
    setup = _setup(dtype, bf16, optimizer, lora_r, lora_target_modules or ALL_LINEAR, device)
    predictor = _predictor(model, setup, ranks)
    plans = _plan_variants(predictor, shape, memory_bytes - reserve_bytes, checkpoint, prefix_cache)
    report = PlanReport(
        subject=Subject(model=model, data=source, tokenizer=tokenizer),
        plans=plans,
        setup=setup,
        predictor=predictor,
        shape=shape,
        groups_per_rank=batch_size,
        budget_bytes=memory_bytes - reserve_bytes,
    )
    report.show(f"{model}: {gpu_memory} less {reserve} in reserve; {describe(shape)}")
    if json_:
        settings = {"model": model, "gpu_memory_bytes": memory_bytes, "reserve_bytes": reserve_bytes}
        print(json.dumps({**settings, "shape": shape.to_json(), **report.to_json()}))


def _shape(
    model: str,
    data: GivenData | None,
    tokenizer: str | None,
    which: str,
    given: tuple[int | None, int | None, int | None],
    start: PromptStart | None,
) -> GroupShape:
    from kvpref.profiling.prediction.step import GroupShape

    found: tuple[int | None, int | None, int | None] = (None, None, None)
    if data is not None:
        found, of_data = _lengths_of(data, tokenizer or model, which)
        start = start or of_data
    lengths = [own if own is not None else other for own, other in zip(given, found, strict=True)]
    prompt, response, count = (length or 0 for length in lengths)
    if start is not None and given[0] is None:
        prompt = max(prompt, start.num_tokens)
    return GroupShape(prompt_tokens=prompt, response_tokens=response, num_responses=count, start=start)


def _lengths_of(data: GivenData, tokenizer: str, which: str) -> tuple[tuple[int, int, int], PromptStart | None]:
    """Prompt tokens, response tokens and responses per prompt; the beginning of the prompt with the most images."""
    from kvpref.data import load_processor, summarize_dataset
    from kvpref.profiling.prediction.images import most_images

    if which not in _LENGTHS:
        raise InputError(f"unknown lengths {which!r}; choose from: {', '.join(_LENGTHS)}")
    print(f"reading {data}", file=sys.stderr)
    groups = data.load(load_processor(tokenizer))
    statistics = summarize_dataset(groups)
    summaries = (statistics.prompt_tokens, statistics.response_tokens, statistics.sequences_per_group)
    prompt, response, count = (getattr(summary, which) for summary in summaries)
    return (prompt, response, count), most_images(groups)


def _setup(
    dtype: str, bf16: bool | None, optimizer: str, lora_r: int | None, lora_target_modules: str, device: str
) -> TrainingSetup:
    import torch

    from kvpref.profiling.prediction.model import TrainingSetup

    if dtype not in ("bfloat16", "float32"):
        raise InputError(f"unknown dtype {dtype!r}; choose from: float32, bfloat16")
    if bf16 is None:
        bf16 = dtype == "float32" and device == "cuda"  # as `kvpref train` on such a device
    return TrainingSetup(
        dtype=getattr(torch, dtype),
        mixed_precision=torch.bfloat16 if bf16 else None,
        optimizer=optimizer,
        lora_r=lora_r,
        lora_target_modules=lora_target_modules,
        device_type=device,
    )


def _predictor(model: str, setup: TrainingSetup, ranks: Ranks) -> Predictor:
    from kvpref.cli.loading import load_config
    from kvpref.profiling.prediction.peak import Predictor

    config = load_config(model)
    heads = getattr(config.get_text_config(decoder=True), "num_key_value_heads", None)
    if heads is not None and heads % ranks.sequence_parallel:
        raise InputError(
            f"{ranks.sequence_parallel} devices cannot share each micro-batch of a model with {heads} key/value heads; "
            "--sequence-parallel must be a divisor of them"
        )
    return Predictor(config, setup, ranks=ranks)


def _plan_variants(
    predictor: Predictor, shape: GroupShape, budget_bytes: int, checkpoint: str, prefix_cache: str
) -> list[VariantPlan]:
    from dataclasses import replace

    from kvpref.engine.options import EngineOptions
    from kvpref.profiling.prediction.plans import plan_variants

    at_once = "none" if checkpoint == "prefix" else checkpoint  # these modes give prefixes no pass of their own
    variants: dict[str, EngineOptions] = {
        "bounded": EngineOptions(schedule="bounded", checkpoint=checkpoint, prefix_cache=prefix_cache),
        "full": EngineOptions(checkpoint=checkpoint),
        "packed": EngineOptions(mode="packed", checkpoint=at_once),
        "padded": EngineOptions(mode="padded", checkpoint=at_once),
    }
    if predictor.ranks.world_size > 1 and predictor.ranks.shard == "fsdp2":
        kept = replace(variants["bounded"], gather_weights="step", reduce_grads="step")
        variants = {"bounded": variants["bounded"], "bounded, kept": kept, **variants}
    if predictor.ranks.sequence_parallel > 1:
        del variants["padded"]  # its rows are no passes, which is what ranks share
    planning = plan_variants(variants, predictor, shape, budget_bytes)
    plans = {}
    with _progress() as progress:
        for plan in progress.track(planning, total=len(variants), description="planning"):
            plans[plan.name] = plan
    return [plans[name] for name in variants]


def _progress() -> Progress:
    """On stderr, while it is a terminal; it leaves nothing behind."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
