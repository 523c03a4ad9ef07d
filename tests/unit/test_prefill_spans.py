"""How prefills are taken apart: every row meets every key once, in the way that the formula says."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_selfextend.backends.interface import GroupSizes
from vllm_selfextend.backends.triton.prefill_spans import Kind, Layer, Prefill, find_prefills, take_apart
from vllm_selfextend.method.positions import group_sizes, largest_auto_window


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    length = draw(st.integers(5, 60))
    if draw(st.booleans()):
        window = draw(st.integers(1, largest_auto_window(length)))
        table = group_sizes(400, length, window, "auto", length)
    else:
        window = draw(st.integers(1, 60))
        table = group_sizes(400, length, window, draw(st.integers(1, 9)), draw(st.sampled_from([0, 1, 30])))
    sizes = GroupSizes.of(table) if draw(st.booleans()) else None
    numbers = st.integers(1, 90)
    return Layer(sizes, window, draw(st.sampled_from([0, 2, 40])), draw(numbers), draw(numbers))


@given(layers(), st.lists(st.tuples(st.integers(0, 90), st.integers(0, 200)), min_size=1, max_size=4))
def test_every_row_meets_every_key_once(layer: Layer, lengths: list[tuple[int, int]]) -> None:
    decode_len = 2
    starts = [0, *itertools.accumulate(rows for rows, _ in lengths)]
    seq_lens = [rows + context for rows, context in lengths]
    prefills = find_prefills(starts, seq_lens, decode_len)
    assert [one.request for one in prefills] == [n for n, (rows, _) in enumerate(lengths) if rows > decode_len]
    met = {one.request: torch.zeros(one.num_rows, seq_lens[one.request], dtype=torch.int) for one in prefills}
    last_token = -1
    for span in take_apart(prefills, layer):
        assert span.first_token > last_token
        last_token = span.first_token + span.num_rows - 1
        assert span.num_rows <= layer.num_rows
        assert sum(one.num_rows for one in span.prefills) == span.num_rows
        assert len(span.prefills) == 1 or max(one.num_rows for one in span.prefills) > 1
        owner = {}
        for one, seq_len in zip(span.prefills, span.seq_lens, strict=True):
            first_row = seq_lens[one.request] - lengths[one.request][0]
            for n in range(one.num_rows):
                i = one.first_position + n
                assert starts[one.request] + i - first_row == one.first_token + n
                eighths = 8 if layer.group_sizes is None else int(layer.group_sizes.eighths[i])
                assert (span.kind is Kind.GROUPED) == (eighths > 8)
                assert (span.kind is Kind.PLAIN) == (eighths == 8 and not 0 < layer.log_scale_len <= i)
                begin = max(0, i - layer.neighbor_window + 1) if span.kind is Kind.GROUPED else 0
                met[one.request][i - first_row, begin : i + 1] += 1
                owner[one.first_token - span.first_token + n] = (one.request, i, eighths)
            assert seq_len == one.first_position + one.num_rows
        lies: dict[str, tuple[int, int, int, int]] = {}
        for part in span.parts:
            if part.num_copied:
                lies["values"] = (part.request, part.first_key, part.num_copied, 0)
            if part.num_turned:
                lies["keys"] = (part.request, part.first_key, part.num_turned, part.eighths)
            assert max(part.num_copied, part.num_turned, part.num_keys) <= layer.num_keys
            for what, size in (("values", 0), ("keys", part.eighths)):
                request, first_key, count, eighths = lies[what]
                assert (request, first_key, eighths) == (part.request, part.first_key, size)
                assert count >= part.num_keys
            for n in range(part.num_rows):
                request, i, eighths = owner[part.row + n]
                assert (request, eighths) == (part.request, part.eighths)
                keys = part.num_keys - (part.num_rows - 1 - n if part.is_causal else 0)
                assert keys > 0
                row = i - (seq_lens[request] - lengths[request][0])
                met[request][row, part.first_key : part.first_key + keys] += 1
    for one in prefills:
        rows = torch.arange(one.num_rows)[:, None] + one.first_position
        assert met[one.request].equal((torch.arange(seq_lens[one.request]) <= rows).int())


def test_values_are_copied_once_and_keys_turned_once_a_group_size() -> None:
    sizes = GroupSizes.of(group_sizes(40_000, 8192, 1024, "auto", 8192))
    layer = Layer(sizes, 1024, 8192, 8192, 32_768)
    (span,) = take_apart([Prefill(0, 0, 20_000, 2048)], layer)
    assert sum(part.num_copied for part in span.parts) == 20_000 + 2048 - 1024
    assert len({part.eighths for part in span.parts}) == len(span.parts) == len([p for p in span.parts if p.num_turned])


def test_requests_within_the_trained_length_are_one_call() -> None:
    sizes = GroupSizes.of(group_sizes(40_000, 8192, 1024, "auto", 8192))
    spans = take_apart([Prefill(n, 100 * n, 50 * n, 100) for n in range(5)], Layer(sizes, 1024, 8192, 512, 64))
    assert [(span.kind, span.num_rows, len(span.prefills)) for span in spans] == [(Kind.PLAIN, 500, 5)]
