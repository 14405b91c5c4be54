"""The OpenAPI document against the service: whatever it allows is answered as it says, and nothing ends in a 500."""

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis.checks import CHECKS

from tests.factories import Ruiji
from tests.serve.conftest import start, write_served_gallery

#: Endless by design.
STREAM = "/runs/events"


@pytest.mark.parametrize("model_there", [True, False])
def test_no_request_of_the_document_ends_in_a_500(ruiji: Ruiji, model_there: bool) -> None:
    write_served_gallery(ruiji)
    if not model_there:
        ruiji.model.unlink()
    served = start(ruiji)
    document = served.get("/openapi.json").json()
    assert {"/similar/{object_id}", "/search", "/objects", "/thumbs/{object_id}", "/metrics"} <= set(document["paths"])
    document["paths"].pop(STREAM)
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=served.origin)
    statuses = set()

    for operation in schema.get_all_operations():

        @hypothesis.given(case=operation.ok().as_strategy())
        @hypothesis.settings(
            max_examples=25,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def ask(case: schemathesis.Case) -> None:
            answer = case.call(headers={"Origin": served.origin})
            statuses.add(answer.status_code)
            wanted = {"not_a_server_error", "status_code_conformance", "response_schema_conformance"}
            checks = [check for check in CHECKS.get_all() if check.__name__ in wanted]
            assert len(checks) == len(wanted)
            case.validate_response(answer, checks=checks)

        ask()
    assert {200, 404, 422 if model_there else 409} <= statuses
    assert "Traceback" not in served.log.read_text()
