"""How the Triton path launches: what it refuses, tables of addresses, scratch, memory, and graphs that are captured.

Run by `test_triton.test_in_the_interpreter`, too.
"""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from lightning_multinorm.sinkhorn import triton as fast


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("the interpreter has neither graphs nor device memory")
    return device


def test_what_kernels_cannot_read_is_refused(device: torch.device) -> None:
    W = torch.zeros(3, 4, device=device)
    with pytest.raises(TypeError, match=r"float64.*sinkhorn.eager"):
        fast.update_([W.double()], [W.double()], lr=0.1)
    with pytest.raises(TypeError, match=r"float64.*sinkhorn.eager"):
        fast.scalings(W.double(), 1)
    for weights, gradients in (([W, W], [W, W.mT]), ([W], [W.mT]), ([W, W], [W, W.half()]), ([W], [W, W])):
        with pytest.raises(ValueError, match=r"\[3, 4\]"):
            fast.update_(weights, gradients, lr=0.1)


def test_tables_are_kept_and_few(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "_MOST_TABLES", 2)
    fast._TABLES.clear()
    W = torch.zeros(5, 3, 4, device=device)
    first = fast._tables([W[0]], [W[1]])
    assert fast._tables([W[0]], [W[1]]) is first
    for k in (2, 3, 4):
        fast._tables([W[0]], [W[k]])
        assert len(fast._TABLES) <= 2
    assert fast._tables([W[0]], [W[1]]) is not first


_H100 = fast._Chip(processors=132, cache_bytes=50 * 2**20)


@pytest.mark.parametrize(
    ("count", "m", "n", "itemsize"),
    [
        (84, 768, 768, 4),
        (1, 2048, 5461, 2),
        (48, 5461, 2048, 2),
        (24, 2048, 5461, 4),
        (1, 32000, 4096, 2),
        (8, 4096, 32000, 2),
    ],
)
@pytest.mark.parametrize("by_columns", [False, True])
def test_scratch_is_a_hundredth_and_the_gpu_is_filled(
    count: int, m: int, n: int, itemsize: int, by_columns: bool
) -> None:
    strides = (1, m) if by_columns else (n, 1)
    plan = fast._plan(count, m, n, itemsize, (strides, strides), _H100)
    assert 4 * plan.group * (m + n + plan.panels * n) <= 0.01 * count * m * n * itemsize
    assert plan.group == 1 or plan.group * m * n * itemsize <= _H100.cache_bytes / 2
    assert (plan.panels - 1) * plan.rows_per_panel < m <= plan.panels * plan.rows_per_panel
    programs = plan.group * plan.panels * (1 if plan.fused else -(-n // plan.column_tile[1]))
    assert programs >= _H100.processors / 3
    for tile in (plan.row_tile, plan.column_tile, plan.update_tile):
        assert all(k == 1 << (k.bit_length() - 1) for k in tile)
        assert tile[0] * tile[1] <= 16384


def test_memory_on_the_device(gpu: torch.device) -> None:
    W, G = torch.zeros(24, 768, 768, device=gpu), torch.randn(24, 768, 768, device=gpu)
    fast.update_(list(W), list(G), lr=0.1)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fast.update_(list(W), list(G), lr=0.1)
    assert torch.cuda.max_memory_allocated() - before <= 0.01 * G.numel() * 4 + 2**16


def test_a_captured_graph_follows_gradients_rate_and_seed(gpu: torch.device) -> None:
    W, G = torch.randn(6, 96, 160, device=gpu).bfloat16(), torch.randn(6, 96, 160, device=gpu)
    lr, seed = torch.tensor(0.1, device=gpu), torch.tensor(1, device=gpu)

    def step(weights: Tensor) -> Tensor:
        found = fast.update_(list(weights), list(G), lr=lr, weight_decay=0.1, seed=seed, trace=True)
        assert found is not None
        return found.residuals

    step(W)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(W)
    for k in range(3):
        G.normal_()
        lr.fill_(0.2 + k)
        seed.fill_(k)
        other = W.clone()
        graph.replay()
        residuals = step(other)
        assert torch.equal(W, other)
        assert captured is not None
        assert residuals is not None
        assert torch.equal(captured, residuals)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_an_unseen_list_is_not_captured(gpu: torch.device) -> None:
    W, G = torch.zeros(8, 8, device=gpu), torch.randn(8, 8, device=gpu)
    with pytest.raises(RuntimeError, match="once"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        fast.update_([W], [G], lr=0.1)
