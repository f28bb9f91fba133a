"""Places are given back as they were."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.places import Places


@given(st.lists(st.text() | st.from_regex(r"[ab]\.jsonl:[0-9]{1,30}", fullmatch=True)))
def test_they_are_given_back_as_they_were(given: list[str]) -> None:
    places = Places()
    for place in given:
        places.append(place)
    assert [places[at] for at in range(len(places))] == given
