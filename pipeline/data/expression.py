"""`data.template`: a small Jinja expression that makes messages of a row of any other shape.

    [{"role": "user", "content": title ~ "\\n" ~ body}, {"role": "assistant", "content": labels | join(", ")}]

The row's keys are its variables, and `row` is all of them. It runs in Jinja's sandbox, and like every key of a row, one
that it does not name is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.data.findings import RowError
from pipeline.errors import UserError


class Expression:
    """An expression of data.template.

    Args:
        source: the expression, without braces.

    Raises:
        UserError: it is no Jinja expression.
    """

    def __init__(self, source: str) -> None:
        from jinja2 import StrictUndefined, TemplateSyntaxError, meta
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
        try:
            self._make = environment.compile_expression(source, undefined_to_none=False)
            self.names = meta.find_undeclared_variables(environment.parse(f"{{{{ {source} }}}}"))
        except TemplateSyntaxError as error:
            raise UserError(
                f"data.template: is no Jinja expression: {error.message}; it makes messages of a row's keys, e.g. "
                "[{'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer}]"
            ) from None

    def apply(self, fields: Mapping[str, Any], place: str) -> dict[str, Any]:
        """A row with the messages that the expression makes; keys that it does not name stay beside them.

        Raises:
            RowError: it fails on this row, or gives neither messages nor a row.
        """
        try:
            made = self._make(**{"row": dict(fields), **fields})
        except Exception as error:  # it is somebody's program: it may end in anything
            raise RowError("data.template fails", f"{place}: data.template: {error}") from None
        rest = {} if "row" in self.names else {key: fields[key] for key in fields if key not in self.names}
        if isinstance(made, list):
            return {"messages": made} | rest
        if isinstance(made, dict):
            return rest | made
        raise RowError(
            "data.template makes no messages",
            f"{place}: data.template gives {made!r:.80}: it must give a list of messages, or a row",
        )
