"""Columns of the rows that the components of the reward read, as far as their sources show.

The plan lists the columns that nothing reads.
"""

import ast

from orchestrator.recipe.schema import RewardFunction, Rewards
from orchestrator.rollout.rewards.lookup import GIVEN, parameters_of

ANSWER = "answer"


def columns_read(rewards: Rewards) -> frozenset[str] | None:
    """Columns that the functions take, and `answer`, which the report shows with each sample.

    None if all columns are passed on: to an endpoint, or to a function with **keywords or without a source.
    """
    names = {ANSWER}
    for function in rewards.functions:
        if function.model is not None:
            continue
        columns = _columns_of(function)
        if columns is None:
            return None
        names |= columns
    return frozenset(names)


def _columns_of(function: RewardFunction) -> set[str] | None:
    if function.url is not None:
        return None
    if ":" not in str(function.function):  # a checker
        return {ANSWER}
    arguments = parameters_of(function)
    if arguments is None or arguments.kwarg is not None:
        return None
    named: list[ast.arg] = [*arguments.args, *arguments.kwonlyargs]
    return {argument.arg for argument in named} - {*GIVEN, *function.options}
