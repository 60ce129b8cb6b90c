"""What the fields of bodies make of values."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from weft_frontend.http.chat import ChatBody


@pytest.mark.parametrize("name", ["messages", "tools", "stop", "bad_words", "guided_choice", "modalities"])
def test_of_a_long_list_of_wrong_items_the_first_is_told(name: str) -> None:
    """Telling all would hold the event loop for seconds."""
    with pytest.raises(ValidationError) as caught:
        ChatBody.model_validate({"messages": [], name: [1] * 1000})
    assert caught.value.error_count() == 1
