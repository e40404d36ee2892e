"""What `--help` prints: groups, their options and what they are for, and the keys of the groups that were named."""

from dataclasses import fields
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf

from newllm.config.compose import ROOTS
from newllm.config.fields import allowed
from newllm.config.kinds import FOLDERS, kinds_of, schema_of
from newllm.config.library import chosen_by_default, description, load, options
from newllm.config.problems import shown
from newllm.config.schema import LayerConfig, LayersConfig

_INTRODUCTIONS = {
    "train": """\
Train a small language model.

  python train.py [group=option] [key=value]   one run; its folder is the last line printed
  python train.py check=true ...               parameters, FLOPs, memory and steps of that run, without running it
  python train.py resume=<folder>              continue an interrupted run; resume=auto finds the newest of this configuration
  python train.py -m model=pythia,infini seed=0,1,2 ...
                                               one run for each combination""",
    "evaluate": """\
Measure a finished run.

  python evaluate.py run=<folder> [evaluation=[perplexity,lag]] [key=value]""",
}
_EXAMPLES = {
    "train": """\
  python train.py experiment=first_run
  python train.py model=infini trainer=lct trainer.sweeps=2
  python train.py model=pythia size=small data=stdlib optimizer.lr=6e-4
  python train.py 'layers.stack=[infini,infini,{pythia: rest}]'""",
    "evaluate": """\
  python evaluate.py run=outputs/first_run/2025-01-31_12-00-00_0123abcd
  python evaluate.py run=... evaluation=[generation] evaluation.generation.temperature=0""",
}


def help_text(root: str, overrides: list[str]) -> str:
    """Return the help of an entry point; the keys of every group that an override names follow in full."""
    named = dict.fromkeys(text.partition("=")[0].partition(".")[0] for text in overrides)
    parts = [
        _INTRODUCTIONS[root],
        "Groups and options (* unless you say otherwise):\n"
        + "\n".join(_group(root, group) for group in chosen_by_default(root) if options(group)),
        "Keys outside groups:\n" + _keys(root, overrides, ""),
        *(f"Keys of {group}:\n{_keys(root, overrides, group)}" for group in named if group in chosen_by_default(root)),
        "Examples:\n" + _EXAMPLES[root],
        "All values of a run:   --cfg job (add --resolve to follow references)\n"
        f"Keys of one group:     python {root}.py <group>=<option> --help\n"
        "Launchers and sweeps:  --hydra-help",
    ]
    return "\n\n".join(part for part in parts if part)


def _group(root: str, group: str) -> str:
    """Return one line per option of a group."""
    default = chosen_by_default(root)[group]
    chosen = default if isinstance(default, list) else [default]
    rows = [f"{'*' if name in chosen else ' '} {name:<15} {description(group, name)}" for name in options(group)]
    return "\n".join(f"  {group if row is rows[0] else '':<11} {row}" for row in rows)


def _keys(root: str, overrides: list[str], group: str) -> str:
    """Return one line per key: its value, and what it may be."""
    tree: Any = OmegaConf.to_container(load(root, overrides), resolve=False)
    node = tree[group] if group else {key: value for key, value in tree.items() if not isinstance(value, dict)}
    hints = _hints(root, group, node)
    leaves = [(key, value) for key, value in node.items() if not isinstance(value, dict) and key != "kind"]
    rows = [(f"{group}.{key}" if group else key, shown(value), allowed(hints.get(key, Any))) for key, value in leaves]
    return "\n".join(f"  {key + '=' + value:<45} {words}" for key, value, words in rows)


def _hints(root: str, group: str, node: dict[str, Any]) -> dict[str, Any]:
    hints = get_type_hints(ROOTS[root], include_extras=True)
    if not group:
        return hints
    hint = hints.get(group)
    if hint is LayersConfig:
        schemas = [schema_of(LayerConfig, kind) for kind in kinds_of(LayerConfig)]
        return {
            name: value for schema in schemas for name, value in get_type_hints(schema, include_extras=True).items()
        }
    if hint in FOLDERS:
        hint = schema_of(hint, str(node.get("kind")))
    if hint is None or get_origin(hint) is dict or not fields(hint) or get_args(hint):
        return {}
    return get_type_hints(hint, include_extras=True)
