"""`.env` by one rule: what docker compose and python-dotenv read alike; the rest is refused."""

import re
from pathlib import Path

from pipeline.errors import UsageError

_NAME = r"[A-Za-z_][A-Za-z_0-9]*"
_REFERENCE = rf"\$\{{{_NAME}\}}"
#: Compose takes `$x`, `${x:-y}`, backslashes and comments after a tab or a quote in other ways than python-dotenv does.
_ALIKE = re.compile(
    rf"""\s* (?:export[ \t]+)? {_NAME} [ \t]* = [ \t]*
    (?: ' (?: (?!\$\{{) [^'\\] | \\[^\\] )* '
      | " (?: [^"\\$] | \\["\\nrt] | {_REFERENCE} )* "
      | (?! [ \t'"] | (?<=[ \t])\# ) (?: (?! [^\S ]\# ) [^\r\n$] | {_REFERENCE} )*?
    )
    (?: [ ]+ \#[^\r\n]* )? [ \t]* (?: \r?\n | \Z )""",
    re.VERBOSE,
)


def read_env_file(path: Path) -> dict[str, str]:
    """The `RUIJI_` variables of a file like `.env`; `${NAME}` in them is the environment's, else the file's.

    Raises:
        UsageError: it is not UTF-8, or docker compose would read one of them differently. OSError: it cannot be read.
    """
    from dotenv.main import resolve_variables
    from dotenv.parser import parse_stream

    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            bindings = list(parse_stream(stream))
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8: {error}") from None
    needed: set[str] = set()
    for binding in reversed(bindings):
        text = binding.original.string
        name = binding.key or ""
        ours = "RUIJI_" in text if binding.error else re.match(r"['\"]?RUIJI_", name)
        if not ours and name not in needed:
            continue
        bare = re.fullmatch(rf"\s*(?:export[ \t]+)?{_NAME}\s*(?:\#[^\r\n]*\s*)?", text)
        # No environment can hold a null character.
        if "\0" in text or not (bare or _ALIKE.fullmatch(text)):
            line = binding.original.line + re.match(r"\s*", text)[0].count("\n")  # type: ignore[index]
            raise UsageError(
                f"{path}, line {line}: ruiji and docker compose would read it differently; write NAME=value or "
                "NAME='value', and other variables as ${OTHER}"
            )
        needed.update(re.findall(rf"\$\{{({_NAME})\}}", text))
    values = resolve_variables(((b.key, b.value) for b in bindings if b.key is not None), override=False)
    return {name: value for name, value in values.items() if name.startswith("RUIJI_") and value is not None}
