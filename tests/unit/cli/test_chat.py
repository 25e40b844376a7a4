"""`chat` loads the right model, stops where a turn ends, and works in a terminal, a pipe and a script."""

import io
import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.cli.chat.conversation import Conversation, Settings
from orchestrator.cli.chat.models import find, load
from orchestrator.core.errors import ConfigError, MissingInput
from orchestrator.models.tiny import CHAT_TEMPLATE, build, byte_tokenizer
from orchestrator.recipe.loading import dump
from orchestrator.recipe.loading import load as load_recipe
from orchestrator.recipe.schema import TinyModel
from tests.running import REPOSITORY

CPU = torch.device("cpu")
TINY: Any = {"architecture": "llama", "hidden_size": 32, "layers": 2, "heads": 2}


def save(folder: Path, seed: int, template: str | None = CHAT_TEMPLATE, head: str = "lm") -> Path:
    """A model folder with weights drawn from the seed."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    options = {} if head == "lm" else {"num_labels": 1}
    model: Any = build(
        TinyModel(**TINY),
        seed,
        AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification,
        **options,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folders start/, another/, reward/ and plain/ (no template), and two run folders.

    run/ and pipe/dpo/ are runs of tiny/dpo with another's export.
    """
    root = tmp_path_factory.mktemp("models")
    save(root / "start", 0)
    save(root / "another", 1)
    save(root / "plain", 1, template=None)
    save(root / "reward", 0, head="scalar")
    for run in ("run", "pipe/dpo"):
        save(root / run / "export", 1)
        recipe = (
            load_recipe("tiny/dpo", [f"model.path={root / 'start'}", "model.tiny=null", "run.name=mine"])
            .stages[0]
            .recipe
        )
        (root / run / "recipe.yaml").write_text(dump(recipe))
        (root / run / "metrics.jsonl").write_text("")
    return root


def speak(folder: Path | str, **settings: Any) -> Conversation:
    return Conversation(
        load(find(str(folder)), CPU), Settings(**{"max_new_tokens": 12, **settings}), str(folder)
    )


def say(conversation: Conversation, text: str) -> str:
    return conversation.say(text, lambda words: None).text


def test_a_run_is_its_export_and_base_is_what_it_started_from(models: Path) -> None:
    run = find(str(models / "run"))
    assert (
        run.model.path == str(models / "run/export")
        and run.start is not None
        and run.start.model.path == str(models / "start")
    )
    assert find(str(models / "pipe")).name == str(models / "pipe/dpo"), "a pipeline is its last stage"
    assert (
        say(speak(models / "run"), "hello")
        == say(speak(models / "another"), "hello")
        != say(speak(models / "start"), "hello")
    )


def test_the_answer_is_what_transformers_generates(models: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models / "another")
    model: Any = AutoModelForCausalLM.from_pretrained(models / "another")
    turns = [{"role": "user", "content": "hello"}]
    given = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**given, max_new_tokens=12, do_sample=False)[0, given["input_ids"].shape[1] :]
    conversation, heard = speak(models / "another"), io.StringIO()
    answer = conversation.say("hello", lambda words: heard.write(words) and None)
    assert (
        answer.text == tokenizer.decode(written, skip_special_tokens=True) == heard.getvalue()
        and answer.tokens == 12
    )


def test_it_remembers_and_forgets(models: Path) -> None:
    conversation = speak(models / "another")
    first, second = say(conversation, "hello"), say(conversation, "hello")
    conversation.reset()
    assert say(conversation, "hello") == first != second


def test_a_system_message_reaches_the_template(models: Path) -> None:
    loaded = load(find(str(models / "another")), CPU)
    with_system = Conversation(loaded, Settings(max_new_tokens=12), "it", system="Be brief.")
    assert say(with_system, "hello") != say(Conversation(loaded, Settings(max_new_tokens=12), "it"), "hello")


def test_a_model_without_a_template_continues_any_text(models: Path) -> None:
    plain = speak(models / "plain")
    assert say(plain, "ab") == say(plain, "ab") != say(plain, ""), (
        "nothing is remembered, and nothing is a beginning too"
    )


def test_temperature_and_seed(models: Path) -> None:
    greedy, warm = (
        say(speak(models / "another"), "a"),
        [say(speak(models / "another", temperature=2.0, seed=s), "a") for s in (1, 1, 2)],
    )
    assert warm[0] == warm[1] != warm[2] and warm[0] != greedy
    before = torch.random.get_rng_state()
    say(speak(models / "another", temperature=1.0), "a")
    assert torch.equal(before, torch.random.get_rng_state()), "the process's generator is left alone"


def test_an_answer_stops_at_the_templates_end_of_turn_though_it_is_no_eos(tmp_path: Path) -> None:
    """ChatML on a tokenizer whose eos is another token, as base models have it."""
    template = CHAT_TEMPLATE.replace("eos_token", "'<|tool|>'")
    stops = speak(save(tmp_path / "stops", 0, template=template))
    assert byte_tokenizer().convert_tokens_to_ids("<|tool|>") in stops._ends
    assert byte_tokenizer().convert_tokens_to_ids("<|tool|>") not in speak(save(tmp_path / "goes", 0))._ends


def test_an_adapter_is_its_base_with_the_adapter(models: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(models / "start")
    adapted: Any = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    conversation = speak(tmp_path / "adapter")
    assert not isinstance(conversation.loaded.model, PeftModel), "merged: answers cost what the model costs"
    assert say(conversation, "hello") != say(speak(models / "start"), "hello")
    assert find(str(tmp_path / "adapter")).start is not None
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(tmp_path / "gone")})
    )
    with pytest.raises(MissingInput, match=r"adapts .*gone, which is not there"):
        find(str(tmp_path / "adapter"))


def test_what_cannot_be_chatted_with_is_an_error(models: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match=r"did you mean .*another"):
        find(str(models / "anothr"))
    with pytest.raises(MissingInput, match="neither a run nor a model"):
        find(str(tmp_path))
    with pytest.raises(MissingInput, match="is a file"):
        find(str(models / "run/recipe.yaml"))
    with pytest.raises(ConfigError, match="is a reward model"):
        load(find(str(models / "reward")), CPU)
    with pytest.raises(ConfigError, match=r"--system: .*no chat template"):
        Conversation(load(find(str(models / "plain")), CPU), Settings(), "plain", system="Be brief.")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text((models / "run/recipe.yaml").read_text())
    with pytest.raises(MissingInput, match="no export yet"):
        find(str(tmp_path / "run"))
    conversation = speak(models / "another")
    with pytest.raises(ConfigError, match="too long for the model"):
        say(conversation, "x" * 10_000)


def run(*words: str, given: str | None = None) -> tuple[str, str, int]:
    command = [sys.executable, "-m", "orchestrator", "chat", *words]
    done = subprocess.run(
        command, cwd=REPOSITORY, input=given or "", capture_output=True, text=True, timeout=120, check=False
    )
    return done.stdout, done.stderr, done.returncode


def test_scripts_get_the_answer_alone_or_json(models: Path) -> None:
    expected = say(speak(models / "run"), "hello")
    out, err, code = run(str(models / "run"), "--prompt", "hello", "--max-new-tokens", "12")
    assert (out, err, code) == (expected + "\n", "", 0), "nothing but the answer"
    out, _, _ = run(
        str(models / "run"), "--against", "base", "--json", "--max-new-tokens", "12", given="hello\n\nhello\n"
    )
    first, second = map(json.loads, out.splitlines())
    assert first == second, "each line is a conversation of its own"
    assert [answer["text"] for answer in first["answers"]] == [
        expected,
        say(speak(models / "start"), "hello"),
    ]
    assert first["answers"][0] == {
        "model": str(models / "run"),
        "text": expected,
        "tokens": 12,
        "ended": "max_new_tokens",
    }
    out, err, code = run(str(models / "plain"), "--prompt", "hello", "--max-new-tokens", "12")
    assert code == 0 and err.count("no chat template") == 1 and out


def test_a_terminal_has_a_conversation(models: Path) -> None:
    """Typed into a real terminal of 80 columns: two columns of answers, /reset, /exit."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm"}
    words = [
        sys.executable,
        "-m",
        "orchestrator",
        "chat",
        str(models / "run"),
        "--against",
        "base",
        "--max-new-tokens",
        "4",
    ]
    process = subprocess.Popen(
        words, cwd=REPOSITORY, stdin=follower, stdout=follower, stderr=follower, env=environment
    )
    os.close(follower)
    os.write(leader, b"hello\n/reset\n/help\n/exit\n")
    shown, deadline = b"", time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            shown += os.read(leader, 65536)
        except OSError:  # the other side is closed
            break
    assert process.wait(timeout=60) == 0
    text = shown.decode(errors="replace")
    assert (
        "before training" in text
        and "forgotten" in text
        and "Ctrl-C ends an answer" in text
        and "error" not in text
    ), text


@pytest.mark.slow
def test_a_real_instruct_model_answers_and_knows_where_to_stop() -> None:
    model = REPOSITORY / "build" / "SmolLM2-135M-Instruct"
    if not model.is_dir():
        pytest.skip("make real-model")
    out, err, code = run(
        str(model),
        "--prompt",
        "What is the capital of France?",
        "--prompt",
        "Say hello.",
        "--max-new-tokens",
        "64",
        "--json",
    )
    assert code == 0, err
    paris, hello = (json.loads(line)["answers"][0] for line in out.splitlines())
    assert "Paris" in paris["text"] and paris["ended"] == "finished" and "<|im_end|>" not in paris["text"]
    assert hello["text"] and hello["tokens"] <= 64
