"""Which columns of the rows the components of the reward read, as far as their sources say: for the list of
those that nothing reads."""

import ast

from orchestrator.recipe.schema import RewardFunction, Rewards
from orchestrator.rollout.rewards.lookup import GIVEN, parameters_of

ANSWER = "answer"


def columns_read(rewards: Rewards) -> frozenset[str] | None:
    """Names that the functions take, and `answer`, which samples are shown with; None where all columns go
    somewhere: to an endpoint, or to a function with **keywords or without a source."""
    names = {ANSWER}
    for function in rewards.functions:
        if function.model is not None:
            continue
        taken = _taken(function)
        if taken is None:
            return None
        names |= taken
    return frozenset(names)


def _taken(function: RewardFunction) -> set[str] | None:
    if function.url is not None:
        return None
    if ":" not in str(function.function):  # a checker
        return {ANSWER}
    arguments = parameters_of(function)
    if arguments is None or arguments.kwarg is not None:
        return None
    named: list[ast.arg] = [*arguments.args, *arguments.kwonlyargs]
    return {argument.arg for argument in named} - {*GIVEN, *function.options}
