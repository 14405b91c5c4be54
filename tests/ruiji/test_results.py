"""Tables of results: right with the libraries, and an error that names the library without it."""

import sys

import pytest

import ruiji

HITS = (ruiji.Hit(3, "a.jpg", "x/a.jpg", 1.0, 0.0), ruiji.Hit(1, "b.jpg", None, 0.1 + 0.2, 1.25))
FOUND = ruiji.SearchResults(
    (
        ruiji.QueryResult("q.jpg", HITS),
        ruiji.QueryResult("broken.jpg", (), "it is broken"),
        ruiji.QueryResult("r", HITS[:1]),
    )
)
GROUPS = ruiji.NearDuplicates(
    (ruiji.Group(1, (ruiji.Member(0, "a", "x/a", 1.0), ruiji.Member(4, "b", "x/b", 0.99, identical_to="a")), 1),)
)
HIT_ROWS = [
    {"query": "q.jpg", "rank": 1, "object_id": "a.jpg", "path": "x/a.jpg", "similarity": 1.0, "distance": 0.0},
    {"query": "q.jpg", "rank": 2, "object_id": "b.jpg", "path": None, "similarity": 0.1 + 0.2, "distance": 1.25},
    {"query": "r", "rank": 1, "object_id": "a.jpg", "path": "x/a.jpg", "similarity": 1.0, "distance": 0.0},
]
_OWN = {"turned": None, "reference": False}
GROUP_ROWS = [
    {"group": 1, "object_id": "a", "path": "x/a", "similarity": 1.0, "identical_to": None, **_OWN},
    {"group": 1, "object_id": "b", "path": "x/b", "similarity": 0.99, "identical_to": "a", **_OWN},
]


@pytest.mark.parametrize(("result", "rows"), [(FOUND, HIT_ROWS), (GROUPS, GROUP_ROWS)])
def test_tables_have_a_row_for_each_hit_with_every_digit(
    result: ruiji.SearchResults | ruiji.NearDuplicates, rows: list[dict[str, object]]
) -> None:
    frame = result.to_pandas()
    assert frame.astype(object).where(frame.notna(), None).to_dict("records") == rows
    assert result.to_arrow().to_pylist() == rows
    empty = type(result)(())
    assert list(empty.to_pandas().columns) == list(rows[0])
    assert (empty.to_arrow().column_names, empty.to_arrow().num_rows) == (list(rows[0]), 0)
    assert (empty.to_pandas().dtypes == frame.dtypes)[["similarity"]].all()


def test_a_name_that_is_not_utf_8_is_refused_by_arrow() -> None:
    odd = ruiji.SearchResults((ruiji.QueryResult("q", (ruiji.Hit(0, "caf\udce9", None, 1.0, 0.0),)),))
    with pytest.raises(ruiji.RuijiError, match="Arrow cannot hold the name"):
        odd.to_arrow()


@pytest.mark.parametrize(("method", "library"), [("to_pandas", "pandas"), ("to_arrow", "pyarrow")])
def test_without_the_library_the_error_says_what_to_install(
    method: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    for result in (FOUND, GROUPS):
        with pytest.raises(ruiji.RuijiError, match=f"{library}, which cannot be imported .*: pip install {library}"):
            getattr(result, method)()


def test_results_are_sequences_of_their_parts() -> None:
    assert (len(FOUND), [one.query for one in FOUND]) == (3, ["q.jpg", "broken.jpg", "r"])
    assert (len(GROUPS), [len(group.members) for group in GROUPS]) == (1, [2])
    assert ruiji.SearchResults(FOUND.queries[:1]).hits == HITS
