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
    "checkpoints.io": 6,
    "checkpoints.strategy": 7,
    "checkpoints": 8,
    "schedules": 0,
    "whitening": 1,
    "sinkhorn.reference": 0,
    "sinkhorn.tracing": 0,
    "sinkhorn.cpu_intrinsics": 0,
    "sinkhorn.cpu_threads": 0,
    "sinkhorn.cpu_vectors": 1,
    "sinkhorn.cpu_kernels": 2,
    "sinkhorn.triton_kernels": 1,
    "sinkhorn.cpu": 3,
    "sinkhorn.eager": 2,
    "sinkhorn.triton": 2,
    "sinkhorn.sharded": 3,
    "sinkhorn.cpu_passes": 4,
    "sinkhorn.eager_passes": 4,
    "sinkhorn.triton_passes": 4,
    "sinkhorn.select": 5,
    "norms": 2,
    "configurations": 1,
    "arguments": 0,
    "alternating": 3,
    "sinkhorn": 6,
    "optim.routing": 7,
    "optim.checks": 7,
    "optim.auto_iterations": 0,
    "optim.observation": 6,
    "optim.normalized": 7,
    "optim.gram": 7,
    "optim.cpu_adam": 6,
    "optim.fallback": 7,
    "optim.hyperparameters": 7,
    "optim.scalings": 7,
    "optim.stateless": 7,
    "optim.operator_norm": 8,
    "optim.groups": 8,
    "optim.base": 9,
    "optim.rates": 10,
    "optim.release": 10,
    "optim.shadow": 10,
    "optim.combined": 10,
    "optim.plain_state": 7,
    "optim.sinkgd": 10,
    "optim.swan": 10,
    "optim.multinormgd": 10,
    "optim": 11,
    "data": 12,
    "strategies": 12,
    "report": 0,
    "report.runs": 1,
    "report.tables": 2,
    "report.matrices": 2,
    "report.comparison": 2,
    "report.charts": 3,
    "report.contents": 4,
    "report.files": 1,
    "report.page": 5,
    "report.command": 12,
    "llama": 13,
    "callbacks": 13,
    "inference.trained": 14,
    "inference.card": 15,
    "inference.generation": 15,
    "inference.export": 16,
    "inference": 13,
    "planning": 14,
    "resuming": 14,
    "cli": 17,
    "__init__": 18,
    "__main__": 18,
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
