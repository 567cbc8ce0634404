"""Changes to a parsed chat template: its work is counted, its structure has marks."""

import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any

from llama.errors import need

STEP = 1000
"""The work of a step, in characters."""

# Filters whose arguments are searched for or compared with, not written.
_SEARCHING = ("replace", "trim", "select", "reject", "selectattr", "rejectattr")


def count_work(tree: Any) -> None:
    """Make the loops and joined texts of a parsed template count as work."""
    nodes: Any = need("jinja2.nodes")
    for loop in tree.find_all(nodes.For):
        size = sum(len(part.data) for part in loop.find_all(nodes.TemplateData))
        weight = nodes.Const(STEP + size)
        loop.iter = nodes.Filter(loop.iter, "counted", [weight], [], None, None, lineno=loop.lineno)
    for join in tree.find_all(nodes.Concat):
        parts = nodes.List(join.nodes, lineno=join.lineno)
        join.nodes = [nodes.Filter(parts, "join", [], [], None, None, lineno=join.lineno)]


def mark_structure(tree: Any, mark: Callable[[str], str]) -> None:
    """Mark control pieces in a template's own text; what it compares has none, by ``unmarked``."""
    nodes: Any = need("jinja2.nodes")

    def plain(node: Any) -> Any:
        return nodes.Filter(node, "unmarked", [], [], None, None, lineno=node.lineno)

    _keep_roles_together(tree, nodes)
    names = {id(pair.key) for pair in tree.find_all(nodes.Pair)}  # of dictionaries' entries
    names |= {id(item.arg) for item in tree.find_all(nodes.Getitem)}
    for data in tree.find_all(nodes.TemplateData):
        data.data = mark(data.data)
    for constant in tree.find_all(nodes.Const):
        if isinstance(constant.value, str) and id(constant) not in names:
            constant.value = mark(constant.value)
    for comparison in list(tree.find_all(nodes.Compare)):
        comparison.expr = plain(comparison.expr)
        for operand in comparison.ops:
            operand.expr = plain(operand.expr)
    for test in list(tree.find_all(nodes.Test)):
        if test.args:
            test.node = plain(test.node)
            test.args = [plain(argument) for argument in test.args]
    for search in list(tree.find_all(nodes.Filter)):
        if search.name in _SEARCHING:
            search.args = [plain(argument) for argument in search.args]


def _keep_roles_together(tree: Any, nodes: Any) -> None:
    """Have a role between two texts, as in ``'<|' + role + '|>'``, marked together with them."""

    def text_of(node: Any) -> Any:
        if isinstance(node, nodes.TemplateData):
            return node.data
        return node.value if isinstance(node, nodes.Const) else None

    def joined(parts: list[Any]) -> list[Any]:
        done: list[Any] = []
        for i, part in enumerate(parts):
            before, after = (text_of(node) for node in ([None, *done][-1], [*parts, None][i + 1]))
            if _is_named(part, ("role",)) and isinstance(before, str) and isinstance(after, str):
                around = [nodes.Const(before), nodes.Const(after)]
                done[-1] = nodes.Filter(part, "as_role", around, [], None, None, lineno=part.lineno)
                parts[i + 1] = nodes.Const("", lineno=part.lineno)
            else:
                done.append(part)
        return done

    for join in tree.find_all((nodes.Concat, nodes.Output)):
        join.nodes = joined(join.nodes)
    inner = {id(add.left) for add in tree.find_all(nodes.Add)}
    for add in [add for add in tree.find_all(nodes.Add) if id(add) not in inner]:
        parts, left = [add.right], add.left
        while isinstance(left, nodes.Add):
            parts, left = [left.right, *parts], left.left
        *first, add.right = joined([left, *parts])
        add.left = functools.reduce(functools.partial(nodes.Add, lineno=add.lineno), first)


def reads_parts(tree: Any) -> bool:
    """Return whether a template goes through the parts of a message's content."""
    nodes: Any = need("jinja2.nodes")
    names = {"content"} | {
        assignment.target.name
        for assignment in tree.find_all(nodes.Assign)
        if isinstance(assignment.target, nodes.Name) and _field(assignment.node) == "content"
    }

    return any(_is_named(loop.iter, names) for loop in tree.find_all(nodes.For))


def joins_arguments(tree: Any) -> bool:
    """Return whether a template writes a tool call's arguments as a text that they are already."""
    nodes: Any = need("jinja2.nodes")
    if any(_field(test.node) == "arguments" for test in tree.find_all((nodes.Test, nodes.Filter))):
        return False  # it asks what they are, or writes them as JSON
    return any(_field(part) == "arguments" for part in _written(tree, nodes))


def _written(tree: Any, nodes: Any) -> Iterator[Any]:
    for join in tree.find_all((nodes.Concat, nodes.Output)):
        yield from join.nodes
    for add in tree.find_all(nodes.Add):
        yield from (add.left, add.right)


def _is_named(node: Any, names: Collection[str]) -> bool:
    """Return whether an expression is a variable or a field of one of the names."""
    nodes: Any = need("jinja2.nodes")
    while isinstance(node, nodes.Filter):
        node = node.node
    return (node.name if isinstance(node, nodes.Name) else _field(node)) in names


def _field(node: Any) -> str | None:
    """Return the name of the field that an expression takes from an object."""
    nodes: Any = need("jinja2.nodes")
    if isinstance(node, nodes.Getattr):
        return str(node.attr)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        return str(node.arg.value)
    return None
