"""Windows predict every token but the first exactly once, with as much before it as the stride promises."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.evaluation.windows import count, windows


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.data())
def test_each_token_is_predicted_once(length: int, seq_length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, seq_length))
    found = list(windows(np.arange(length), seq_length, stride))
    predicted = [int(token) for ids, scored in found for token in ids[len(ids) - scored :]]
    assert predicted == list(range(1, length)) and len(found) == count(length, seq_length, stride)
    for ids, scored in found:
        assert 1 <= len(ids) - 1 <= seq_length and list(ids) == list(range(ids[0], ids[0] + len(ids)))
        if ids[0]:
            assert len(ids) - scored > seq_length - stride  # tokens before the first that is predicted
