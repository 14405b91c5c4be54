"""JSON answers, which may have names that are not UTF-8."""

from collections.abc import Mapping

from starlette.responses import Response

from pipeline.streams import to_json


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer in JSON; what UTF-8 cannot hold is written as escapes."""
    return Response(to_json(value).encode(), status, headers, "application/json")


def error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """What every refusal and failure looks like: what happened, and what to do."""
    return json_response({"error": message}, status, headers)
