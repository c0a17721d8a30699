"""Executes GraphQL without a schema: it selects what a query names from dictionaries.

A node is a dictionary with `__typename`. Each other value is one of a field, or a callable that
takes the arguments of the field, in snake case, and returns it. What a node does not have is an
error that names it, so that a client which asks for more than is known here fails at once.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from graphql import language
from graphql.error import GraphQLSyntaxError

__all__ = ["Node", "Query", "Refused", "Unknown"]

Node = dict[str, Any]

_INTERFACES = {
    "ArtifactSequence": "ArtifactCollection",
    "ArtifactPortfolio": "ArtifactCollection",
}
"""The one interface that fragments of the client name, by the types that have it."""


class Refused(Exception):
    """The server refuses to do what a query asks for.

    Args:
        message: what it says.
        status: the HTTP status that it says it with.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class Unknown(Refused):
    """A query asks for something that the stand-in does not know."""


class Query:
    """One GraphQL request, parsed.

    Args:
        body: what the client posted.

    Raises:
        Unknown: it is not one operation with its fragments.
    """

    def __init__(self, body: Mapping[str, Any]) -> None:
        try:
            document = language.parse(body["query"])
        except (GraphQLSyntaxError, KeyError, TypeError) as error:
            raise Unknown(f"not a GraphQL request: {error}") from error
        operations = []
        self._fragments = {}
        for definition in document.definitions:
            if isinstance(definition, language.OperationDefinitionNode):
                operations.append(definition)
            elif isinstance(definition, language.FragmentDefinitionNode):
                self._fragments[definition.name.value] = definition
        if len(operations) != 1:
            raise Unknown(f"{len(operations)} operations in a GraphQL request")
        self._operation = operations[0]
        self._variables = self._defaults() | dict(body.get("variables") or {})

    @property
    def name(self) -> str:
        """Name of the operation, such as `CreateArtifact`."""
        return self._operation.name.value if self._operation.name else "unnamed"

    def execute(self, queries: Node, mutations: Node) -> Node:
        """Return the data of the answer.

        Raises:
            Refused: the server does not do it.
            Unknown: it asks for what the roots do not have.
        """
        mutates = self._operation.operation is language.OperationType.MUTATION
        root = mutations if mutates else queries
        return self._select(root, self._operation.selection_set)

    def _defaults(self) -> dict[str, Any]:
        return {
            definition.variable.name.value: self._value(definition.default_value)
            for definition in self._operation.variable_definitions or ()
            if definition.default_value is not None
        }

    def _select(self, node: Node, selections: language.SelectionSetNode) -> Node:
        result: Node = {}
        for selection in selections.selections:
            if not self._is_included(selection):
                continue
            if isinstance(selection, language.FieldNode):
                key = selection.alias.value if selection.alias else selection.name.value
                value = self._field(node, selection)
                # Two fragments may select parts of the same field.
                both = isinstance(value, dict) and isinstance(result.get(key), dict)
                result[key] = result[key] | value if both else value
            else:
                result |= self._fragment(node, selection)
        return result

    def _fragment(self, node: Node, selection: language.SelectionNode) -> Node:
        if isinstance(selection, language.FragmentSpreadNode):
            if selection.name.value not in self._fragments:
                raise Unknown(f"no fragment {selection.name.value!r}")
            fragment = self._fragments[selection.name.value]
            condition, parts = fragment.type_condition, fragment.selection_set
        else:
            assert isinstance(selection, language.InlineFragmentNode)  # noqa: S101 - the third kind
            condition, parts = selection.type_condition, selection.selection_set
        kind = node["__typename"]
        if condition and condition.name.value not in (kind, _INTERFACES.get(kind)):
            return {}
        return self._select(node, parts)

    def _field(self, node: Node, field: language.FieldNode) -> Any:
        name, kind = field.name.value, node["__typename"]
        if name not in node:
            raise Unknown(f'Cannot query field "{name}" on type "{kind}"')
        value = node[name]
        arguments = {a.name.value: self._value(a.value) for a in field.arguments or ()}
        if callable(value):
            value = _call(value, f"{kind}.{name}", arguments)
        elif arguments:
            raise Unknown(f'"{kind}.{name}" takes no arguments, but got {", ".join(arguments)}')
        if field.selection_set is None:
            return value
        if isinstance(value, list):
            return [self._select(item, field.selection_set) for item in value]
        return value if value is None else self._select(value, field.selection_set)

    def _is_included(self, selection: language.SelectionNode) -> bool:
        for directive in selection.directives or ():
            condition = self._value(directive.arguments[0].value)
            match directive.name.value:
                case "include" if not condition:
                    return False
                case "skip" if condition:
                    return False
                case "include" | "skip":
                    pass
                case other:
                    raise Unknown(f"directive @{other}")
        return True

    def _value(self, node: language.ValueNode) -> Any:
        match node:
            case language.VariableNode():
                return self._variables.get(node.name.value)
            case language.IntValueNode() | language.FloatValueNode():
                return json.loads(node.value)
            case language.ListValueNode():
                return [self._value(item) for item in node.values]
            case language.ObjectValueNode():
                return {f.name.value: self._value(f.value) for f in node.fields}
            case (
                language.StringValueNode() | language.BooleanValueNode() | language.EnumValueNode()
            ):
                return node.value
        return None  # the literal `null`


def _call(function: Callable[..., Any], name: str, arguments: Mapping[str, Any]) -> Any:
    """Call what makes a field; a mutation gets the fields of its `input` as arguments."""
    if set(arguments) == {"input"}:
        # The client writes null for what it does not set.
        arguments = {k: v for k, v in arguments["input"].items() if v is not None}
    given = _snake(arguments)
    try:
        inspect.signature(function).bind(**given)
    except TypeError as error:
        raise Unknown(f'arguments of "{name}": {error}') from error
    return function(**given)


def _snake(value: Any) -> Any:
    """Return a value with all keys in snake case: `artifactID` as `artifact_id`."""
    if isinstance(value, list):
        return [_snake(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    return {_snake_name(k): _snake(v) for k, v in value.items()}


def _snake_name(name: str) -> str:
    words = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", name)
    return re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", words).lower()
