"""What a data set's README.md says of its files, as the hub reads it: the `configs` of its YAML head.

configs: [{config_name: main, data_files: [{split: train, path: main/train-*}, …]}, …] --declared--> {subset: {split: files}}
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from orchestrator.core.errors import ConfigError, MissingInput

DEFAULT = "default"
"""The subset that is read where none is named: so called, or marked `default: true`, or the only one."""


def declared(folder: Path) -> Mapping[str, Mapping[str, Any]]:
    """The configurations by subset name; empty without a README, a YAML head, or `configs` in it. ConfigError
    for a broken head."""
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
            fix="mend it, or name the files",
        ) from error
    configs = head.get("configs") if isinstance(head, dict) else None
    found = configs if isinstance(configs, list) else []
    return {str(one.get("config_name", DEFAULT)): one for one in found if isinstance(one, dict)}


def subset_of(
    folder: Path, configs: Mapping[str, Mapping[str, Any]], subset: str | None
) -> Mapping[str, Any]:
    """The configuration of a subset, or the default one. MissingInput for another name, ConfigError where
    several are there and none named."""
    names = ", ".join(configs)
    if subset is not None:
        if subset not in configs:
            raise MissingInput(
                f"{folder} holds no subset {subset}", fix=f"its README.md names the subsets {names}"
            )
        return configs[subset]
    marked = [
        name
        for name, one in configs.items()
        if one.get("default") is True or name == DEFAULT or len(configs) == 1
    ]
    if not marked:
        fix = f"set `subset`: {{path: {folder}, subset: {next(iter(configs))}}}"
        raise ConfigError(f"{folder} has the subsets {names}, and none is named", fix=fix)
    return configs[marked[0]]


def files_of(
    folder: Path, config: Mapping[str, Any], suffixes: tuple[str, ...]
) -> dict[str | None, list[Path]] | None:
    """The files of a configuration by split; None where it names none. MissingInput where one that it names
    is not there."""
    from datasets.data_files import resolve_pattern, sanitize_patterns

    base = folder / str(config.get("data_dir") or "")
    named = config.get("data_files")
    if named is None:
        return None
    found: dict[str | None, list[Path]] = {}
    try:
        for split, patterns in sanitize_patterns(named).items():
            listed = [
                resolve_pattern(str(pattern), str(base), allowed_extensions=list(suffixes))
                for pattern in patterns
            ]
            found[split] = [Path(file) for files in listed for file in files]
    except (FileNotFoundError, ValueError) as error:
        why = " ".join(str(error).split())
        raise MissingInput(
            f"{folder}/README.md names data files that are not there",
            why=why,
            fix="fetch the folder again, whole",
        ) from error
    return found
