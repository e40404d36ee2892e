"""Reads the overrides of a command line, and says which of them name a group, an option or a key that does not exist."""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf

from newllm.config.library import chosen_by_default, conf_folder, load, options
from newllm.config.problems import Problem, closest, listed, shown, with_closest
from newllm.config.typed import OPTIONAL_GROUPS, flat

LITERAL = ("prompt", "evaluation.generation.prompt", "run", "resume", "output_dir")
"""Keys whose value is prose or one folder: commas, brackets and apostrophes in it mean nothing."""
PATHS = (
    *("data.path", "data.cache_dir", "tokenizer.path", "embedding.path", "model.pretrained"),
    *("evaluation.generation.prompts_file", "evaluation.generation.output"),
)
"""Keys whose value is a path, taken as it is too; but a comma parts the several of a sweep."""


@dataclass
class Judgement:
    """Overrides that can be composed, and what is wrong with the others.

    Attributes:
        hydra: overrides of Hydra's own settings.
        groups: choices of options.
        values: settings of keys, by the override's text.
        problems: what is wrong with the overrides left out.
        unclear: groups whose option is like none that exists: nothing can be said about their keys.
    """

    hydra: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    values: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unclear: set[str] = field(default_factory=set)

    @property
    def good(self) -> list[str]:
        return [*self.hydra, *self.groups, *self.values]

    def refuse(self, key: str, given: str, sentence: str) -> None:
        self.problems.append(Problem(key, given, sentence))


def parse(override: str) -> Override:
    """Return the parsed override.

    Raises:
        ValueError: the text is not in Hydra's grammar; the message is what follows the override in an error sentence.
    """
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"cannot be read as an override ({reason}). Allowed: key=value, group=option, key=[a,b]. "
            "Put a value with spaces, commas, brackets or quotes in quotes, and all of it in quotes for the shell."
        ) from error


def quoted(text: str) -> str:
    """Return a text as the grammar reads it letter by letter."""
    return QuotedString(text, Quote.single).with_quotes()


def readable(overrides: list[str], root: str) -> list[str]:
    """Return the overrides as Hydra reads them to the same effect.

    An option that its grammar takes for a number gets quotes (debug=nan), and so do prose and what it has no letters for
    (name=<Japanese>); null for a group of which nothing need be chosen is left out.
    """
    defaults = chosen_by_default(root)
    written = []
    for text in map(with_quotes, overrides):
        group, _, option = text.partition("=")
        is_number = group in defaults and option in options(group) and not isinstance(parse(text).value(), str)
        if group not in OPTIONAL_GROUPS or option not in ("null", ""):
            written.append(f"{group}={quoted(option)}" if is_number else text)
    return written


def with_quotes(text: str) -> str:
    """Return the override with its value in quotes where the grammar would misread it: prose, paths, letters beyond ASCII."""
    key, _, value = text.partition("=")
    is_quoted = len(value) > 1 and value[0] in "'\"" and value[0] == value[-1]
    is_path = key in PATHS and "," not in value and value[:1] != "["
    if key in LITERAL or is_path:
        is_as_meant = is_quoted or value in ("", "null") or _is_read_as_written(text, value)
        return text if is_as_meant else f"{key}={quoted(value)}"
    # What marks a list, several values or a quotation is left to the grammar.
    return text if value.isascii() or set(value) & set(",'\"([{") else f"{key}={quoted(value)}"


def _is_read_as_written(text: str, value: str) -> bool:
    try:
        return parse(text).value() == value
    except ValueError:
        return False


def judge(overrides: list[str], root: str) -> Judgement:
    """Return which overrides fit the groups, options and keys of a root; values are not looked at.

    The options that are chosen decide which keys exist; a misspelt option is read as its closest match, so that one
    mistake is not reported as many.
    """
    judgement = Judgement()
    values: list[Override] = []
    for text in overrides:
        try:
            override = parse(text)
        except ValueError as error:
            judgement.refuse("", text, str(error))
            continue
        if override.is_sweep_override():
            _refuse_several(override, judgement)
        elif override.is_hydra_override():
            judgement.hydra.append(text)
        elif override.package is not None or override.key_or_group in chosen_by_default(root):
            _judge_group(override, root, judgement)
        else:
            values.append(override)
    if values:
        tree = _unresolved(load(root, [*judgement.hydra, *judgement.groups]))
        for override in values:
            _judge_key(override, tree, root, judgement)
    return judgement


def key_of(override: str) -> str:
    """Return the key or group that a readable override concerns."""
    return parse(override).key_or_group


def _refuse_several(override: Override, judgement: Judgement) -> None:
    key, text = override.key_or_group, str(override.input_line)
    judgement.refuse(
        key,
        text,
        "is several values for one run. Allowed: one value. "
        f"Add -m to run once with each; write {key}=[...] for a list, quotes around a text with commas.",
    )


def _judge_group(override: Override, root: str, judgement: Judgement) -> None:
    group, text, value = override.key_or_group, str(override.input_line), override.value()
    names = options(group)
    if override.package is not None or override.is_delete():
        advice = f"Allowed: {group}=<one of {listed(names)}>. Choose an option instead."
        return judgement.refuse(group, text, f"a group can be neither removed nor placed elsewhere. {advice}")
    if override.is_add() or override.is_force_add():
        plain_text = text.lstrip("+")
        return judgement.refuse(group, text, f"{group} is a group that is there already. Write {plain_text}.")
    is_list = isinstance(chosen_by_default(root)[group], list)
    chosen = value if isinstance(value, list) and is_list else [value]
    unknown = [option for option in chosen if str(option) not in names]
    for option in unknown:
        advice = with_closest(f"Allowed: {listed(names)}.", str(option), names)
        judgement.refuse(group, text, f"{shown(option)} is not an option of {group}. {advice}")
    if not unknown:
        return judgement.groups.append(text)
    matches = [closest(str(option), names) if option in unknown else str(option) for option in chosen]
    if None in matches:
        judgement.unclear.add(group)
    elif is_list:
        judgement.groups.append(f"{group}=[{','.join(quoted(str(match)) for match in matches)}]")
    else:
        judgement.groups.append(f"{group}={quoted(str(matches[0]))}")
    return None


def _judge_key(override: Override, tree: dict[str, Any], root: str, judgement: Judgement) -> None:
    key, text = override.key_or_group, str(override.input_line)
    group, _, rest = key.partition(".")
    exists = _exists(key, tree)
    if group in judgement.unclear:
        return
    if exists and override.is_delete():
        judgement.refuse(key, text, f"a key cannot be removed. Allowed: a value. Write {key}=<value>, or {key}=null.")
    elif exists and (override.is_add() or override.is_force_add()):
        judgement.refuse(key, text, f"{key} is a key that is there already. Write {text.lstrip('+')}.")
    elif exists and rest == "kind" and group in {"model", "loss", "trainer", "data"}:
        advice = f"Allowed: {group}=<one of {listed(options(group))}>. Choose an option instead."
        judgement.refuse(key, text, f"the kind comes with the option of {group}. {advice}")
    elif exists:
        judgement.values[text] = key
    else:
        judgement.refuse(key, text, _unknown(key, tree, root))


def _unknown(key: str, tree: dict[str, Any], root: str) -> str:
    """Return why a key does not exist, and where something like it does."""
    group, _, _ = key.partition(".")
    groups = list(chosen_by_default(root))
    leaves = flat(tree)
    if "." in key and group in tree and isinstance(tree[group], dict):
        inside = [leaf for leaf in leaves if leaf.startswith(f"{group}.")]
        sentence = f"is not a key of {group}. Allowed: {listed(leaf.partition('.')[2] for leaf in inside)}."
        elsewhere = _options_with(key, root)
        if elsewhere:
            return f"{sentence} It is a key of {' and '.join(elsewhere)}: choose that too, or leave the key out."
        return with_closest(sentence, key, leaves)
    allowed = listed([*groups, *(name for name in tree if name not in groups)])
    return with_closest(f"is neither a group nor a key. Allowed: {allowed}.", key, [*groups, *leaves])


def _options_with(key: str, root: str) -> list[str]:
    """Return the options of the key's group, in the form group=option, whose own file has the key."""
    group, _, rest = key.partition(".")
    if isinstance(chosen_by_default(root).get(group), list):  # a list of options: each has its place in the group
        name, _, rest = rest.partition(".")
        return [f"{group}=[{name}]"] if name in options(group) and _exists(rest, _own_keys(group, name)) else []
    return [f"{group}={option}" for option in options(group) if _exists(rest, _own_keys(group, option))]


def _own_keys(group: str, option: str) -> dict[str, Any]:
    return _unresolved(OmegaConf.load(conf_folder() / group / f"{option}.yaml"))


def _unresolved(config: DictConfig | ListConfig) -> dict[str, Any]:
    tree = OmegaConf.to_container(config, resolve=False)
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def _exists(key: str, tree: dict[str, Any]) -> bool:
    node: Any = tree
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True
