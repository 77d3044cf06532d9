"""The floors of the house: a module imports only from lower floors, and the optimizers need torch alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_multinorm"
FLOORS = {
    "batch": 0,
    "errors": 0,
    "flops": 0,
    "quantities": 0,
    "parameter_names": 0,
    "rounding": 0,
    "scaling": 0,
    "views": 0,
    "layouts.matrix": 0,
    "layouts.dtensors": 1,
    "layouts.flat": 1,
    "layouts": 2,
    "layouts.clipping": 3,
    "checkpoints.files": 0,
    "checkpoints.damage": 0,
    "checkpoints.ranks": 1,
    "checkpoints.metadata": 1,
    "checkpoints.spread": 3,
    "checkpoints.last": 3,
    "checkpoints.staging": 4,
    "checkpoints.background": 5,
    "checkpoints.folders": 4,
    "checkpoints.reading": 5,
    "checkpoints.io": 7,
    "checkpoints.strategy": 8,
    "checkpoints": 9,
    "schedules": 0,
    "whitening": 1,
    "sinkhorn.reference": 0,
    "sinkhorn.tracing": 0,
    "sinkhorn.cpu_intrinsics": 0,
    "sinkhorn.cpu_threads": 0,
    "sinkhorn.cpu_jit": 0,
    "sinkhorn.cpu_vectors": 1,
    "sinkhorn.cpu_rows": 2,
    "sinkhorn.cpu_range": 3,
    "sinkhorn.cpu_kernels": 4,
    "sinkhorn.triton_kernels": 1,
    "sinkhorn.cpu": 5,
    "sinkhorn.eager": 2,
    "sinkhorn.triton": 2,
    "sinkhorn.sharded": 3,
    "sinkhorn.cpu_passes": 5,
    "sinkhorn.eager_passes": 4,
    "sinkhorn.triton_passes": 4,
    "sinkhorn.select": 6,
    "norms": 2,
    "configurations": 1,
    "arguments": 0,
    "alternating": 3,
    "sinkhorn": 7,
    "optim.routing": 8,
    "optim.checks": 8,
    "optim.auto_iterations": 0,
    "optim.observation": 7,
    "optim.normalized": 8,
    "optim.gram": 8,
    "optim.cpu_adam": 7,
    "optim.fallback": 8,
    "optim.hyperparameters": 8,
    "optim.scalings": 8,
    "optim.stateless": 8,
    "optim.operator_norm": 9,
    "optim.groups": 9,
    "optim.base": 10,
    "optim.rates": 11,
    "optim.release": 11,
    "optim.shadow": 11,
    "optim.combined": 11,
    "optim.plain_state": 8,
    "optim.sinkgd": 11,
    "optim.swan": 11,
    "optim.multinormgd": 11,
    "optim": 12,
    "data": 13,
    "strategies": 13,
    "report": 0,
    "report.runs": 1,
    "report.tables": 2,
    "report.matrices": 2,
    "report.comparison": 2,
    "report.charts": 3,
    "report.contents": 4,
    "report.files": 1,
    "report.page": 5,
    "report.command": 13,
    "llama": 14,
    "callbacks": 14,
    "inference.trained": 15,
    "inference.card": 16,
    "inference.generation": 16,
    "inference.export": 17,
    "inference": 14,
    "planning": 15,
    "resuming": 15,
    "cli": 18,
    "__init__": 19,
    "__main__": 19,
}
HEAVY = ("lightning", "transformers", "datasets", "jsonargparse", "torchmetrics", "tokenizers", "numba", "triton")


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "__init__"


def floor_of(name: str) -> int:
    """The floor of a module, or of the folder it lies in."""
    while name not in FLOORS and "." in name:
        name = name.rpartition(".")[0]
    return FLOORS[name]


def imported(path: Path) -> set[str]:
    """Modules of this package that a file imports, except for type checking alone."""
    names = set()
    tree = ast.parse(path.read_text())
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped or not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        if node.module == "lightning_multinorm":
            names |= {alias.name for alias in node.names if (PACKAGE / alias.name).exists()}
        elif node.module.startswith("lightning_multinorm."):
            room = node.module.removeprefix("lightning_multinorm.")
            files = {
                alias.name for alias in node.names if (PACKAGE / room.replace(".", "/") / f"{alias.name}.py").exists()
            }
            names |= {f"{room}.{name}" for name in files}
            if len(files) < len(node.names):
                names.add(room)
    return names


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_go_down(path: Path) -> None:
    name = name_of(path)
    for other in imported(path):
        same_room = floor_of(other) == floor_of(name) and other.split(".")[0] == name.split(".")[0]
        assert floor_of(other) < floor_of(name) or (same_room and "." in other), f"{name} imports {other}"


def test_optimizers_need_torch_alone() -> None:
    code = (
        "import sys; from lightning_multinorm import SinkGD, SWAN, MultiNormGD, parameter_groups, sr_sinkhorn; "
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    import lightning_multinorm

    assert all(getattr(lightning_multinorm, name) is not None for name in lightning_multinorm.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = lightning_multinorm.no_such_name
