"""The model card of an exported run: what it is, how to load it, how it was trained, what came out."""

from pathlib import Path
from typing import Any

import yaml

from mixerlab.lm.recipe.load import to_yaml
from mixerlab.lm.run.checkpoint import read_meta
from mixerlab.lm.run.folder import Run
from mixerlab.options import plain

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- mixerlab
- {kind}
---

# {title}

A language model of {parameters:,} parameters, trained with mixerlab and exported as `{kind}`, after {steps:,} steps.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER{trust})
{tokenizer}
```
{needs}
## Data

```yaml
{data}
```

## Metrics

{metrics}
## Recipe

```yaml
{recipe}
```
"""


def model_card(run: Run, step: int, kind: str, parameters: int) -> str:
    """Markdown, as Hugging Face's hub shows it. `kind` is the `model_type` of the export."""
    metrics = read_meta(run.checkpoints.at(step)).get("metrics") or {}
    table = "".join(f"| {name} | {value} |\n" for name, value in metrics.items())
    modules = "".join(f" and the module `{plugin}`" for plugin in run.recipe.plugins)
    remote = kind == "mixerlab"
    return _CARD.format(
        kind=kind,
        title=run.recipe.name or run.path.name,
        parameters=parameters,
        steps=step,
        trust=", trust_remote_code=True" if remote else "",
        tokenizer="tokenizer = AutoTokenizer.from_pretrained(FOLDER)"
        if run.has_tokenizer
        else "# No tokenizer: its tokens are not text.",
        needs=f"\nIt runs by code in this folder, which needs `pip install mixerlab`{modules}.\n"
        if remote
        else "",
        data=_yaml(plain(run.recipe.data)),
        metrics=f"| metric | value |\n|---|---|\n{table}" if table else "None were measured at this step.\n",
        recipe=_yaml(yaml.safe_load(to_yaml(run.recipe))),
    )


def _yaml(values: Any) -> str:
    """Without where files lie on this machine, which is nobody's business."""
    return yaml.safe_dump(_without_folders(values), sort_keys=False, allow_unicode=True).strip()


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if isinstance(value, str) and value.startswith(("/", "~")):
        return Path(value).name
    return value
