"""PyTorch on the CPU: tensors through the store, a training step in tasks and in an actor, DataLoader workers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

import zray
from tests.helpers import private_bytes

torch = pytest.importorskip("torch", reason="PyTorch is not installed", exc_type=ImportError)

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.usefixtures("warm"), pytest.mark.slow]

WARM = {"num_cpus": 2, "preload": ["torch"]}
MB = 1 << 20


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two cores are shared by driver and workers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "uint8", "bool", "bfloat16", "complex64"])
def test_tensors_come_back_equal(dtype: str) -> None:
    tensor = (torch.arange(5000) % 3).to(getattr(torch, dtype)).reshape(50, 100)
    back = zray.get(zray.put(tensor))
    assert back.dtype == tensor.dtype
    assert torch.equal(back, tensor)
    assert torch.equal(zray.get(zray.remote(lambda t: t.T).remote(tensor)), tensor.T)


def test_numpy_arrays_become_tensors_in_place() -> None:
    ref = zray.put(torch.ones(16 * MB, dtype=torch.uint8).numpy())
    before = private_bytes(os.getpid())
    array = zray.get(ref, writable=True)
    tensor = torch.from_numpy(array)
    assert tensor.data_ptr() == array.ctypes.data
    tensor[0] = 5
    assert int(tensor[:2].sum()) == 6
    assert private_bytes(os.getpid()) - before < 8 * MB
    assert zray.get(ref)[0] == 1


def test_tensors_that_need_gradients_and_modules() -> None:
    weights = torch.randn(10, 10, requires_grad=True)
    back = zray.get(zray.put(weights))
    assert back.requires_grad
    assert torch.equal(back.detach(), weights.detach())
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    same = zray.get(zray.put(model))
    x = torch.randn(3, 4)
    assert torch.equal(same(x), model(x))


def test_gradients_computed_in_tasks_train_a_model() -> None:
    """Data-parallel gradient descent on a line: each task returns the gradient of its share."""
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 400).unsqueeze(1)
    y = 3 * x - 1
    shares = [zray.put((x[i::4], y[i::4])) for i in range(4)]

    @zray.remote
    def gradient(weights: Any, share: Any) -> Any:
        torch.set_num_threads(1)
        model = torch.nn.Linear(1, 1)
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), weights):
                parameter.copy_(value)
        loss = torch.nn.functional.mse_loss(model(share[0]), share[1])
        loss.backward()
        return [parameter.grad for parameter in model.parameters()], float(loss)

    weights = [torch.zeros(1, 1), torch.zeros(1)]
    losses = []
    for _ in range(60):
        ref = zray.put(weights)
        rows = zray.get([gradient.remote(ref, share) for share in shares])
        weights = [w - 0.5 * sum(row[0][i] for row in rows) / 4 for i, w in enumerate(weights)]
        losses.append(sum(row[1] for row in rows) / 4)
    assert losses[-1] < 1e-3 < losses[0]
    assert abs(float(weights[0]) - 3) < 0.1
    assert abs(float(weights[1]) + 1) < 0.1


def test_a_model_lives_in_an_actor() -> None:
    class Trainer:
        def __init__(self) -> None:
            torch.manual_seed(1)
            torch.set_num_threads(1)
            self.model = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
            self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.03)

        def step(self, x: Any, y: Any) -> float:
            self.optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(self.model(x), y)
            loss.backward()
            self.optimizer.step()
            return float(loss)

        def state(self) -> Any:
            return self.model.state_dict()

    trainer = zray.remote(Trainer).remote()
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    y = torch.tensor([[0.0], [1.0], [1.0], [0.0]])
    data = zray.put(x), zray.put(y)
    losses = zray.get([trainer.step.remote(*data) for _ in range(400)], timeout=90)
    assert losses[-1] < 0.02 < losses[0]
    model = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    model.load_state_dict(zray.get(trainer.state.remote()))
    assert torch.all((model(x) - y).abs() < 0.4)


@pytest.mark.parametrize("where", ["task", "actor"])
def test_a_data_loader_with_workers(where: str) -> None:
    def load(array: Any) -> tuple[float, int]:
        from torch.utils.data import DataLoader, TensorDataset

        torch.set_num_threads(1)
        data = TensorDataset(torch.from_numpy(array))
        loader = DataLoader(data, batch_size=100, num_workers=2)
        batches = [batch for (batch,) in loader]
        return float(sum(batch.sum() for batch in batches)), len(batches)

    class Loader:
        def load(self, array: Any) -> tuple[float, int]:
            return load(array)

    array = torch.arange(1000.0).numpy()
    if where == "task":
        result = zray.get(zray.remote(max_retries=0)(load).remote(array.copy()), timeout=90)
    else:
        result = zray.get(zray.remote(Loader).remote().load.remote(array.copy()), timeout=90)
    assert result == (499_500.0, 10)
