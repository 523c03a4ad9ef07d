"""CUDA graphs."""

from collections.abc import Callable, Sequence

import torch


def capture(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """Some calls as one CUDA graph: what replays it. Without a GPU, what calls them.

    The calls run once beforehand, on another stream, as torch asks: what they compile and allocate once must not happen
    while a graph is captured. A graph does not keep alive the tensors it was captured with; the calls do.
    """

    def call_all() -> None:
        for call in calls:
            call()

    if not torch.cuda.is_available():
        return call_all
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call_all()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call_all()
    return graph.replay
