"""A plan as tables, for a terminal of 80 columns or more."""

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lightning_multinorm.planning.communication import Traffic
from lightning_multinorm.planning.compute import PEAKS, UTILISATION
from lightning_multinorm.planning.estimate import OptimizerPlan, Plan
from lightning_multinorm.planning.memory import BACKWARD, FORWARD, LOSS, STEP, Moment


def render(plan: Plan) -> RenderableType:
    """Heading, memory, communication between devices if there are several, and FLOPs."""
    parts: list[RenderableType] = [_heading(plan), _memory(plan)]
    if plan.layout.world > 1:
        parts.append(_communication(plan))
    return Group(*parts, _compute(plan))


def gib(size: float) -> str:
    """Bytes in GiB, to two decimals, or three where that would leave one digit or none."""
    value = size / 2**30
    if value == 0 or value >= 0.0995:
        return f"{value:.2f}"
    return f"{value:.3f}" if value >= 0.0005 else "<0.001"


def _heading(plan: Plan) -> Text:
    batch, layout, shape = plan.batch, plan.layout, plan.shape
    axes = [(layout.replicate, "replicas"), (layout.shard, "shards"), (layout.tensor, "tensor-parallel parts")]
    spread = [f"{count} {name}" for count, name in axes if count > 1]
    devices = layout.name + (f" over {_count(layout.world, 'device')}" if layout.world > 1 else "")
    devices += f" = {' × '.join(spread)}" if len(spread) > 1 else ""
    steps = f" × {batch.accumulate} micro-batches" if batch.accumulate > 1 else ""
    return Text.assemble(
        (f"{plan.parameters:,} parameters", "bold"),
        f", {plan.matrices:,} of them in normalised matrices\n",
        f"{_count(shape.layers, 'layer')} of width {shape.hidden}, {plan.precision.name}, {devices}\n",
        f"{batch.sequences} × {batch.length} tokens on a device{steps}, {plan.step_tokens:,} tokens in a step",
    )


def _memory(plan: Plan) -> Table:
    table = _table("GiB on a device")
    for optimizer in plan.optimizers:
        table.add_column(optimizer.memory.name, justify="right", min_width=7)
    table.add_column("", style="dim")
    every = plan.optimizers

    def row(label: str, values: Sequence[int | None], note: str = "", style: str = "") -> None:
        cells = ["?" if value is None else gib(value) for value in values]
        table.add_row(label, *cells, note, style=style)

    row("W  weights", [optimizer.peak.weights for optimizer in every])
    row("S  optimizer states", [optimizer.memory.states for optimizer in every])
    row("   weights and states", [o.weights_and_states for o in every], "as in the papers' tables", "bold")
    row("G  gradients", [_at(optimizer, STEP).gradients for optimizer in every])
    for part, label, note in (
        ("buckets", "B  DDP's copy of them", "gradient_as_bucket_view saves it"),
        ("gathered", "F  gathered by FSDP", "at most: ends and two layers"),
    ):
        sizes = [max(getattr(moment, part) for moment in optimizer.moments) for optimizer in every]
        if any(sizes):
            row(label, sizes, note)
    row("A  activations", [_at(optimizer, LOSS).activations for optimizer in every], "kept for the backward pass")
    row("L  logits and loss", [_at(optimizer, LOSS).logits for optimizer in every], "mostly float32")
    own = [optimizer.memory.transient for optimizer in every]
    row("T  the optimizer's own", own, "unknown, and not in the peak" if None in own else "while it steps")
    table.add_section()
    for name in (FORWARD, LOSS, BACKWARD, STEP):
        held = [_at(optimizer, name) for optimizer in every]
        row("   " + name, [moment.total for moment in held], _ingredients(held[0]))
    row("   peak", [optimizer.peak.total for optimizer in every], "largest of the four", "bold")
    return table


def _at(optimizer: OptimizerPlan, name: str) -> Moment:
    """The largest of the moments of one name."""
    return max((moment for moment in optimizer.moments if moment.name == name), key=lambda moment: moment.total)


def _ingredients(moment: Moment) -> str:
    """The letters of what is held at a moment."""
    if moment.name == BACKWARD:
        return "G grows, A shrinks"
    letters = ["W", "S"]
    letters += [letter for letter, size in (("G", moment.gradients), ("B", moment.buckets)) if size]
    letters += [letter for letter, size in (("A", moment.activations), ("T", moment.transient)) if size]
    letters += ["some F"] if moment.gathered else []
    if moment.logits:
        letters.append("L" if moment.name == LOSS else "some L")
    return "+".join(letters)


def _communication(plan: Plan) -> Table:
    table = _table("Sent by a device in a step")
    table.add_column("collectives", justify="right")
    table.add_column("GiB", justify="right", min_width=7)
    for traffic in _all_traffic(plan):
        table.add_row(traffic.name, f"{traffic.collectives:,}", gib(traffic.bytes))
    return table


def _all_traffic(plan: Plan) -> Iterator[Traffic]:
    yield from plan.traffic
    for optimizer in plan.optimizers:
        yield Traffic(f"{optimizer.memory.name}'s own", optimizer.traffic.collectives, optimizer.traffic.bytes)
    if plan.muon.collectives:
        yield Traffic("for comparison, Muon's, which gathers matrices", plan.muon.collectives, plan.muon.bytes)


def _compute(plan: Plan) -> Text:
    compute, devices = plan.compute, _count(plan.layout.world, "device")
    text = Text.assemble(
        "Tensors alone: a GPU's context, libraries and fragmentation come on top.\n\n",
        (f"{compute.per_token / 1e9:.2f} GFLOP a token", "bold"),
        f": 6 N = {compute.products / 1e9:.2f}, the embedding not counted, and\n"
        f"12 · layers · width · length = {compute.attention / 1e9:.2f} for attention",
    )
    if plan.precision.products.itemsize > 2:
        return text  # the peaks are those of 16 bits
    speeds = (f"{name} {compute.tokens_per_second(peak, plan.layout.world):,.0f}" for name, peak in PEAKS.items())
    return text.append(f"\nTokens a second of {devices} at {UTILISATION:.0%} of dense peak:\n" + " · ".join(speeds))


def _table(title: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(title, min_width=25, header_style="bold")
    return table


def _count(number: int, one: str) -> str:
    return f"{number} {one}" if number == 1 else f"{number} {one}s"
