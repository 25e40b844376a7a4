"""Schema of what is trained and on which rows: `model` and `data`."""

from typing import Literal

from pydantic import Field, model_validator

from orchestrator.recipe.section import Section


class TinyModel(Section):
    """Model with random weights and a byte-level tokenizer, of a named architecture. Nothing is
    downloaded."""

    architecture: str = Field(
        "llama", description="Model type of transformers: llama, qwen2, gpt2, gemma, mistral, phi …"
    )
    hidden_size: int = Field(64, ge=8, description="Width of the residual stream.")
    layers: int = Field(2, ge=1, description="Number of transformer blocks.")
    heads: int = Field(4, ge=1, description="Number of attention heads.")
    kv_heads: int | None = Field(
        None, ge=1, description="Number of key and value heads; default: as many as heads."
    )
    intermediate_size: int | None = Field(
        None, ge=8, description="Width of the feed-forward layer; default: the architecture's."
    )
    max_positions: int = Field(1024, ge=8, description="Tokens of the longest sequence.")
    vocab_size: int | None = Field(
        None,
        ge=300,
        description="Rows of the embedding; default: the byte tokenizer's size, a larger one is padding.",
    )


class Lora(Section):
    rank: int = Field(16, ge=1, description="Rank of the LoRA matrices.")
    alpha: float = Field(32.0, gt=0, description="Scale of the update, which is multiplied by alpha / rank.")
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Dropout of the adapter's input; it is drawn for each token from (seed, step, example, "
        "layer).",
    )
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="Names of the linear layers that get an adapter."
    )


class Model(Section):
    path: str | None = Field(None, description="Folder or Hugging Face hub name of the model.")
    revision: str | None = Field(None, description="Hub revision; pin a commit for a reproducible run.")
    trust_remote_code: bool = Field(
        False, description="Permission to run code from the model repository: leave it off."
    )
    tiny: TinyModel | None = None
    lora: Lora | None = None
    chat_template: str | None = Field(
        None, description="File with a Jinja chat template, for tokenizers without one."
    )
    reference: str | None = Field(
        None, description="Folder or hub name of the reference policy; default: the start weights."
    )

    @model_validator(mode="after")
    def _one_model(self) -> "Model":
        if (self.path is None) == (self.tiny is None):
            raise ValueError("set exactly one of model.path (a folder or hub name) and model.tiny")
        return self


class Columns(Section):
    """Names of the columns in the user's file, e.g. `chosen: preferred_answer`. By default a field is read
    from the column of its own name. null leaves it out, whatever the file holds."""

    messages: str | None = Field(
        "messages",
        description="Conversation; if the column does not exist, `conversations` (ShareGPT) is read.",
    )
    text: str | None = Field("text", description="Plain text, all of it learned.")
    prompt: str | None = Field("prompt", description="Prompt: text or messages.")
    completion: str | None = Field("completion", description="Answer to the prompt.")
    chosen: str | None = Field("chosen", description="Better answer.")
    rejected: str | None = Field("rejected", description="Worse answer.")
    label: str | None = Field("label", description="KTO's label: true for a wanted completion.")
    margin: str | None = Field(
        "margin", description="Margin of the reward model: by how much chosen is better."
    )
    answer: str | None = Field(
        "answer", description="Reference answer that greedy generation and reward functions compare with."
    )
    tools: str | None = Field(
        "tools", description="Tools of the chat template: a list of JSON schemas, or its JSON text."
    )
    chat_template_kwargs: str | None = Field(
        "chat_template_kwargs",
        description="Further variables of the chat template, e.g. {enable_thinking: false}.",
    )
    images: str | None = Field(
        "images",
        description="Images (`image` too), which are an error since models read text only; null: they are "
        "left out.",
    )
    environment: str | None = Field(
        "environment",
        description="Part of the row for rollouts.environment; an error if that is not set; null: it is "
        "left out.",
    )


class Source(Section):
    path: str = Field(
        description="JSONL, JSON array, Parquet or CSV file or its URL (s3://…), a folder of them, "
        "`toy:NAME`, or a hub data set."
    )
    weight: float = Field(
        1.0, gt=0, description="Passes over this source per epoch: 0.5 takes half of it, 2 takes it twice."
    )
    split: str | None = Field(
        None,
        description="Split of a hub data set, a folder with several splits, or toy data; default: train, or"
        " a folder's only split.",
    )
    subset: str | None = Field(
        None, description="Configuration of a hub data set, or its subfolder in a local folder."
    )
    revision: str | None = Field(None, description="Hub revision; required for hub data sets.")
    columns: Columns | None = Field(None, description="Columns of this source, instead of data.columns.")
    max_rows: int | None = Field(None, ge=1, description="Number of rows to read, from the first.")


class Data(Section):
    train: str | list[Source]
    eval: str | list[Source] | None = None
    max_bad_rows: int = Field(
        0, ge=0, description="Number of unusable rows that may be left out; each is named."
    )
    columns: Columns = Columns()  # pyright: ignore[reportCallIssue]
    max_length: int = Field(1024, ge=2, description="Most tokens of a prompt plus one completion.")
    overlong: Literal["error", "drop", "truncate_prompt_left", "truncate_end"] = Field(
        "truncate_prompt_left", description="Treatment of a row longer than max_length."
    )
    remainder: Literal["drop", "use", "carry"] = Field(
        "carry", description="Treatment of an epoch's last partial batch."
    )
    append_eos: bool = Field(
        True, description="Whether plain-text completions end with the eos token, as in TRL."
    )
