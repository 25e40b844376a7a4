"""Episodes: the model's own tokens stay unchanged, only they are in the loss, and their log-probs are those
of one forward."""

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from orchestrator.core.batches import Finish
from orchestrator.core.errors import ConfigError, DataError, RewardsFailed
from orchestrator.core.rollouts import Completion, Prompt, Rollout, RolloutGroup, Sampling
from orchestrator.models.tiny import CHAT_TEMPLATE, byte_tokenizer
from orchestrator.rollout.engines.engine import Request
from orchestrator.rollout.engines.padded_decoder import StaticDecoder
from orchestrator.rollout.engines.paged_decoder import ContinuousDecoder
from orchestrator.rollout.engines.sampling import sample_seed
from orchestrator.rollout.environment import Messages, Turn, load_environment
from orchestrator.rollout.environments.calculator import Calculator
from orchestrator.rollout.episodes import EpisodeRunner
from orchestrator.rollout.rewards.combine import sum_components
from tests.unit.rollout.decoding_cases import CASES, EOS, SAMPLING, forward_logprobs, letters
from tests.unit.rollout.reward_cases import rewards

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id
LLAMA = CASES[0].model()
DECODER = StaticDecoder(LLAMA, (*EOS, END), 6, letters)


def tokens(text: str) -> np.ndarray:
    return np.array(TOKENIZER(text=text)["input_ids"], np.int64)


def prompt(number: int = 0, text: Any = None, **columns: Any) -> Prompt:
    text = [{"role": "user", "content": f"{number}+1"}] if text is None else text
    ids = (
        tokens(text) if isinstance(text, str) else np.array([], np.int64)
    )  # an environment gives its own prompt
    return Prompt(number, f"row {number}", 0, ids, text, {"answer": str(number + 1), **columns})


@dataclass
class Scripted:
    """A decoder that gives the turns of `script` and records its requests. A str gets an eos at its end."""

    script: Sequence[str | np.ndarray]
    asked: list[list[Request]] = field(default_factory=list)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[tuple[Completion, ...]]:
        turn = self.script[len(self.asked)]
        self.asked.append(list(requests))
        ids = tokens(turn + "<eos>") if isinstance(turn, str) else turn
        drawn = [ids[: r.tokens_left] for r in requests]
        finishes: list[Finish] = ["length" if len(ids) > r.tokens_left else "stop" for r in requests]
        completions = [
            Completion(i, np.full(len(i), -float(len(self.asked)), np.float32), f)
            for i, f in zip(drawn, finishes, strict=True)
        ]
        return [(c,) * len(r.seeds) for r, c in zip(requests, completions, strict=True)]


class Chatter:
    """Says something after every turn, pays half a point for each, and ends after three."""

    turns = 3

    def reset(self, row: Mapping[str, Any]) -> Messages:
        self.count = 0
        return [{"role": "system", "content": "talk"}, *row["prompt"]]

    def step(self, completion: str) -> Turn:
        self.count += 1
        return Turn(
            [{"role": "tool", "content": f"heard {self.count}"}], done=self.count == self.turns, reward=0.5
        )


def play(
    script: Sequence[str | np.ndarray], environment: Any = Calculator, *, limit: int = 100, turns: int = 8
) -> tuple[Rollout, Scripted]:
    """The only rollout of one prompt."""
    decoder = Scripted(script)
    (group,) = EpisodeRunner(decoder, TOKENIZER, environment, turns).run(
        [(0, prompt(12))], Sampling(1, limit), 5
    )
    return group.rollouts[0], decoder


def spans(rollout: Rollout) -> list[tuple[bool, str]]:
    """(scored, text) of the runs of a rollout's tokens."""
    edges = [0, *(np.flatnonzero(np.diff(rollout.loss_mask)) + 1).tolist(), len(rollout.ids)]
    return [
        (bool(rollout.loss_mask[a]), TOKENIZER.decode(rollout.ids[a:b])) for a, b in itertools.pairwise(edges)
    ]


def test_an_episode_by_hand():
    rollout, decoder = play(["=12+1;", "13"])
    assert spans(rollout) == [(True, "=12+1;<eos>"), (False, "<|tool|>13<|assistant|>"), (True, "13<eos>")]
    assert rollout.completion == [
        {"role": "assistant", "content": "=12+1;"},
        {"role": "tool", "content": "13"},
        {"role": "assistant", "content": "13"},
    ]
    assert (rollout.finish, rollout.turns, rollout.environment_reward, rollout.version) == ("stop", 2, 1.0, 5)
    assert rollout.logprobs.tolist() == [-1.0] * 7 + [-2.0] * 3
    first, second = (asked[0] for asked in decoder.asked)
    assert TOKENIZER.decode(first.prompt) == "<|user|>12+1<|assistant|>"
    assert np.array_equal(second.prompt, np.concatenate([first.prompt, rollout.ids[:-3]]))
    assert (first.position, second.position) == (0, 7) and first.seeds == second.seeds
    assert (first.tokens_left, second.tokens_left) == (100, 100 - len(rollout.ids) + 3)


def test_the_tokens_are_those_of_the_template_over_the_whole_conversation():
    rollout, decoder = play(["a", "bc", "d"], Chatter)
    messages = [
        {"role": "system", "content": "talk"},
        {"role": "user", "content": "12+1"},
        *rollout.completion[:-1],
    ]
    whole = TOKENIZER.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert whole == np.concatenate([decoder.asked[0][0].prompt, rollout.ids]).tolist()


def test_what_the_model_wrote_is_never_tokenized_again():
    """0xFF is no text: it decodes to a replacement character, which is three other bytes."""
    odd = tokens("ÿ")[:1]
    assert tokens(TOKENIZER.decode(odd)).tolist() != odd.tolist()
    rollout, decoder = play([np.array([*odd, END]), "x", "y"], Chatter)
    assert rollout.ids[:2].tolist() == [*odd, END]
    assert decoder.asked[1][0].prompt[len(decoder.asked[0][0].prompt) :][:2].tolist() == [*odd, END]


def test_a_turn_without_eos_gets_the_templates_unscored():
    """A stop text ended it."""
    rollout, _ = play([tokens("=12+1;"), "13"])
    assert spans(rollout) == [(True, "=12+1;"), (False, "<eos><|tool|>13<|assistant|>"), (True, "13<eos>")]


def test_another_end_token_than_eos_is_not_doubled():
    """As Llama 3's <|eot_id|>."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE.replace("eos_token", "'<|eot|>'")
    ids = np.array(tokenizer("=12+1;<|eot|>")["input_ids"])
    (group,) = EpisodeRunner(Scripted([ids, "13"]), tokenizer, Calculator, 4).run(
        [(0, prompt(12))], Sampling(1, 100), 0
    )
    assert tokenizer.decode(group.rollouts[0].ids) == "=12+1;<|eot|><|tool|>13<|assistant|>13<eos>"


def test_rewards_add_up_until_the_environment_is_done():
    rollout, _ = play(["a"] * 9, Chatter)
    assert (rollout.turns, rollout.environment_reward, rollout.finish) == (3, 1.5, "stop")
    assert rollout.completion[-1] == {"role": "tool", "content": "heard 3"}
    assert spans(rollout)[-1] == (True, "a<eos>")  # the last message gets no tokens


def test_an_episode_ends_after_max_turns():
    rollout, decoder = play(["a"] * 9, Chatter, turns=2)
    assert (rollout.turns, rollout.environment_reward, rollout.finish, len(decoder.asked)) == (
        2,
        1.0,
        "length",
        2,
    )
    assert spans(rollout)[-1] == (True, "a<eos>")


SUFFIX = len(tokens("<|tool|>heard 1<|assistant|>"))


@pytest.mark.parametrize(
    ("limit", "turns", "length"),
    [(1, 1, 1), (2, 1, 2), (2 + SUFFIX, 1, 2), (3 + SUFFIX, 2, 3 + SUFFIX), (200, 3, 6 + 2 * SUFFIX)],
)
def test_the_limit_of_tokens_is_that_of_the_whole_episode(limit, turns, length):
    """Two tokens a turn. The environment's tokens count, and are left out if no model token could follow."""
    rollout, _ = play(["a"] * 9, Chatter, limit=limit)
    assert (rollout.turns, len(rollout.ids)) == (turns, length)
    assert rollout.finish == ("stop" if limit == 200 else "length")
    assert rollout.loss_mask[-1]


class Moody(Chatter):
    """Begins differently every time."""

    made = 0

    def reset(self, row: Mapping[str, Any]) -> Messages:
        Moody.made += 1
        return [{"role": "user", "content": f"question {Moody.made}"}]


def test_an_environment_that_begins_differently_is_refused():
    with pytest.raises(DataError, match="row 3"):
        EpisodeRunner(Scripted(["a"] * 9), TOKENIZER, Moody, 4).run([(0, prompt(3))], Sampling(2, 50), 0)


class Scribbler(Chatter):
    """Changes the list that it returned, and the row."""

    def reset(self, row: Mapping[str, Any]) -> Messages:
        self.count = 0
        row["columns"].append("seen")
        self.messages = row["prompt"]
        return self.messages

    def step(self, completion: str) -> Turn:
        self.messages.append({"role": "assistant", "content": completion})
        return super().step(completion)


def test_an_environment_may_change_its_row_and_its_messages():
    row = prompt(3, columns=[])
    before = copy.deepcopy(row.text)
    (group,) = EpisodeRunner(Scripted(["a"] * 9), TOKENIZER, Scribbler, 4).run([(0, row)], Sampling(2, 90), 0)
    assert (row.text, row.columns["columns"]) == (before, [])
    assert group.prompt.text == before
    assert [m["role"] for m in group.rollouts[0].completion] == ["assistant", "tool"] * 3


def test_a_template_that_changes_the_answer_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "message['content'] + eos_token", "message['content'] | upper"
    )
    with pytest.raises(ConfigError, match="changes the assistant's text"):
        EpisodeRunner(Scripted(["a"] * 9), tokenizer, Chatter, 4).run([(0, prompt())], Sampling(1, 50), 0)


def test_an_environment_needs_a_chat_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        EpisodeRunner(Scripted(["a"]), tokenizer, Chatter, 4).run([(0, prompt())], Sampling(1, 50), 0)


WORK = [(7, prompt(1)), (8, prompt(22)), (9, prompt(333))]
ROOMY = Sampling(3, 110, seed=4)


def equal(one: RolloutGroup, other: RolloutGroup) -> bool:
    def same(a: Rollout, b: Rollout) -> bool:
        return (
            a.ids.tolist() == b.ids.tolist()
            and a.loss_mask.tolist() == b.loss_mask.tolist()
            and np.allclose(a.logprobs, b.logprobs, atol=1e-5)
        )

    return all(same(a, b) and a.finish == b.finish for a, b in zip(one.rollouts, other.rollouts, strict=True))


@pytest.mark.parametrize(
    "decoder", [DECODER, ContinuousDecoder(LLAMA, (*EOS, END), 6, letters)], ids=["static", "continuous"]
)
def test_log_probs_of_an_episode_are_those_of_one_forward_over_it(decoder):
    groups = EpisodeRunner(decoder, TOKENIZER, Chatter, 8).run(WORK, ROOMY, 0)
    for group in groups:
        for r in group.rollouts:
            whole = forward_logprobs(LLAMA, group.prompt.ids, Completion(r.ids, r.logprobs, r.finish))
            assert len(r.ids) == len(r.loss_mask) and len(r.logprobs) == r.loss_mask.sum()
            assert np.abs(whole[r.loss_mask] - r.logprobs).max() < 1e-4
            assert len(r.ids) <= ROOMY.max_new_tokens
    assert max(r.turns for g in groups for r in g.rollouts) == 3
    assert len({tuple(r.ids.tolist()) for g in groups for r in g.rollouts}) == 9


def test_an_episode_does_not_depend_on_the_others():
    groups = EpisodeRunner(DECODER, TOKENIZER, Chatter, 8).run(WORK, ROOMY, 0)
    for at in (0, 2):
        (alone,) = EpisodeRunner(StaticDecoder(LLAMA, (*EOS, END), 2, letters), TOKENIZER, Chatter, 8).run(
            [WORK[at]], ROOMY, 0
        )
        assert equal(alone, groups[at])
    (later,) = EpisodeRunner(DECODER, TOKENIZER, Chatter, 8).run([WORK[0]], ROOMY, 1)
    assert not equal(later, groups[0])  # another version samples with other seeds


def test_without_an_environment_a_rollout_is_one_completion():
    (text, chat) = EpisodeRunner(DECODER, TOKENIZER, None, 8).run(
        [(0, prompt(1, "ab>")), (1, prompt(2, "cd>"))], SAMPLING, 3
    )
    seeds = tuple(sample_seed(0, 1, 0, k, 3) for k in range(4))
    (expected,) = DECODER.generate([Request(tokens("ab>"), seeds, 40)], SAMPLING)
    for k, (rollout, completion) in enumerate(zip(text.rollouts, expected, strict=True)):
        assert np.array_equal(rollout.ids, completion.ids) and rollout.loss_mask.all()
        assert (rollout.sample, rollout.version, rollout.turns, rollout.environment_reward) == (k, 3, 1, None)
        assert rollout.completion == TOKENIZER.decode(completion.ids, skip_special_tokens=True)
    assert (text.draw, chat.draw) == (0, 1)


def test_a_completion_of_messages_is_a_message():
    asked = Prompt(0, "row", 0, tokens("<|user|>hi<|assistant|>"), [{"role": "user", "content": "hi"}])
    (group,) = EpisodeRunner(Scripted(["hello"]), TOKENIZER, None, 1).run([(0, asked)], Sampling(1, 20), 0)
    assert group.rollouts[0].completion == [{"role": "assistant", "content": "hello"}]


class Flaky(Calculator):
    """Fails in the first `left` calls of the verb `where`, as a tool behind a network does."""

    left, where = 0, "step"

    def reset(self, row: Mapping[str, Any]) -> Messages:
        self.fail("reset")
        return super().reset(row)

    def step(self, completion: str) -> Turn:
        self.fail("step")
        return super().step(completion)

    def fail(self, verb: str) -> None:
        if verb == self.where and Flaky.left > 0:
            Flaky.left -= 1
            raise ConnectionError("tool server: connection reset by peer")


@pytest.mark.parametrize("where", ["reset", "step"])
def test_an_episode_whose_environment_failed_is_played_again_from_the_same_seed(monkeypatch, where):
    monkeypatch.setattr(Flaky, "where", where)
    expected = EpisodeRunner(DECODER, TOKENIZER, Calculator, 3).run(WORK[:2], ROOMY, 0)
    monkeypatch.setattr(Flaky, "left", 2)
    groups = EpisodeRunner(DECODER, TOKENIZER, Flaky, 3, retries=2).run(WORK[:2], ROOMY, 0)
    assert Flaky.left == 0
    for first, second in zip(expected, groups, strict=True):
        assert equal(first, second)


def turn_of(**fields: Any) -> Turn:
    """A turn with fields of any type, as user code may return one."""
    return Turn(**fields)


class Broken(Calculator):
    """Its step raises or returns `gives`, for one prompt only."""

    gives: Any = None

    def reset(self, row: Mapping[str, Any]) -> Messages:
        self.broken = row["answer"] == "2"
        return super().reset(row)

    def step(self, completion: str) -> Turn:
        if not self.broken:
            return Turn(done=True, reward=1.0)
        if isinstance(self.gives, BaseException):
            raise self.gives
        return self.gives


@pytest.mark.parametrize(
    ("gives", "reason"),
    [
        (ValueError("a bug"), "ValueError at test_episodes.py:"),
        (SystemExit(3), "SystemExit at test_episodes.py:"),
        (turn_of(done=True, reward=None), "step gave the reward None, not a number"),
        (turn_of(done=True, reward=float("nan")), "step gave the reward nan"),
        (turn_of(done=True, reward="high"), "could not convert string to float"),
        (turn_of(messages="hello"), "not a list of {role, content}"),
        (None, "step returned a NoneType, not a Turn"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_a_bug_in_an_environment_costs_its_group_and_is_named_with_its_line(monkeypatch, gives, reason):
    monkeypatch.setattr(Broken, "gives", gives)
    work = [(0, prompt(1)), (1, prompt(2)), (2, prompt(3))]
    groups = EpisodeRunner(Scripted(["7", "7"]), TOKENIZER, Broken, 3, retries=1).run(
        work, Sampling(2, 20), 0
    )
    assert [[r.failure is None for r in g.rollouts] for g in groups] == [[False] * 2, [True] * 2, [True] * 2]
    scoring = sum_components(groups, rewards(max_dropped_fraction=0.5), {})
    assert [g.group.prompt.id for g in scoring.groups] == [2, 3]
    (dropped,) = scoring.dropped
    assert dropped.startswith("row 1: the environment failed on sample 0: ") and reason in dropped
    with pytest.raises(RewardsFailed, match="1 of 3 groups of a rollout batch have no reward") as caught:
        sum_components(groups, rewards(), {})
    assert reason in caught.value.why and caught.value.exit_code == 70


def test_an_environment_that_never_begins_an_episode_costs_only_its_group():
    class Shut(Calculator):
        def reset(self, row):
            if row["answer"] == "2":
                raise TimeoutError("no browser")
            return super().reset(row)

    shut, other = EpisodeRunner(Scripted(["2"]), TOKENIZER, Shut, 1).run(
        [(0, prompt(1)), (1, prompt(2))], Sampling(2, 20), 0
    )
    assert [len(r.ids) for r in shut.rollouts] == [0, 0] and all(
        "TimeoutError" in str(r.failure) for r in shut.rollouts
    )
    assert other.rollouts[0].failure is None and len(other.rollouts[0].ids) == 2


def test_an_environment_from_a_file(tmp_path):
    (tmp_path / "world.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom "
        "orchestrator.rollout.episodes import Turn\n\n"
        "@dataclass\nclass World:\n    n: int = 0\n    def reset(self, row): return []\n    def step(self, "
        "text): return Turn(done=True)\n"
    )
    assert load_environment(f"{tmp_path}/world.py:World")().step("") == Turn(done=True)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("Calculator", "'Calculator'"),
        ("no_such_module:World", "No module named"),
        ("no_such_file.py:World", "no file no_such_file.py"),
        ("orchestrator.rollout.environments.calculator:evaluate", "no class evaluate with reset and step"),
    ],
)
def test_an_environment_that_does_not_exist_is_an_error(spec, reason):
    with pytest.raises(ConfigError, match=reason):
        load_environment(spec)
