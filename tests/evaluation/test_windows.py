"""Windows: every token predicted once, with the context it was promised."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvik.errors import ParameterError
from kvik.evaluation.token_stream import Tokens
from kvik.evaluation.windows import Size, token_windows, window_size

BOS = -1


@given(
    data=st.data(), count=st.integers(0, 90), window=st.integers(2, 20), front=st.booleans(), part=st.integers(1, 30)
)
def test_every_token_is_predicted_once(data: st.DataObject, count: int, window: int, front: bool, part: int) -> None:
    stride = data.draw(st.integers(1, window - 1))
    sizes = [i % 4 for i in range(count)]
    parts = [Tokens(list(range(i, min(count, i + part))), sizes[i : i + part]) for i in range(0, count, part)]
    found = list(token_windows(parts, Size(window, stride), BOS if front else None))
    predicted = [token for w in found for token in w.ids[w.first :]]
    assert predicted == list(range(0 if front else 1, count))
    assert [n for w in found for n in w.sizes.tolist()] == sizes[0 if front else 1 :]
    for index, w in enumerate(found):
        assert 2 <= len(w.ids) <= window and 1 <= w.first < len(w.ids) == w.first + len(w.sizes)
        own = w.ids[1:] if front else w.ids
        assert (w.ids[0] == BOS) == front and own == list(range(own[0], own[0] + len(own)))
        assert own[0] == index * stride
        assert w.start == sum(sizes[: w.ids[w.first]])
        if index + 1 < len(found):
            assert len(w.ids) == window and (index == 0 or len(w.sizes) == stride)


def test_sizes() -> None:
    assert window_size(None, None, 8192) == (2048, 2047)
    assert window_size(None, 7, 512) == (512, 7)
    assert window_size(2, None, 512) == (2, 1)


@pytest.mark.parametrize("window", [0, 1, 513, True, 2.0])
def test_windows_out_of_range(window) -> None:
    with pytest.raises(ParameterError, match=r"window must be an integer in \[2, 512\], the model's context, got"):
        window_size(window, None, 512)


@pytest.mark.parametrize("stride", [0, -1, 64, False, 1.5])
def test_strides_out_of_range(stride) -> None:
    with pytest.raises(ParameterError, match=r"stride must be an integer in \[1, 63\], below the window, got"):
        window_size(64, stride, 512)
