"""The files that a data set's README.md declares, as the hub reads it: the `configs` of its YAML head.

configs: [{config_name: main, data_files: [{split: train, path: main/train-*}, …]}, …]
    --declared--> {main: configuration}
    --files_of--> {train: files}
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from orchestrator.core.errors import ConfigError, MissingInput

DEFAULT = "default"
"""Name of the default subset. One marked `default: true`, or an only one, is the default too."""


def declared(folder: Path) -> Mapping[str, Mapping[str, Any]]:
    """The configurations by subset name; empty without a README, a YAML head, or `configs` in it.

    ConfigError for a broken head.
    """
    readme = folder / "README.md"
    if not readme.is_file():
        return {}
    fence, _, rest = readme.read_text(encoding="utf-8", errors="replace").partition("\n")
    if fence.strip() != "---" or "\n---" not in rest:
        return {}
    try:
        head = yaml.safe_load(rest.partition("\n---")[0])
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{readme}: its YAML head cannot be read",
            why=str(error).replace("\n", " "),
            fix="fix the YAML head, or name the files in data.train or data.eval",
        ) from error
    configs = head.get("configs") if isinstance(head, dict) else None
    if not isinstance(configs, list):
        return {}
    return {str(c.get("config_name", DEFAULT)): c for c in configs if isinstance(c, dict)}


def subset_of(
    folder: Path, configs: Mapping[str, Mapping[str, Any]], subset: str | None
) -> Mapping[str, Any]:
    """The configuration of a subset, or the default one.

    MissingInput for an unknown subset; ConfigError if several exist, none is named and none is the default.
    """
    names = ", ".join(configs)
    if subset is not None:
        if subset not in configs:
            raise MissingInput(
                f"{folder} holds no subset {subset}", fix=f"its README.md names the subsets {names}"
            )
        return configs[subset]
    marked = [
        name
        for name, config in configs.items()
        if config.get("default") is True or name == DEFAULT or len(configs) == 1
    ]
    if not marked:
        fix = f"set `subset`: {{path: {folder}, subset: {next(iter(configs))}}}"
        raise ConfigError(f"{folder} has the subsets {names}, and none is named", fix=fix)
    return configs[marked[0]]


def files_of(
    folder: Path, config: Mapping[str, Any], suffixes: tuple[str, ...]
) -> dict[str | None, list[Path]] | None:
    """The files of a configuration by split; None if it names no files. MissingInput for files that do not
    exist."""
    from datasets.data_files import resolve_pattern, sanitize_patterns

    base = folder / str(config.get("data_dir") or "")
    declared_files = config.get("data_files")
    if declared_files is None:
        return None
    by_split: dict[str | None, list[Path]] = {}
    try:
        for split, patterns in sanitize_patterns(declared_files).items():
            resolved = [
                resolve_pattern(str(pattern), str(base), allowed_extensions=list(suffixes))
                for pattern in patterns
            ]
            by_split[split] = [Path(file) for files in resolved for file in files]
    except (FileNotFoundError, ValueError) as error:
        why = " ".join(str(error).split())
        raise MissingInput(
            f"{folder}/README.md names data files that do not exist",
            why=why,
            fix="download the whole folder again",
        ) from error
    return by_split
