"""The model card: an artifact's README.md, and what ``inspect --markdown`` writes with the measurements it is given."""

from __future__ import annotations

from typing import Any

from trim_export.report.headline import NOTHING, Measured, conditions, headlines
from trim_export.report.words import method_sentence, recovery_sentence, structured_sentence

__all__ = ["model_card"]


def model_card(manifest: dict[str, Any], measured: Measured = NOTHING) -> str:
    """Markdown with the metadata that model hubs read at its top."""
    sparsity, removed = manifest["sparsity"], manifest["source"].get("structured")
    before = f"{structured_sentence(removed).capitalize()}. " if removed else ""
    after = f" Then recovered: {recovery_sentence(manifest['recovery'])}." if "recovery" in manifest else ""
    measured_where = "".join(f"\n\n{sentence}" for sentence in conditions(measured))
    rows = "\n".join(
        f"| {line.what} | {line.dense} | {line.sparse} | {'' if line.ratio is None else f'{line.ratio:.2f} x'} |"
        for line in headlines(manifest, measured)
    )
    return f"""---
library_name: transformers
tags: [sparse, pruned, trim-export]
---

# {manifest["source"]["model"]}, {sparsity["achieved"]:.1%} sparse

{before}Pruned with trim-export {manifest["tool_version"]}: {method_sentence(manifest)}.{after}
{"Kept weights were updated." if manifest["weights_updated"] else "Kept weights are those of the dense model."}

| | dense | sparse | sparse / dense |
|---|---|---|---|
{rows}

{len(manifest["modules"])} matrices are pruned to {sparsity["achieved"]:.5f} (target {sparsity["target"]:g}) \
and stored as {manifest["encoding"]}; everything else is dense.\
{measured_where}

```python
import trim_export.runtimes  # registers the loader
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH/TO/THIS/DIRECTORY")
```

`trim_manifest.json` holds every layer's sparsity and quality and the hash of every file; `trim-export check` verifies
them.
"""
