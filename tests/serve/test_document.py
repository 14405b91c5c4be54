"""The OpenAPI document against the service: whatever it allows is answered as it says, and nothing ends in a 500."""

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from schemathesis.checks import CHECKS

from tests.factories import Ruiji
from tests.properties import examples
from tests.serve.conftest import start, write_served_gallery

#: Endless by design.
STREAM = "/runs/events"
#: What no generated request succeeds with: there is neither a token nor a Redis, and bytes by chance are no picture.
REFUSED = {"POST /login": 409, "POST /retry": 409, "POST /decisions": 422, "POST /search": 422}


@pytest.mark.hypothesis
@pytest.mark.parametrize("model_there", [True, False])
def test_no_request_of_the_document_ends_in_a_500(ruiji: Ruiji, model_there: bool) -> None:
    write_served_gallery(ruiji)
    if not model_there:
        ruiji.model.unlink()
    served = start(ruiji)
    document = served.get("/openapi.json").json()
    document["paths"].pop(STREAM)
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=served.origin)
    known = {
        "object_id": served.get("/objects").json()["objects"][3]["object_id"],
        "rows_key": served.get("/map/points").headers["x-ruiji-rows"],
        "rows": "0,3",
    }
    statuses: dict[str, set[int]] = {}

    for operation in schema.get_all_operations():
        statuses[operation.ok().label] = set()

        @hypothesis.given(case=operation.ok().as_strategy(), meant=st.booleans())
        @hypothesis.settings(
            max_examples=examples(40),
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def ask(case: schemathesis.Case, meant: bool) -> None:
            headers = {"Origin": served.origin}
            if case.method == "POST" and case.media_type is None:
                headers["Content-Type"] = "application/json"
            if meant:
                # By chance no object, gallery or condition is one that is there.
                for given in (case.path_parameters, case.query):
                    given.update({name: value for name, value in known.items() if name in given})
                for name in ("gallery", "where"):
                    case.query.pop(name, None)
            answer = case.call(headers=headers)
            statuses[case.operation.label].add(answer.status_code)
            wanted = {"not_a_server_error", "status_code_conformance", "response_schema_conformance"}
            checks = [check for check in CHECKS.get_all() if check.__name__ in wanted]
            assert len(checks) == len(wanted)
            case.validate_response(answer, checks=checks)

        ask()
    for route, found in statuses.items():
        assert REFUSED.get(route, 2) in found | {status // 100 for status in found}, (route, found)
    assert {"GET /similar/{object_id}", "GET /thumbs/{object_id}", "POST /search", "GET /metrics"} <= statuses.keys()
    assert "Traceback" not in served.log.read_text()
