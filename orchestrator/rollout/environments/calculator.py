"""Example of an environment: a calculator that the model may call before it answers a question.

    reset -> "12+34"     the model: "=12+34;"  step -> tool: "46"     the model: "46"  step -> done, reward 1

A turn of the form `=EXPRESSION;` is a call; any other turn is the answer. Recipe: `rollouts.environment:
orchestrator.rollout.environments.calculator:Calculator` with `toy:calculator`, or with your own rows that
have `prompt` and `answer`.
"""

import ast
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.core.errors import DataError
from orchestrator.rollout.environment import Messages, Turn

CALL = re.compile(r"\s*=([0-9+*() -]{1,64});\s*")
LARGEST = 10**12
"""Largest result; more is an error, so that no completion can keep the actor busy for long."""
OPERATIONS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}


class Calculator:
    """One question."""

    def __init__(self) -> None:
        self.answer = ""
        """The row's `answer`."""

    def reset(self, row: Mapping[str, Any]) -> Messages:
        """The row's prompt; DataError if the row has no answer."""
        if row.get("answer") is None:
            raise DataError(
                "a row of the calculator has no `answer`",
                why=f"it has {', '.join(row)}",
                fix="map it with data.columns.answer",
            )
        self.answer = str(row["answer"]).strip()
        prompt = row["prompt"]
        return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)

    def step(self, completion: str) -> Turn:
        """A call is answered with a `tool` message. Any other turn ends the episode, with reward 1 for the
        row's answer and else 0."""
        call = CALL.fullmatch(completion)
        if call is None:
            return Turn(done=True, reward=float(completion.strip() == self.answer))
        result = evaluate(call[1])
        return Turn([{"role": "tool", "content": "error" if result is None else str(result)}])


def evaluate(expression: str) -> int | None:
    """The value of whole numbers under +, - and *; None for anything else, or if it is too large.

    Example: evaluate("2*(3+4)") == 14, evaluate("2**9") is None.
    """
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, _NotArithmetic):
        return None


class _NotArithmetic(Exception):
    """The expression holds something else, or grows too large."""


def _value(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        value = node.value
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = -_value(node.operand)
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        value = OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    else:
        raise _NotArithmetic
    if abs(value) > LARGEST:
        raise _NotArithmetic
    return value
