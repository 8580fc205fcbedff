"""Which of torch's operators run."""

from collections.abc import Callable

from torch.utils._python_dispatch import TorchDispatchMode


class _Record(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


def dispatched(run: Callable[[], object]) -> list[str]:
    """Names such as "aten.add" in the order of their calls. What an opaque operator calls is not among them."""
    with _Record() as record:
        run()
    return record.names
